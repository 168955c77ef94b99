"""Whose projection the tokens of the page are read under."""

from types import SimpleNamespace

import pytest

from spd_dist.arms import chosen
from spd_dist.overrides import config_of_arm, load_config
from spd_dist.side_stages.token_effects import held_of


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (["base", "psr"], None),
        (["base", "random", "spd_distil", "spd"], "spd"),
        (["base", "psr", "random_distil", "spd_distil"], "spd_distil"),
        (["base", "identity", "random", "filtered", "spd@rank=4"], "spd@rank=4"),
        (["base", "identity", "spd@mode=isotropic", "projected", "psr"], "projected"),
        (["base", "identity", "random", "psr"], "random"),
        (["base", "identity", "psr"], "identity"),
        (["base", "random", "spd_distil", "spd@evaluate.temperature=0.5"], "spd@evaluate.temperature=0.5"),
    ],
)
def test_tokens_are_read_under_the_methods_projection_and_under_a_control_for_want_of_one(names, held):
    config = load_config(overrides=[f"evaluate.arms=[{','.join(names)}]"])
    run = SimpleNamespace(config=config, config_of=lambda arm: config_of_arm(config, arm))
    found = held_of(run, chosen(names))
    assert (found and found.name) == held

"""The arms: one protocol, few differences, and variants that name theirs."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from gradients import kv_site

from spd_dist.arms import ARMS, chosen
from spd_dist.config import Config
from spd_dist.config.combination import UNPROJECTED
from spd_dist.errors import ConfigError
from spd_dist.overrides import config_of_arm, load_config
from spd_dist.stages.project import projection
from spd_dist.types import Certificate, SiteSubspace, Subspace


def differing(name: str, *overrides: str) -> dict[str, object]:
    """What an arm has for its own, by dotted key."""
    config = load_config(overrides=[f"evaluate.arms=[{name}]", *overrides])
    (arm,) = chosen([name])
    common, own = dataclasses.asdict(config), dataclasses.asdict(config_of_arm(config, arm))
    return {
        f"{section}.{key}": own[section][key]
        for section in own
        if isinstance(own[section], dict)
        for key in own[section]
        if own[section][key] != common[section][key]
    }


def test_every_arm_of_the_table_can_be_evaluated():
    names = [
        "base",
        "psr",
        "ssd",
        "spd",
        "projected",
        "random",
        "spd_distil",
        "random_distil",
        "spd_contrast",
        "random_contrast",
        "spd_onpolicy",
        "random_onpolicy",
        "filtered",
        "identity",
        "full",
        "activation",
        "termination",
        "supervised",
    ]
    assert list(ARMS) == names
    assert {arm.name for arm in ARMS.values() if arm.trains and not arm.projects} == set(UNPROJECTED)
    assert load_config(overrides=[f"evaluate.arms=[{','.join(names)}]"]).evaluate.arms == tuple(names)


def test_the_page_has_every_arm_as_it_is():
    page = Path(__file__).parents[2].joinpath("docs/variants.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `") and line.count(" | ") == 4]
    told = {arm.strip("| `"): (source, is_projected, sentence) for arm, source, is_projected, sentence, *_ in rows}
    assert list(told) == list(ARMS)
    for name, arm in ARMS.items():
        assert told[name] == (arm.learns_from, "yes" if arm.projects else "no", arm.sentence)


def test_arms_differ_from_the_run_in_what_their_names_say_only():
    for name in ("base", "psr", "spd", "projected", "termination", "supervised"):
        assert differing(name) == {}
    assert differing("random") == {"project.mode": "random"}
    assert differing("identity") == {"project.mode": "identity"}
    assert differing("spd_distil") == {"finetune.loss": "distil"}
    matched = {"project.mode": "random", "project.match_kl": True}
    assert differing("random_distil") == {"finetune.loss": "distil", **matched}
    assert differing("spd_contrast") == {"generate.contrast": 2.0}
    assert differing("random_contrast") == {"generate.contrast": 2.0, **matched}
    assert differing("spd_onpolicy") == {"finetune.loss": "distil", "finetune.divergence": "reverse"}
    assert differing("random_onpolicy") == {"finetune.loss": "distil", "finetune.divergence": "reverse", **matched}
    wanted = ("ended", "loops", "agreed")
    assert differing("filtered") == {"finetune.filter": wanted, "generate.num_samples": 4}
    assert differing("filtered@generate.num_samples=8")["generate.num_samples"] == 8
    assert differing("full") == {"calibrate.mask": "full"}
    assert differing("activation") == {"project.directions": "activation"}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("spd_onpolicy@finetune.loss=cross_entropy", r"finetune\.loss: .* needs distil"),
        ("spd_onpolicy|generate.engine=server", r"generate\.engine: .* needs hf, since no server"),
        (
            "spd_onpolicy|generate.engine=command|generate.command='p {model} {prompts} {output}'",
            r"generate\.command: ",
        ),
        (
            "spd_onpolicy|generate.vllm_python=P|evaluate.engine=hf|finetune.lora_variant=dora",
            r"generate\.engine: ",
        ),
    ],
)
def test_an_arm_that_learns_on_policy_is_refused_what_it_could_not_finish(words, fault):
    arm, *others = words.split("|")
    server = ["generate.server={url: http://localhost:1/v1, models: {spd: a, spd_onpolicy: b}}"] * ("server" in words)
    with pytest.raises(ConfigError, match=fault):
        load_config(overrides=[f"evaluate.arms=[base,'{arm}']", *server, *others])


def test_ssd_samples_as_its_paper_says_and_as_the_config_says():
    sampling = {"generate.temperature": 1.6, "generate.top_p": 0.8, "generate.top_k": 20}
    assert differing("ssd") == sampling
    assert differing("ssd", "generate.min_p=0.1") == {**sampling, "generate.min_p": 0.0}
    assert differing("ssd", "generate.ssd_temperature=1.1")["generate.temperature"] == 1.1


def test_a_variant_has_the_settings_that_it_names_and_the_rule_that_goes_with_its_rank():
    assert differing("spd@rank=16") == {"project.rank_rule": "fixed", "project.rank": 16}
    assert differing("spd@energy=0.9") == {"project.rank_rule": "energy", "project.energy": 0.9}
    assert differing("random@mode=isotropic@rho=0.2") == {"project.mode": "isotropic", "project.rho": 0.2}
    assert differing("psr@generate.temperature=1") == {"generate.temperature": 1.0}
    (arm,) = chosen(["spd@rank=16"])
    assert arm.sentence == "self-policy distillation, with rank=16"
    assert arm.stage("generate") == "arms/spd@rank=16/generate"


def test_a_variant_of_another_rank_rule_leaves_the_runs_rank_behind():
    run = load_config(overrides=["project.rank_rule=fixed", "project.rank=16"])
    rules = {}
    for arm in chosen(["spd", "spd@rank=8", "spd@energy=0.9", "random@rank_rule=half"]):
        project = config_of_arm(run, arm).project
        rules[arm.name] = (project.rank_rule, project.rank, project.energy)
    assert rules == {
        "spd": ("fixed", 16, 0.95), "spd@rank=8": ("fixed", 8, 0.95), "spd@energy=0.9": ("energy", None, 0.9),
        "random@rank_rule=half": ("half", None, 0.95),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"project\.rank_rule: half is not valid with project\.rank=8"):
        load_config(overrides=["evaluate.arms=[base,'spd@rank=8@rank_rule=half']"])


def test_a_teacher_is_asked_of_arms_with_a_projection_alone():
    overrides = ["evaluate.arms=[base,psr,spd_distil,random_distil@rho=0.4]"]
    config = load_config(overrides=overrides)  # psr keeps its own loss
    losses = [config_of_arm(config, arm).finetune.loss for arm in chosen(config.evaluate.arms)]
    assert losses == ["cross_entropy", "cross_entropy", "distil", "distil"]
    assert [arm.distils("cross_entropy") for arm in chosen(config.evaluate.arms)] == [False, False, True, True]
    assert [arm.distils("distil") for arm in chosen(["base", "spd", "spd@finetune.loss=cross_entropy"])] == [
        False, True, False,
    ]  # fmt: skip
    for words in (["finetune.loss=distil"], ["evaluate.arms=[psr@finetune.loss=distil]"]):
        with pytest.raises(ConfigError, match=r"finetune.loss: distil is not valid with evaluate.arms=.*psr"):
            load_config(overrides=words)
    load_config(overrides=["finetune.loss=distil", "evaluate.arms=[base,spd,psr@finetune.loss=cross_entropy]"])
    assert load_config(overrides=[*overrides, "finetune.mode=full"]).finetune.mode == "full"


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("[]", "evaluate.arms: an empty list is not valid; name each arm once"),
        ("[spd,psr,spd]", "evaluate.arms: spd twice is not valid; name each arm once"),
        ("[spdd]", "evaluate.arms: 'spdd' is not an arm; the nearest is spd, and there are base, psr"),
        ("[spd@model.name=x]", "'spd@model.name=x' is not a variant; write NAME@KEY=VALUE, with a key of calibrate"),
        ("[spd@rank]", "'spd@rank' is not a variant"),
        ("[spd@calibrate.mask=../x]", "is not a variant"),
        ("[spd@rnk=3]", "project.rnk: unknown key .*; the nearest valid key is project.rank"),
        ("[spd@rank=0]", "project.rank: 0 is out of bounds"),
    ],
)
def test_what_is_not_an_arm_is_refused_before_anything_is_loaded(arms, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[f"evaluate.arms={arms}"])


def test_the_config_of_an_arm_without_settings_is_the_runs_own():
    config = Config()
    assert config_of_arm(config, ARMS["psr"]) is config


@pytest.mark.parametrize(
    ("arm", "change", "remedy"),
    [
        ("psr@rank=8", "project.rank=8", "no projection"),
        ("base@calibrate.mask=full", "calibrate.mask=full", "no projection"),
        ("ssd@sketch.size=9", "sketch.size=9", "no projection"),
        ("supervised@calibrate.layers=[last]", r"calibrate.layers=\[last\]", "no projection"),
        ("psr@finetune.lora_init=spd@kinds=key", "project.kinds=key", "no projection"),
        ("spd@rho=0.88", "project.rho=0.88", "add @mode=blend"),
        ("base@generate.temperature=1", "generate.temperature=1", "no completions"),
        ("supervised@generate.num_samples=4", "generate.num_samples=4", "no completions"),
        ("projected@generate.contrast=3", "generate.contrast=3", "writes no completions"),
        ("spd_onpolicy@generate.contrast=3", "generate.contrast=3", "vary spd"),
        ("psr@generate.contrast=3", "generate.contrast=3", "vary spd"),
        ("spd@generate.ssd_temperature=3", "generate.ssd_temperature=3", "without ssd_"),
        ("projected@finetune.num_epochs=2", "finetune.num_epochs=2", "not fine-tuned"),
        ("base@finetune.divergence=js", "finetune.divergence=js", "not fine-tuned"),
        ("supervised@finetune.filter=[ended]", r"finetune.filter=\[ended\]", "no completions"),
        ("spd@finetune.divergence=js", "finetune.divergence=js", "add @finetune.loss=distil"),
        ("spd_distil@finetune.num_on_policy_iterations=2", "finetune.num_on_policy_iterations=2", "vary spd_onpolicy"),
        ("spd@evaluate.also=[svamp]", r"evaluate.also=\[svamp\]", "set it for the run"),
        ("base@evaluate.num_coloured=2", "evaluate.num_coloured=2", "set it for the run"),
        ("spd@rank=4@evaluate.temperatures=[1]", r"evaluate.temperatures=\[1\]", "set it for the run"),
    ],
)  # fmt: skip
def test_a_change_that_an_arm_does_not_read_is_refused(arm, change, remedy):
    told = rf"evaluate.arms: '{re.escape(arm)}' is not a variant: {change} changes nothing .*{remedy}.*leave it out"
    with pytest.raises(ConfigError, match=told):
        load_config(overrides=[f"evaluate.arms=['{arm}']"])


def test_a_change_that_an_arm_reads_is_a_variant():
    names = [
        "base@evaluate.temperature=0.4", "projected@rank=4", "projected@project.mode=random", "random@rank=16",
        "random@mode=isotropic@rho=0.2", "identity@calibrate.layers=[last]", "full@rank=8",
        "spd@mode=blend@rho=0.5", "spd@generate.contrast=0.5", "psr@finetune.lora_init=eva",
        "psr@finetune.lora_init=spd@rank=16",
        "psr@generate.temperature=1", "ssd@generate.ssd_temperature=1.1", "ssd@generate.temperature=1",
        "termination@generate.temperature=1", "supervised@calibrate.num_examples=20",
        "supervised@finetune.num_epochs=1",
        "psr@finetune.filter=[ended]", "spd@finetune.loss=distil@finetune.divergence=js",
        "spd_onpolicy@finetune.divergence=js", "spd_onpolicy@finetune.num_on_policy_iterations=2@rank=4",
        "random_distil@match_kl=false", "random@match_kl=true",
    ]  # fmt: skip
    load_config(overrides=[f"evaluate.arms=[{','.join(map(repr, names))}]"])
    load_config(overrides=["finetune.loss=distil", "evaluate.arms=[base,spd,'spd@finetune.divergence=js']"])


def test_the_control_of_a_blended_projection_is_random_and_keeps_the_same_share():
    (arm,) = chosen(["random@directions=gradient_x_activation@rho=0.88"])
    found = config_of_arm(load_config(), arm).project
    assert (found.mode, found.rho, found.directions) == ("random", 0.88, "gradient_x_activation")
    site = kv_site(width=8)
    whole = Subspace({site: SiteSubspace(torch.eye(8)[:, :4], torch.ones(8), 0.5, Certificate(1.0, num_rows=9))}, {})
    operator = projection(whole, found, 1).operators[site]
    change_DD = operator.factor_DR * operator.weight_R @ operator.factor_DR.T
    gains = torch.linalg.eigvalsh(operator.keep * torch.eye(8) + change_DD)
    torch.testing.assert_close(gains, torch.tensor([0.88] * 4 + [1.0] * 4))

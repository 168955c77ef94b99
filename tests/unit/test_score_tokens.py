"""What the projection changes at each token: as computed by hand, and text that is the tokens' own."""

import dataclasses

import pytest
import torch
from projections import four_sites
from tiny import save_tiny_model, tiny_model, tiny_tokenizer

from spd_dist.config import Distributed, Evaluate, Model
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.policy import load_policy
from spd_dist.projection.hooks import projected
from spd_dist.stages.context import StageContext
from spd_dist.stages.score_tokens import MOST_POSITIONS, divided, pieces_of, score_tokens
from spd_dist.storage.answers import effects_path, read_effects
from spd_dist.types import Completion

ALONE = World(0, 1, torch.device("cpu"))
TOKENIZER = tiny_tokenizer()


def completion(name: str, asked: str, text: str, sample: int = 0) -> Completion:
    tokens = [tuple(TOKENIZER(one)["input_ids"]) for one in (asked, text)]
    return Completion(name, sample, 0, tokens[0], (*tokens[1], TOKENIZER.eos_token_id), text, "stop")


COMPLETIONS = [
    completion("p0", "How many apples?", "Seven, as 3 + 4 = 7."),
    completion("p1", "Und in \u00fc?", "\u00fcber \U0001f34e"),
    completion("p0", "How many apples?", "4", sample=1),
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("policy") / "model")
    return load_policy(Model(str(folder)), Distributed(zero_stage=0), ALONE)


def by_hand(model: torch.nn.Module, one: Completion) -> list[float]:
    tokens = [*one.prompt_tokens, *one.tokens]
    with torch.no_grad():
        logp_TV = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [-logp_TV[place - 1, tokens[place]].item() for place in range(len(one.prompt_tokens), len(tokens))]


def test_each_token_has_its_likelihood_under_both_policies(policy, tmp_path):
    summary = score_tokens(policy, COMPLETIONS, four_sites(), Evaluate(), StageContext(tmp_path, 1, ALONE))
    found = read_effects(effects_path(tmp_path, "spd"))
    assert [(one.id, one.sample) for one in found] == [("p0", 0), ("p1", 0), ("p0", 1)]
    model = tiny_model()
    for effects, one in zip(found, COMPLETIONS, strict=True):
        assert effects.base_nll == pytest.approx(by_hand(model, one), abs=1e-3)
        with projected(model, four_sites()):
            changed = by_hand(model, one)
        assert effects.projected_nll == pytest.approx(changed, abs=1e-3)
        assert max(abs(a - b) for a, b in zip(effects.base_nll, changed, strict=True)) > 0.01
        assert "".join(effects.pieces) == f"{one.text}<|im_end|>"
    assert (summary.num_completions, summary.num_tokens) == (3, sum(len(one.tokens) for one in COMPLETIONS))
    every = [loss for one in found for loss in one.projected_nll]
    assert summary.mean_projected_nll == pytest.approx(sum(every) / len(every))


def test_what_is_there_is_not_computed_again_and_other_completions_are_refused(policy, tmp_path):
    context = StageContext(tmp_path, 1, ALONE)
    first = score_tokens(policy, COMPLETIONS, four_sites(), Evaluate(), context)
    assert score_tokens(None, COMPLETIONS, None, Evaluate(), context) == first
    with pytest.raises(DataError, match=r"spd.jsonl has 3 lines, and there must be 2 completions \(.*p0.*; delete"):
        score_tokens(None, COMPLETIONS[:2], None, Evaluate(), context)


def test_batches_hold_every_completion_and_no_more_positions_than_allowed():
    lengths = [1, 700, 30, 1500, 2500, 800, 1, 20]
    rows = [Completion(str(i), 0, 0, (5,), (6,) * length, "", "stop") for i, length in enumerate(lengths)]
    batches = list(divided(rows))
    assert sorted(one.id for batch in batches for one in batch) == [str(i) for i in range(len(rows))]
    sizes = [len(batch) * max(1 + len(one.tokens) for one in batch) for batch in batches]
    assert [size for size in sizes if size > MOST_POSITIONS] == [2501], "one that is too long is alone"
    assert list(divided(rows[::-1])) != []
    assert [len(batch) for batch in divided([dataclasses.replace(rows[0], id=str(i)) for i in range(1025)])] == [
        1024,
        1,
    ]


@pytest.mark.parametrize("text", ["plain words", "\u00fc\u4f60\u597d \U0001f34e.", " two  spaces\n\tand lines", ""])
def test_pieces_are_the_text_and_a_letter_of_several_tokens_is_the_last_ones(text):
    tokens = TOKENIZER(text)["input_ids"]
    pieces = list(pieces_of(TOKENIZER, tokens))
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_letter_that_was_cut_is_shown_as_cut():
    tokens = TOKENIZER("a\u4f60")["input_ids"][:-1]
    assert list(pieces_of(TOKENIZER, tokens)) == ["a", "", "\ufffd"]

"""What is pushed to the hub says of itself what its arm is, and nothing is pushed under the name of another arm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from answering import ARMS, answered_run, answers, put
from huggingface_hub import ModelCard
from projections import WIDTH, operator, site

from spd_dist.errors import ConfigError, DataError
from spd_dist.hub import publish as publishing
from spd_dist.hub.publish import Publication, publish
from spd_dist.models.model_card import Card, write_card
from spd_dist.overrides import load_config, to_yaml
from spd_dist.reports.run_report import Asked, write_report
from spd_dist.storage.answers import answers_path
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.storage.subspace_file import save_subspace
from spd_dist.types import Certificate, Completion, SiteSubspace, Subspace


def run_of(folder: Path, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(overrides=["model.name=org/base", *overrides])))
    return folder


def write_subspace(folder: Path, rank: int) -> None:
    part = SiteSubspace(operator(rank).factor_DR, torch.ones(WIDTH, dtype=torch.float64), 0.5, Certificate())
    folder.mkdir(parents=True)
    save_subspace(folder / "subspace.safetensors", Subspace({site(): part}, {"directions": "gradient_x_activation"}))


def write_corpus(folder: Path) -> None:
    (folder / "completions").mkdir(parents=True)
    row = vars(Completion("p0", 0, 0, (1,), (2, 3), "words", "stop"))
    (folder / "completions" / "completions.jsonl").write_text(json.dumps(row) + "\n")
    put(folder, {"engine": "hf"})


@pytest.fixture
def pushed(monkeypatch):
    """Pushes to nowhere, and gives the card."""
    cards = []

    def upload(place: Path, *_: object) -> str:
        cards.append((place / "README.md").read_text())
        return "address"

    monkeypatch.setattr(publishing, "upload", upload)

    def push(run: Path, product: str, arm: str) -> str:
        publish(Publication(run, product, "me/it", arm))
        return cards[-1]

    return push


@pytest.mark.parametrize(
    ("arm", "mode"),
    [("random", "random"), ("random_distil", "random"), ("identity", "identity"), ("spd@mode=isotropic", "isotropic")],
)
def test_the_methods_subspace_is_not_pushed_as_that_of_an_arm_that_is_not_held_to_it(tmp_path, pushed, arm, mode):
    run = run_of(tmp_path)
    write_subspace(run / "project", rank=6)
    with pytest.raises(ConfigError, match=rf"--arm: {arm} .*project\.mode={mode}.* hard, blend, soft, as --arm spd"):
        pushed(run, "subspace", arm)


def test_the_methods_subspace_is_not_pushed_as_that_of_an_arm_whose_own_is_not_made(tmp_path, pushed):
    run = run_of(tmp_path)
    write_subspace(run / "project", rank=6)
    assert "| 16 | 6 | 0.5000 |" in pushed(run, "subspace", "spd")
    assert "| 16 | 6 | 0.5000 |" in pushed(run, "subspace", "spd_distil"), "the same subspace, of the same settings"
    for arm in ("full", "spd@rank=4"):
        with pytest.raises(DataError, match=rf"arms/{arm.partition('@')[0]}.*project.* is not there: run the project"):
            pushed(run, "subspace", arm)
    write_subspace(run / "arms/full/project", rank=5)
    card = pushed(run, "subspace", "full")
    assert "| 16 | 5 | 0.5000 |" in card
    assert "loss on what the mask `full` keeps of the calibration examples of `arithmetic`" in card
    assert "| directions | gradient_x_activation |" in card


HELD = "the base model with its keys and values held to its capability subspace"
RANDOM = "the base model with its keys and values held to a random subspace of the same rank"


@pytest.mark.parametrize(
    ("arm", "writer", "learnt_from"),
    [
        ("psr", "of the base model", "completions of the base model, unfiltered"),
        ("spd", f"of {HELD}", f"completions of {HELD}, unfiltered"),
        ("random", f"of {RANDOM}", f"completions of {RANDOM}, unfiltered"),
        (
            "spd_contrast",
            f"drawn from log p + 2 (log q - log p), p the base model and q {HELD}",
            f"completions drawn from log p + 2 (log q - log p), p the base model and q {HELD}, unfiltered",
        ),
        (
            "termination",
            "of the base model",
            "completions of the base model, unfiltered, those cut at the limit shortened to end in EOS",
        ),
        (
            "spd_onpolicy",
            "of the student of the iteration before",
            "completions of the student of the iteration before",
        ),
        ("spd_onpolicy@finetune.num_on_policy_iterations=1", "of the base model", "completions of the base model"),
        ("filtered@finetune.filter=[ended]", f"of {HELD}", f"completions of {HELD}, filtered to those that ended by"),
    ],
)
def test_the_card_of_a_corpus_says_who_wrote_it(tmp_path, pushed, arm, writer, learnt_from):
    run = run_of(tmp_path)
    write_corpus(run / ("generate" if arm == "spd" else f"arms/{arm}/generate"))
    card = " ".join(pushed(run, "corpus", arm).split())
    assert f"Completions {writer}, unfiltered and as sampled" in card
    assert f"| its student learnt from | {learnt_from}" in card
    assert ("the part of iteration 4 of 4" in card) == (arm == "spd_onpolicy")
    assert ("capability" in card) == (HELD in writer)


def test_an_arm_with_a_temperature_of_its_own_is_measured_at_that_one(tmp_path, pushed):
    hot = "spd@evaluate.temperature=0.7"
    run = answered_run(run_of(tmp_path / "run"))
    write_merged(answers_path(run / "evaluate", hot, "arithmetic"), answers(80, num=150))
    write_report(run, ARMS | {hot: "as spd"}, Asked("arithmetic", "accuracy", 1))
    write_card(Card("org/base", "org/base", {}, []), run / "finetune/adapter", "adapter")
    (run / "finetune/adapter/adapter_config.json").write_text("{}")
    for arm, manner, value in ((hot, "1 samples at 0.7", 80 / 150), ("spd", "greedy", 0.6)):
        (result,) = ModelCard(pushed(run, "adapter", arm)).data.eval_results
        assert result.metric_name.startswith(f"accuracy, {manner}, n 150")
        assert result.metric_value == pytest.approx(value)


def test_what_is_measured_by_likelihood_is_not_called_greedy(tmp_path, pushed):
    run = answered_run(run_of(tmp_path / "run", "data.task=mmlu", "choices.scoring=likelihood"))
    write_report(run, ARMS, Asked("arithmetic", "accuracy", 1))
    write_card(Card("org/base", "org/base", {}, []), run / "finetune/adapter", "adapter")
    (run / "finetune/adapter/adapter_config.json").write_text("{}")
    (result,) = ModelCard(pushed(run, "adapter", "spd")).data.eval_results
    assert result.metric_name.startswith("accuracy, by likelihood, n 150")

"""Arms that go beyond the paper, in one run: what they are given, and that they end in a report."""

from pathlib import Path

import pytest
from launching import BRIEF, launch
from tiny import save_tiny_model

from spd_dist.analysis.report import Report
from spd_dist.reports.browser import corpus_of
from spd_dist.reports.page import learned
from spd_dist.storage.artifacts import read_json
from spd_dist.storage.completions import read_completions
from spd_dist.storage.records import read_record

FILTERED = "filtered@finetune.filter=[ended,loops]@generate.num_samples=3"


def test_adapters_begin_in_the_subspace_or_in_random_directions(tmp_path: Path):
    """On two ranks: three students of one corpus, and a subspace though nothing is projected."""
    run, model = tmp_path / "run", save_tiny_model(tmp_path / "model")
    start = "psr@finetune.lora_init=spd"
    arms = f"evaluate.arms=[base,psr,{start},{start}@project.mode=random]"
    launch(2, [f"model.name={model}", *BRIEF, arms, f"run_dir={run}"], tmp_path / "log")
    report = read_record(run / "report.json", Report)
    pairs = [(one.before, one.after) for one in report.comparisons if one.before != "base"]
    drawn = f"{start}@project.mode=random"
    assert pairs == [("psr", start), ("psr", drawn), (drawn, start)]
    students = [run / f"arms/{arm}/finetune" for arm in list(report.arms)[1:]]
    weights = {(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in students}
    assert len(weights) == 3
    assert len({corpus_path(run, arm).read_bytes() for arm in list(report.arms)[1:]}) == 1


@pytest.mark.slow
def test_variants_of_what_a_student_learns_run_beside_the_method(tmp_path: Path):
    run, model = tmp_path / "run", save_tiny_model(tmp_path / "model")
    arms = f"evaluate.arms=[base,spd,spd_distil,random_distil,spd_contrast,'{FILTERED}']"
    hot = ["generate.max_new_tokens=64", "generate.temperature=5", "generate.top_p=1"]  # so that some of them end
    words = [f"model.name={model}", *BRIEF, *hot, arms, f"run_dir={run}"]
    launch(1, words, tmp_path / "log")
    report = read_json(run / "report.json")
    assert list(report["arms"]) == ["base", "spd", "spd_distil", "random_distil", "spd_contrast", FILTERED]
    own, distilled, control = (
        (run / folder / "generate/completions/completions.jsonl").read_text()
        for folder in ("", "arms/spd_distil", "arms/random_distil")
    )
    assert own == distilled != control, "the corpus is that of the projection"
    card = (run / "arms/spd_distil/finetune/adapter/README.md").read_text()
    held = "the base model with its keys and values held to its capability subspace"
    assert f"| learnt from | completions of {held}, unfiltered |" in card
    assert f"| teacher | {held} |" in card
    assert "towards the teacher's next-token distributions, by KL(teacher" in card
    assert f"| learnt from | completions of {held}, unfiltered |" in (run / "finetune/adapter/README.md").read_text()
    completions = read_completions(run / "arms" / FILTERED / "generate/completions/completions.jsonl")
    num_cut = sum(one.finish_reason == "length" for one in completions)
    counts = read_json(run / "arms" / FILTERED / "finetune/filter.json")
    assert counts["num_rejected"].get("cut", 0) == num_cut > 0
    assert counts["num_completions"] == len(completions) == 30
    summary = read_json(run / "arms" / FILTERED / "finetune/summary.json")
    assert summary["num_sequences"] == counts["num_kept"] < 30
    assert not (run / "finetune/filter.json").exists()


def test_a_student_learns_on_policy_in_iterations_on_its_own_samples(tmp_path: Path):
    """On two ranks: the untouched model writes the first part, each iteration's student what the next learns from."""
    run, model = tmp_path / "run", save_tiny_model(tmp_path / "model")
    arms = "evaluate.arms=[base,psr,spd_onpolicy,random_onpolicy]"  # the latter's subspace is blended to equal KL
    words = [f"model.name={model}", *BRIEF, "finetune.num_on_policy_iterations=2", "finetune.learning_rate=0.05", arms]
    launch(2, [*words, f"run_dir={run}"], tmp_path / "log")
    report = read_json(run / "report.json")
    assert list(report["arms"]) == ["base", "psr", "spd_onpolicy", "random_onpolicy"]

    def written(arm: str) -> dict[str, str]:
        return {one.id: one.text for one in read_completions(corpus_path(run, arm))}

    plain, first, second = (written(arm) for arm in ("psr", "spd_onpolicy_iteration1", "spd_onpolicy"))
    ids = list(plain)
    assert (list(first), list(second)) == (ids[::2], ids[1::2])
    assert first == {key: plain[key] for key in first}, "written by the untouched model, held to nothing"
    assert second != {key: plain[key] for key in second}, "written by the student of the first iteration"
    assert written("random_onpolicy_iteration1") == first
    assert written("random_onpolicy") != second, "whose teacher was another one"
    for number, arm in enumerate(("spd_onpolicy_iteration1", "spd_onpolicy")):
        card = (run / "arms" / arm / "finetune/adapter/README.md").read_text()
        writer = ("the base model", "the student of the iteration before")[number]
        assert f"| learnt from | completions of {writer}, unfiltered |" in card
        assert "| training sequences | 5 |" in card
        assert "towards the teacher's next-token distributions, by KL(student" in card
    match = read_json(run / "arms/random_onpolicy/match/match.json")
    assert 0 < match["share"] <= 1
    iterations = ["spd_onpolicy_iteration1", "spd_onpolicy", "random_onpolicy_iteration1", "random_onpolicy"]
    assert [row.arm for row in learned(read_record(run / "report.json", Report))] == ["psr", *iterations]
    assert [one.text for one in corpus_of(run, iterations[:2])] == [*first.values(), *second.values()]
    assert match["num_rows"] == 7
    assert match["is_matched"] == (abs(match["random_kl"] - match["kl"]) <= 0.05 * min(match["random_kl"], match["kl"]))
    assert match["is_matched"] or match["random_kl"] < match["kl"], "nothing makes the quieter one louder"
    again = launch(1, [*words, f"run_dir={run}"], tmp_path / "again")
    assert "finetune: starts" not in again
    assert read_json(run / "report.json")["arms"] == report["arms"]


def corpus_path(run: Path, arm: str) -> Path:
    return run / "arms" / arm / "generate/completions/completions.jsonl"

"""Plans of experiments: what a pilot's answers say of a larger one, against the tests that it will be judged by."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics

import pytest
import torch
from answering import ARMS, PLAIN, answered_run, sampled

from spd_dist.analysis.intervals import paired_t
from spd_dist.analysis.random_effects import (
    Design,
    DifferenceVariance,
    crossed,
    detectable,
    difference_variance,
    examples_needed,
)
from spd_dist.errors import ConfigError, DataError
from spd_dist.launch.run_experiment import main
from spd_dist.overrides import load_config, load_experiment, to_yaml
from spd_dist.reports.run_report import Asked, write_report
from spd_dist.runs.pilot import pilot_cost
from spd_dist.runs.registered_plan import PROTOCOL, keep_protocol, protocol_note, write_protocol
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.artifacts import read_json, sha256_of, write_text
from spd_dist.storage.keyed_parts import write_merged

WORDS = ("arms=[base,psr,spd]", "seeds=[1,2]", "data.num_test=100", "model.name=nowhere")


def by_id(values):
    return {f"p{index:05}": float(value) for index, value in enumerate(values)}


def answers(rows):
    """An example a row, its samples right or wrong."""
    return [
        dataclasses.replace(PLAIN, id=f"p{index:05}", sample=sample, correct=bool(right))
        for index, row in enumerate(rows)
        for sample, right in enumerate(row)
    ]


def drawn(design, *, chance, gain=0.0, seed_spread=0.0):
    """Answers of two arms: each example has its own chance, each seed its own gain."""
    found = []
    base = [chance.uniform(0.2, 0.7) for _ in range(design.examples)]
    for _ in range(design.seeds):
        gained = gain + chance.gauss(0, seed_spread)
        pair = [[[chance.random() < p + more for _ in range(design.samples)] for p in base] for more in (0.0, gained)]
        found.append((answers(pair[0]), answers(pair[1])))
    return found


def means(rows):
    values = {}
    for answer in rows:
        values.setdefault(answer.id, []).append(float(answer.correct))
    return {key: statistics.fmean(each) for key, each in values.items()}


def test_the_pilot_s_own_design_detects_what_the_test_of_its_answers_says():
    design = Design(3, 40, 4)
    pilot = drawn(design, chance=random.Random(16), gain=0.05, seed_spread=0.1)
    differences = [{key: means(after)[key] - value for key, value in means(before).items()} for before, after in pilot]
    variance = difference_variance(pilot, "accuracy")
    assert min(variance.examples, variance.seeds, variance.rest) > 0, "a pilot of which no part was cut at 0"
    assert detectable(variance, design) == pytest.approx(crossed(differences).detectable)
    [single] = drawn(Design(1, 40, 1), chance=random.Random(1), gain=0.2)
    once = difference_variance([single], "accuracy")
    assert once.seeds is None
    assert detectable(once, Design(1, 40, 1)) == pytest.approx(paired_t(*map(means, single)).detectable)


def test_parts_of_the_variance_are_found_from_many_answers():
    """Samples of a right/wrong answer vary by p (1 - p) an arm, seeds by what was drawn."""
    found = [
        difference_variance(drawn(Design(6, 60, 4), chance=random.Random(at), seed_spread=0.1), "accuracy")
        for at in range(30)
    ]
    expected = 2 * torch.linspace(0.2, 0.7, 1001).double().apply_(lambda p: p * (1 - p)).mean().item()
    assert statistics.fmean(one.samples for one in found) == pytest.approx(expected, rel=0.1)
    assert statistics.fmean(one.seeds for one in found) == pytest.approx(0.1**2, rel=0.25)
    assert statistics.fmean(one.examples for one in found) < 0.02, "both arms have the same chance on an example"


def test_a_planned_experiment_finds_the_difference_in_about_four_of_five():
    variance = DifferenceVariance(examples=0.0, seeds=0.0, rest=0.0, samples=2 * 0.45**2)
    num = examples_needed(variance, 0.08, seeds=2, samples=4)
    chance = torch.Generator().manual_seed(0)
    noise = (2 * 0.45**2 / 4) ** 0.5
    shown = 0
    for _ in range(300):
        value_SN = 0.08 + noise * torch.randn(2, num, generator=chance, dtype=torch.float64)
        shown += crossed([by_id(row) for row in value_SN.tolist()]).interval.low > 0
    assert 0.7 < shown / 300 < 0.92


def test_more_of_each_count_shows_less_and_seeds_that_differ_set_a_floor():
    variance = DifferenceVariance(examples=0.02, seeds=0.0001, rest=0.01, samples=0.3)
    shown = [detectable(variance, Design(seeds, 200, samples)) for seeds, samples in ((2, 1), (2, 4), (6, 4))]
    assert shown == sorted(shown, reverse=True)
    assert examples_needed(variance, 0.001, seeds=3, samples=8) is None, "seeds alone move it by more"
    needed = examples_needed(variance, 0.05, seeds=3, samples=8)
    assert detectable(variance, Design(3, needed, 8)) <= 0.05 < detectable(variance, Design(3, needed - 1, 8))


def coupled(design, *, chance, spread):
    """Answers of two arms that read the same random number of each sample; each example has its own gain."""
    found = []
    base = [(p := chance.uniform(0.3, 0.6), p + chance.gauss(0, spread)) for _ in range(design.examples)]
    for _ in range(design.seeds):
        number = [[chance.random() for _ in range(design.samples)] for _ in base]
        sides = ([[u < pair[side] for u in row] for row, pair in zip(number, base, strict=True)] for side in (0, 1))
        found.append(tuple(map(answers, sides)))
    return found


def test_samples_that_arms_draw_by_the_same_numbers_hide_no_spread_of_the_examples():
    found = [
        difference_variance(coupled(Design(3, 80, 2), chance=random.Random(at), spread=0.1), "accuracy")
        for at in range(30)
    ]
    assert statistics.fmean(one.examples for one in found) == pytest.approx(0.1**2, rel=0.3)
    assert statistics.fmean(one.samples for one in found) == pytest.approx(0.1 * (2 / 3.1416) ** 0.5, rel=0.2)


def test_a_plan_of_many_comparisons_asks_for_what_survives_their_correction():
    variance = DifferenceVariance(examples=0.02, seeds=0.0001, rest=0.01, samples=0.3)
    design = Design(3, 300, 8)
    assert detectable(variance, design, 13) > 1.2 * detectable(variance, design)
    for num in (1, 13):
        needed = examples_needed(variance, 0.08, 3, 8, num)
        assert detectable(variance, Design(3, needed, 8), num) <= 0.08


def test_hours_are_of_the_planned_arms_and_grow_with_answers_and_seeds():
    seconds = {
        "project": 60.0, "generate": 40.0, "finetune": 100.0, "arms/psr/generate": 20.0, "arms/psr/finetune": 100.0,
        "arms/spd_onpolicy_iteration1/finetune": 400.0, "arms/spd_onpolicy/finetune": 500.0, "evaluate/base": 50.0,
        "evaluate/spd": 70.0, "evaluate/psr": 60.0, "rounds/2/evaluate/psr": 20.0, "rounds/2/arms/psr/finetune": 100.0,
    }  # fmt: skip
    cost = pilot_cost(seconds, Design(1, 100, 2))
    arms = ["base", "psr", "spd", "spd@evaluate.temperature=0.4"]
    each = (50 + 80 + 70 + (50 + 80 + 70) / 3) / 200
    assert cost.hours(Design(3, 200, 4), arms) == pytest.approx(3 * (60 + 220 + 140 + 800 * each) / 3600)
    assert cost.unknown(arms) == ["spd@evaluate.temperature=0.4"]
    assert cost.unknown([*arms, "random"]) == ["random", "spd@evaluate.temperature=0.4"]
    assert cost.hours(Design(1, 1, 1), ["base", "spd_onpolicy"]) * 3600 > 900


def test_a_pilot_of_other_examples_is_refused():
    one, other = answers([[True], [False]]), answers([[True], [False], [True]])
    with pytest.raises(DataError, match="the same examples under every seed"):
        difference_variance([(one, other)], "accuracy")


def configured(folder, *words):
    """With the config that the run had."""
    write_text(folder / "config.yaml", to_yaml(load_config(overrides=["model.name=nowhere", *words])))


@pytest.fixture
def pilot(tmp_path):
    folder = answered_run(tmp_path / "pilot")
    configured(folder)
    write_report(folder, ARMS, Asked("arithmetic", "accuracy", 1))
    return folder


def test_the_plan_is_written_before_the_answers_and_the_report_says_what_departed(pilot, tmp_path, capsys):
    folder = tmp_path / "experiment"
    words = [*WORDS, f"folder={folder}"]
    assert main([*words, "--power", "5", "--pilot", str(pilot)]) == 0
    shown = capsys.readouterr().out
    for line in ("To show 5.0 points of SPD against BASE", "This config: 2 seeds, 1 samples of 100 examples", PROTOCOL):
        assert line in shown
    assert "the pilot has one seed" in shown
    experiment = load_experiment([], words)
    plan = read_json(folder / PROTOCOL)
    assert (plan["before"], plan["after"], plan["difference"]) == ("base", "spd", 0.05)
    assert plan["variance"]["examples"] == pytest.approx(statistics.variance([1.0] * 30 + [0.0] * 120))
    note = protocol_note(experiment)
    assert sha256_of(folder / PROTOCOL)[:16] in note
    assert note.endswith("done as planned.")
    later = load_experiment([], [*words, "data.num_test=60", "seeds=[1,2,3]"])
    note = protocol_note(later)
    assert "data.num_test is 100 there and 60 now" in note
    assert "seed is [1, 2] there and [1, 2, 3] now" in note
    assert write_protocol(experiment, pilot, 5.0), "the same plan again"
    with pytest.raises(ConfigError, match="is another plan \\(difference"):
        write_protocol(experiment, pilot, 2.0)
    assert protocol_note(load_experiment([], [*WORDS, f"folder={tmp_path / 'unplanned'}"])) is None


def test_a_plan_that_was_changed_after_the_first_answer_is_told_apart(pilot, tmp_path, capsys):
    folder = tmp_path / "experiment"
    words = [*WORDS, f"folder={folder}"]
    experiment = load_experiment([], words)
    shown = write_protocol(experiment, pilot, 5.0, 1.5)
    assert f"(sha256 {sha256_of(folder / PROTOCOL)[:16]})" in shown
    assert read_json(folder / PROTOCOL)["variance"]["seeds"] == pytest.approx(0.015**2)
    for seed in (1, 2):
        keep_protocol(folder, folder / f"seed_{seed}")
        write_text(folder / f"seed_{seed}" / "evaluate" / "base" / "arithmetic.part-0.jsonl", "{}")
    assert protocol_note(experiment).endswith("done as planned.")
    plan = (folder / PROTOCOL).read_text()
    write_text(folder / PROTOCOL, plan.replace('"difference": 0.05', '"difference": 0.09'))
    keep_protocol(folder, folder / "seed_1")  # begun: what it began under stays
    assert protocol_note(experiment).endswith(
        "departed from the plan: seed_1 was begun under another plan; seed_2 was begun under another plan."
    )
    (folder / "seed_2" / PROTOCOL).unlink()
    assert "seed_2 was begun before the plan" in protocol_note(experiment)
    write_text(folder / PROTOCOL, plan.replace('"test_rows": "', '"test_rows": "0'))
    assert protocol_note(experiment).endswith("the test rows are others.")
    assert main([*words, "--power", "5", "--pilot", str(pilot)]) == 2
    assert "seed_1 holds answers already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("finetune.divergence=js", "finetune.divergence is 'forward' there and 'js' now"),
        ("finetune.num_on_policy_iterations=2", "finetune.num_on_policy_iterations is 4 there and 2 now"),
        ("project.match_kl=true", "project.match_kl is False there and True now"),
        ("rounds=2", "rounds is 1 there and 2 now"),
        ("arms=[base,spd]", "evaluate.arms is ['base', 'psr', 'spd'] there and ['base', 'spd'] now"),
        ("generate.batch_size=1", "done as planned"),
        ("evaluate.num_coloured=0", "done as planned"),
        ("mechanism.num_rows=50", "done as planned"),
    ],
)
def test_whatever_changes_what_arms_answer_is_a_departure(pilot, tmp_path, word, says):
    words = [*WORDS, f"folder={tmp_path / 'experiment'}", "model.dtype=float32", "project.mode=random"]
    write_protocol(load_experiment([], words), pilot, 5.0)
    note = protocol_note(load_experiment([], [*words, word]))
    assert note.endswith(f"departed from the plan: {says}." if "there" in says else f"{says}.")


@pytest.mark.parametrize(("word", "num"), [("null", 7), ("5", 5), ("100", 7)])
def test_a_plan_is_of_as_many_examples_as_are_asked(pilot, tmp_path, word, num):
    test = tmp_path / "test.jsonl"
    rows = [{"id": str(index), "question": f"What is {index} + 1?", "answer": index + 1} for index in range(7)]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "experiment"
    write_protocol(
        load_experiment([], [*WORDS, f"data.num_test={word}", f"data.test={test}", f"folder={folder}"]), pilot, 5.0
    )
    assert read_json(folder / PROTOCOL)["design"]["examples"] == num


@pytest.mark.parametrize(
    ("of_pilot", "words", "key", "there", "now"),
    [
        ([], ["data.task=gsm8k"], "data.task", "arithmetic", "gsm8k"),
        ([], ["evaluate.temperature=0.8"], "evaluate.temperature", "0.0", "0.8"),
        (["evaluate.temperature=0.8"], [], "evaluate.temperature", "0.8", "0.0"),
        (["choices.scoring=likelihood", "data.task=mmlu"], ["data.task=mmlu"], "choices.scoring", "likelihood", "gen"),
        *[
            (["evaluate.temperature=0.8", f"{key}={there}"], ["evaluate.temperature=0.8"], key, there, now)
            for key, there, now in (
                ("evaluate.top_p", "0.5", "1.0"),
                ("evaluate.top_k", "3", "0"),
                ("evaluate.min_p", "0.1", "0.0"),
            )
        ],
    ],
)
def test_a_pilot_of_another_task_or_manner_of_answering_is_refused(pilot, tmp_path, of_pilot, words, key, there, now):
    configured(pilot, *of_pilot)
    folder = tmp_path / "experiment"
    says = (
        rf"{key}: '?{now}\w*'? is not valid with --pilot \S+pilot, .*set {key}={there}, or name a pilot .*{key}={now}"
    )
    with pytest.raises(ConfigError, match=says):
        write_protocol(load_experiment([], [*WORDS, *words, f"folder={folder}"]), pilot, 5.0)
    assert not (folder / PROTOCOL).exists()


def test_what_else_differs_from_the_pilot_stands_in_the_plan_and_numbers_do_not(pilot, tmp_path):
    words = [*WORDS, f"folder={tmp_path / 'experiment'}"]
    configured(pilot, "evaluate.top_p=0.5", "seed=9", "data.num_test=64", "rounds=2", "mechanism.num_rows=7")
    shown = write_protocol(load_experiment([], words), pilot, 5.0)
    assert "evaluate.top_p is 0.5 there and 1.0 now" in " ".join(shown.split())
    plan = read_json(tmp_path / "experiment" / PROTOCOL)
    told = ["evaluate.top_p is 0.5 there and 1.0 now", "rounds is 2 there and 1 now"]
    assert sorted(plan["differs_from_pilot"]) == told, "hours are of as many rounds as the pilot had"
    configured(pilot)
    same = load_experiment([], [*WORDS, f"folder={tmp_path / 'same'}"])
    assert "there and" not in write_protocol(same, pilot, 5.0)


def test_a_plan_holds_no_secret(pilot, tmp_path):
    folder = tmp_path / "experiment"
    words = ["generate.engine=command", "generate.command=write --api-key abc123xyz {model} {prompts} {output}"]
    write_protocol(load_experiment([], [*WORDS, *words, f"folder={folder}"]), pilot, 5.0)
    assert "--api-key ***" in (folder / PROTOCOL).read_text()
    assert "abc123xyz" not in (folder / PROTOCOL).read_text()


def test_a_pilot_without_its_config_is_named(pilot, tmp_path):
    (pilot / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"config.yaml is missing"):
        write_protocol(load_experiment([], [*WORDS, f"folder={tmp_path / 'e'}"]), pilot, 5.0)


def test_a_pilot_whose_arms_differ_nowhere_is_refused(pilot, tmp_path, capsys):
    folder, answered = tmp_path / "experiment", pilot / "evaluate"
    same = answers_path(answered, "base", "arithmetic").read_bytes()
    answers_path(answered, "spd", "arithmetic").write_bytes(same)
    write_report(pilot, ARMS, Asked("arithmetic", "accuracy", 1))
    assert main([*WORDS, f"folder={folder}", "--power", "5", "--pilot", str(pilot)]) == 3
    said = capsys.readouterr().err
    assert f"--pilot {pilot}: spd differs from base by the same on each of its 150 examples" in said
    assert "name a pilot with more examples" in said
    assert not (folder / PROTOCOL).exists()


def test_a_pilot_whose_arms_differ_on_few_examples_is_said_to_know_little(pilot, tmp_path):
    told = "SPD against BASE differs on 3 of the pilot's 150 examples, too few to say"
    experiment = load_experiment([], [*WORDS, f"folder={tmp_path / 'experiment'}"])
    assert told not in " ".join(write_protocol(experiment, pilot, 5.0).split())
    base = read_answers(answers_path(pilot / "evaluate", "base", "arithmetic"))
    own = [dataclasses.replace(one, correct=one.correct != (number < 3)) for number, one in enumerate(base)]
    write_merged(answers_path(pilot / "evaluate", "spd", "arithmetic"), own)
    write_report(pilot, ARMS, Asked("arithmetic", "accuracy", 1))
    experiment = load_experiment([], [*WORDS, f"folder={tmp_path / 'another'}"])
    assert told in " ".join(write_protocol(experiment, pilot, 5.0).split())


@pytest.mark.parametrize("place", ["evaluate/base/manifest.json", "jobs/spd/evaluate/spd/arithmetic.part-0.jsonl"])
def test_a_plan_after_the_first_answer_is_refused(pilot, tmp_path, capsys, place):
    folder = tmp_path / "experiment"
    write_text(folder / "seed_1" / place, json.dumps({}))
    assert main([*WORDS, f"folder={folder}", "--power", "5", "--pilot", str(pilot)]) == 2
    assert "holds answers already" in capsys.readouterr().err
    assert not (folder / PROTOCOL).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--power", "2"], "--power 2.0: give points above 0, and --pilot DIR"),
        (["--power", "0", "--pilot", "{pilot}"], "--power 0.0: give points above 0"),
        (["--between-seeds", "1"], "--between-seeds: 1.0 is not read without --power"),
        (["--power", "2", "--pilot", "{pilot}", "arms=[base,random]"], "random did not answer in it"),
        (["--power", "2", "--pilot", "{nowhere}"], "report.json"),
    ],
)
def test_what_is_wrong_with_a_plan_is_one_sentence(pilot, tmp_path, capsys, words, message):
    named = [word.format(pilot=pilot, nowhere=tmp_path / "nowhere") for word in words]
    assert main([*WORDS, f"folder={tmp_path / 'experiment'}", *named]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_several_samples_say_what_more_of_them_would_show(tmp_path, capsys):
    folder = answered_run(tmp_path / "pilot")
    configured(folder, "evaluate.temperature=0.8", "evaluate.num_samples=4")
    for arm, more in (("base", 0), ("psr", 0), ("spd", 1)):
        rows = sampled([min(4, right + more) for right in (0, 1, 2, 3) * 10])
        write_merged(answers_path(folder / "evaluate", arm, "arithmetic"), rows)
    write_report(folder, ARMS, Asked("arithmetic", "accuracy", 1, 0.8))
    words = [*WORDS, f"folder={tmp_path / 'e'}", "evaluate.temperature=0.8", "evaluate.num_samples=8"]
    assert main([*words, "--power", "5", "--pilot", str(folder)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    needed = {(int(row[0]), int(row[1])): int(row[2].replace(",", "")) for row in rows}
    assert needed[2, 16] < needed[2, 8] < needed[2, 1]
    assert needed[8, 1] < needed[2, 1]

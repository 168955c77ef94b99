import dataclasses

import pytest
from answering import ARMS, answers, sampled
from scipy import stats
from statsmodels.stats.multitest import multipletests

from spd_dist.analysis.random_effects import crossed
from spd_dist.analysis.report import SeedsDifference, read_report
from spd_dist.analysis.side_comparisons import AT, decode_controls
from spd_dist.errors import DataError
from spd_dist.reports.run_report import Asked, write_report
from spd_dist.reports.seeds import over_seeds, seeds_text, seeds_verdict
from spd_dist.storage.answers import answers_path
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.types import LeakReport


def run(folder, seed, *, spd=90, num=150, arms=ARMS, task="arithmetic"):
    for arm, num_correct in zip(ARMS, (60, 70, spd), strict=True):
        write_merged(answers_path(folder / "evaluate", arm, task), answers(num_correct, num=num))
    write_report(folder, arms, Asked(task, "accuracy", seed))
    return folder


def test_arms_and_differences_are_averaged_with_their_spread(tmp_path):
    folders = [run(tmp_path / str(seed), seed, spd=spd) for seed, spd in ((1, 84), (2, 90), (3, 99))]
    result = over_seeds(folders)
    spd = result.arms["spd"]
    assert result.seeds == [1, 2, 3]
    assert spd.values == [0.56, 0.6, 0.66]
    assert spd.mean == pytest.approx(0.6066667)
    assert spd.standard_deviation == pytest.approx(stats.tstd([0.56, 0.6, 0.66]))
    assert result.arms["base"].standard_deviation == pytest.approx(0, abs=1e-12)
    (difference,) = [one for one in result.comparisons if (one.before, one.after) == ("base", "spd")]
    assert difference.mean == pytest.approx(0.2066667)
    seeds = stats.t.interval(0.95, 2, 0.2066667, stats.sem([0.16, 0.2, 0.26]))
    assert difference.seed_interval == pytest.approx(seeds)
    assert difference.values == pytest.approx([0.16, 0.2, 0.26])


def test_the_table_shows_every_seed(tmp_path):
    folders = [run(tmp_path / str(seed), seed, spd=spd) for seed, spd in ((1, 84), (2, 90))]
    lines = seeds_text(over_seeds(folders)).splitlines()
    assert lines[0] == "arithmetic: 2 seeds (1, 2), n 150 each"
    (row,) = [line.split() for line in lines if line.split()[:1] == ["spd"] and line.split()[1] != "-"]
    assert (row[1], row[-3:]) == ("58.0", ["2.8", "56.0", "60.0"])
    (row,) = [line.split() for line in lines if line.split()[:3] == ["spd", "-", "base"]]
    assert (row[3], row[-2:]) == ("+18.0", ["+16.0", "+20.0"])
    assert max(map(len, lines)) <= 100


def test_another_task_has_a_column_and_a_line_that_says_where_an_arm_lost(tmp_path):
    folders = []
    for seed in (1, 2):
        folder = run(tmp_path / str(seed), seed)
        for arm, num_correct in zip(ARMS, (90, 89, 30), strict=True):
            write_merged(answers_path(folder / "evaluate", arm, "mmlu"), answers(num_correct, num=150))
        write_report(folder, ARMS, Asked("arithmetic", "accuracy", seed, also=(("mmlu", "accuracy"),)))
        folders.append(folder)
    result = over_seeds(folders)
    assert [(one.arm, one.value) for one in result.other_tasks] == [
        (arm, pytest.approx(share)) for arm, share in zip(ARMS, (0.6, 89 / 150, 0.2), strict=True)
    ]
    text = seeds_text(result, width=120)
    (row,) = [line.split() for line in text.splitlines() if line.split()[:3] == ["spd", "-", "base"]]
    assert row[-1] == "-40.0"
    assert "SPD lost on mmlu: -40.0 points (95 % interval" in text
    assert "PSR lost" not in text


def test_the_verdict_speaks_of_seeds_and_examples_and_says_no_more_than_is_shown(tmp_path):
    folders = [run(tmp_path / str(seed), seed, spd=spd) for seed, spd in ((1, 84), (2, 90), (3, 99))]
    text = seeds_text(over_seeds(folders))
    assert "SPD, over 3 seeds and 150 examples, against BASE: +20.7 points (95 % interval" in text
    assert "a gain beyond chance over examples and seeds" in text
    unclear = over_seeds([run(tmp_path / f"u{seed}", seed, spd=spd) for seed, spd in ((1, 60), (2, 61))])
    assert "no difference is shown; this experiment would find about" in unclear.verdict


def test_what_differs_by_chance_does_not_survive_the_correction_of_a_large_family():
    one = SeedsDifference(
        1.0, None, None, None, None, "base", "spd", 0.02, [0.001, 0.039], 0.04, 0.03, mean=0.02, values=[0.02, 0.02],
        standard_deviation=0.0, seed_interval=[0.02, 0.02], p_holm=0.2,
    )  # fmt: skip
    verdict = seeds_verdict([one] * 9, "accuracy", 3, 500)
    assert "does not survive the correction for 9 comparisons" in verdict
    assert seeds_verdict([], "accuracy", 3, 500) == "One arm alone: there is nothing to compare."


def test_diagnostics_of_comparisons_are_averaged_over_the_seeds(tmp_path):
    result = over_seeds([run(tmp_path / str(seed), seed, spd=spd) for seed, spd in ((1, 84), (2, 93))])
    (one,) = [one for one in result.comparisons if (one.before, one.after) == ("base", "spd")]
    assert (one.num_gained, one.num_lost) == (28.5, 0)
    assert (one.num_gained_by_ending, one.num_gained_by_form) == (0, 28.5)
    assert one.identical_fraction == pytest.approx(1 - 28.5 / 150)


def test_test_problems_in_the_training_rows_are_said_of_the_experiment_too(tmp_path):
    overlap = LeakReport("train", "test", num_rows=96, num_exact=2, num_near=1, leaks=())
    folders = [run(tmp_path / str(seed), seed) for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        write_report(folder, ARMS, Asked("arithmetic", "accuracy", seed), [overlap])
    text = seeds_text(over_seeds(folders), width=200)
    assert "Note: 2 exact and 1 near copies of test problems are among the 96 train rows" in text


def test_samples_are_counted_over_seeds_as_means(tmp_path):
    for seed in (1, 2):
        for more, arm in enumerate(ARMS):
            rows = sampled([min(4, right + more * seed) for right in (0, 1, 2, 3) * 10])
            write_merged(answers_path(tmp_path / str(seed) / "evaluate", arm, "arithmetic"), rows)
        write_report(tmp_path / str(seed), ARMS, Asked("arithmetic", "accuracy", seed, 0.5))
    result = over_seeds([tmp_path / "1", tmp_path / "2"])
    assert result.arms["base"].pass_at_k == pytest.approx({"1": 0.375, "2": 7 / 12, "4": 0.75})
    assert result.num_examples == 40
    text = seeds_text(result)
    assert text.splitlines()[0] == "arithmetic: 2 seeds (1, 2), n 40 each, 4 samples at temperature 0.5"
    assert "pass@k, %" in text
    write_report(tmp_path / "2", ARMS, Asked("arithmetic", "accuracy", 2, 0.7))
    with pytest.raises(DataError, match="their temperature differ"):
        over_seeds([tmp_path / "1", tmp_path / "2"])


def sampled_runs(folder, num_seeds=2):
    """Under each seed psr has more samples right, and spd more yet; votes are of what is right, and else of many."""
    for seed in range(1, num_seeds + 1):
        for more, arm in enumerate(ARMS):
            rows = sampled([min(4, right + more * (i % (seed + 1) == 0)) for i, right in enumerate((0, 1, 2, 3) * 10)])
            rows = [dataclasses.replace(row, vote="4" if row.correct else str(row.sample)) for row in rows]
            write_merged(answers_path(folder / str(seed) / "evaluate", arm, "arithmetic"), rows)
        write_report(folder / str(seed), ARMS, Asked("arithmetic", "accuracy", seed, 0.5))
    return [folder / str(seed) for seed in range(1, num_seeds + 1)]


def test_what_several_samples_show_is_compared_over_seeds_and_examples(tmp_path):
    folders = sampled_runs(tmp_path)
    result, runs = over_seeds(folders), [read_report(folder) for folder in folders]
    (one,) = [one for one in result.comparisons if (one.before, one.after) == ("base", "spd")]
    names = {"pass@2", "pass@4", "maj@2", "maj@4", "distinct", "distinct_correct", "repetition"}
    assert set(one.samples) == set(result.arms["base"].samples) == names
    own = [each for run in runs for each in run.comparisons if (each.before, each.after) == ("base", "spd")]
    for name in names:
        mean = sum(each.samples[name].value for each in own) / 2
        assert one.samples[name].value == pytest.approx(mean)
        for arm in ARMS:
            mean = sum(run.arms[arm].samples[name].value for run in runs) / 2
            assert result.arms[arm].samples[name].value == pytest.approx(mean)
    values = [
        {f"p{i}": float(min(4, right + 2 * (i % (seed + 1) == 0)) > 0) - float(right > 0)
         for i, right in enumerate((0, 1, 2, 3) * 10)}
        for seed in (1, 2)
    ]  # fmt: skip
    assert one.samples["pass@4"].interval == pytest.approx(list(crossed(values).interval))
    low, high = one.samples["pass@4"].interval
    assert low < one.samples["pass@4"].value < high


def test_a_likelihood_has_no_samples_over_seeds(tmp_path):
    for seed in (1, 2):
        for shift, arm in enumerate(ARMS):
            rows = [dataclasses.replace(row, nll=2 + shift * (i % 3)) for i, row in enumerate(answers(10, num=30))]
            write_merged(answers_path(tmp_path / str(seed) / "evaluate", arm, "codealpaca"), rows)
        write_report(tmp_path / str(seed), ARMS, Asked("codealpaca", "nll", seed))
    result = over_seeds([tmp_path / "1", tmp_path / "2"])
    assert [one.samples for one in (*result.comparisons, *result.arms.values())] == [{}] * 6


def swept(folder, seed, spd):
    """Base at two temperatures, the second the better: 60 and 70 of 150; two students."""
    arms = {"base": 60, f"base{AT}0.4": 70, "psr": 70, "spd": spd}
    for arm, num_correct in arms.items():
        write_merged(answers_path(folder / "evaluate", arm, "arithmetic"), answers(num_correct, num=150))
    write_report(folder, dict.fromkeys(arms, ""), Asked("arithmetic", "accuracy", seed))
    return folder


def test_the_method_is_held_against_the_best_temperature_over_seeds(tmp_path):
    folders = [swept(tmp_path / str(seed), seed, spd) for seed, spd in ((1, 90), (2, 96), (3, 93))]
    result, runs = over_seeds(folders), [read_report(folder) for folder in folders]
    psr, spd = result.decode_controls
    assert (psr.after, spd.after) == ("psr", "spd")
    assert spd.chosen == [f"base{AT}0.4"] * 6
    assert spd.difference == pytest.approx(sum(run.decode_controls[1].difference for run in runs) / 3)
    values = [{f"p{i}": float(70 <= i < num) for i in range(150)} for num in (90, 96, 93)]
    assert spd.interval == pytest.approx(list(crossed(values).interval))
    assert spd.p_value == pytest.approx(crossed(values).p_value)
    assert spd.p_holm == pytest.approx(2 * spd.p_value)
    said = (
        f"SPD, over 3 seeds, against BASE at its best temperature (base{AT}0.4, chosen on the other half of the "
        "examples under each seed): +15.3 points (95 % interval "
    )
    assert spd.sentence.startswith(said)
    assert spd.sentence.endswith("n 150): a difference beyond chance over examples and seeds.")
    assert psr.sentence.endswith("no difference is shown.")
    assert spd.sentence in seeds_text(result, width=2000)
    assert result.verdict.startswith(psr.sentence)


def test_each_seed_chooses_its_temperature_as_its_own_run_does(tmp_path):
    """Halves are of the seed, and one temperature is the better on some examples only."""
    folders, chosen = [], []
    for seed in (1, 2):
        arms = {
            "base": answers(75, num=150),
            f"base{AT}0.4": answers(75, num=150, first=75),
            "spd": answers(90, num=150),
        }
        for arm, rows in arms.items():
            write_merged(answers_path(tmp_path / str(seed) / "evaluate", arm, "arithmetic"), rows)
        write_report(tmp_path / str(seed), dict.fromkeys(arms, ""), Asked("arithmetic", "accuracy", seed))
        folders.append(tmp_path / str(seed))
        chosen += decode_controls(arms, "accuracy", seed)[0].chosen
    assert over_seeds(folders).decode_controls[0].chosen == chosen
    assert set(chosen) == {"base", f"base{AT}0.4"}, "or the halves said nothing"


def test_without_a_sweep_there_is_no_decode_control_over_seeds(tmp_path):
    assert over_seeds([run(tmp_path / str(seed), seed) for seed in (1, 2)]).decode_controls == []


def test_a_loss_on_another_task_is_corrected_for_all_arms_over_seeds(tmp_path):
    """7 of 150 lost under both seeds: beyond chance alone, and not among the losses of nine arms."""
    arms = {"base": 90, "spd": 85, **{f"psr_{n}": 90 for n in range(8)}}
    folders = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        for arm, num_correct in arms.items():
            write_merged(answers_path(folder / "evaluate", arm, "arithmetic"), answers(60, num=150))
            write_merged(answers_path(folder / "evaluate", arm, "mmlu"), answers(num_correct, num=150))
        asked = Asked("arithmetic", "accuracy", seed, also=(("mmlu", "accuracy"),))
        write_report(folder, dict.fromkeys(arms, ""), asked)
    result = over_seeds(folders)
    (spd,) = [one for one in result.other_tasks if one.arm == "spd"]
    assert spd.p_value < 0.05 < spd.p_holm == pytest.approx(9 * spd.p_value)
    (said,) = [note for note in result.notes if note.startswith("SPD")]
    assert said.startswith("SPD on mmlu: -3.3 points (95 % interval ")
    assert said.endswith(", which does not survive the correction for 9 comparisons.")
    assert "No arm is shown to have lost on mmlu." in result.notes


def test_arms_that_never_differ_are_said_to_show_nothing(tmp_path):
    result = over_seeds([run(tmp_path / str(seed), seed, spd=70) for seed in (1, 2)])
    assert result.notes == [
        "Shown, too, after the correction: psr - base +6.7 points (Holm p 0.0041).",
        "Too few examples to find any difference in 4 runs of 5, since so few answers differ: spd - psr.",
    ]


@pytest.mark.seconds
def test_the_family_of_all_comparisons_is_corrected_by_holm(tmp_path):
    result = over_seeds([run(tmp_path / str(seed), seed, spd=spd) for seed, spd in ((1, 70), (2, 74), (3, 73))])
    p_values = [one.p_value for one in result.comparisons]
    assert [one.p_holm for one in result.comparisons] == pytest.approx(multipletests(p_values, method="holm")[1])
    assert len(p_values) == 3


def test_runs_without_a_common_denominator_are_refused(tmp_path):
    first = run(tmp_path / "first", 1)
    with pytest.raises(DataError, match="their examples differ"):
        over_seeds([first, run(tmp_path / "fewer", 2, num=100)])
    with pytest.raises(DataError, match="their task differ"):
        over_seeds([first, run(tmp_path / "other", 2, task="gsm8k")])
    with pytest.raises(DataError, match="their arms differ; run the same arms"):
        over_seeds([first, run(tmp_path / "arms", 2, arms={"base": "", "spd": ""})])


def test_one_run_has_no_spread_and_a_run_without_a_report_is_named(tmp_path):
    with pytest.raises(DataError, match="needs at least 2 runs, not 1"):
        over_seeds([run(tmp_path / "first", 1)])
    with pytest.raises(DataError, match=r"report.json is missing"):
        over_seeds([tmp_path / "first", tmp_path / "second"])

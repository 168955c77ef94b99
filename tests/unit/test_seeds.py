import pytest
from answering import ARMS, answers
from scipy import stats

from spd_dist.errors import DataError
from spd_dist.runtime.answers import answers_path, write_merged
from spd_dist.runtime.report import write_report
from spd_dist.runtime.seeds import over_seeds, seeds_text


def run(folder, seed, *, spd=90, num=150, arms=ARMS, task="arithmetic"):
    for arm, num_correct in zip(ARMS, (60, 70, spd), strict=True):
        write_merged(answers_path(folder / "evaluate", arm, task), answers(num_correct, num=num))
    write_report(folder, arms, task=task, metric="accuracy", seed=seed)
    return folder


def test_arms_and_differences_are_averaged_with_their_spread(tmp_path):
    folders = [run(tmp_path / str(seed), seed, spd=spd) for seed, spd in ((1, 84), (2, 90), (3, 99))]
    result = over_seeds(folders)
    spd = result["arms"]["spd"]
    assert result["seeds"] == [1, 2, 3]
    assert spd["values"] == [0.56, 0.6, 0.66]
    assert spd["mean"] == pytest.approx(0.6066667)
    assert spd["standard_deviation"] == pytest.approx(stats.tstd([0.56, 0.6, 0.66]))
    assert result["arms"]["base"]["standard_deviation"] == pytest.approx(0, abs=1e-12)
    (difference,) = [one for one in result["comparisons"] if (one["before"], one["after"]) == ("base", "spd")]
    assert difference["mean"] == pytest.approx(0.2066667)
    assert difference["interval"] == pytest.approx(stats.t.interval(0.95, 2, 0.2066667, stats.sem([0.16, 0.2, 0.26])))


def test_the_table_shows_every_seed(tmp_path):
    folders = [run(tmp_path / str(seed), seed, spd=spd) for seed, spd in ((1, 84), (2, 90))]
    lines = seeds_text(over_seeds(folders)).splitlines()
    assert lines[0] == "arithmetic: 2 seeds (1, 2), n 150 each"
    assert any(line.split() == ["spd", "58.0", "sd", "2.8", "32.6", "to", "83.4", "56.0", "60.0"] for line in lines)
    assert any(line.split()[:4] == ["spd", "-", "base", "+18.0"] for line in lines)


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

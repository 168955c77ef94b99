import dataclasses
import re

import pytest
from answering import ARMS, answered_run, answers, sampled
from recording import Recorder

from spd_dist.analysis.report import Difference, read_report
from spd_dist.errors import DataError
from spd_dist.reports import figures
from spd_dist.reports.page import Questions, write_page
from spd_dist.reports.report_text import next_steps, report_text
from spd_dist.reports.run_report import Asked, log_report, write_report
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.artifacts import read_json, write_json
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.tracking.metrics import MetricLogger, read_metrics


@pytest.fixture
def run_folder(tmp_path):
    return answered_run(tmp_path)


def report_of(folder, arms=ARMS):
    return write_report(folder, arms, Asked("arithmetic", "accuracy", 1))


def test_the_report_on_disk_holds_every_number(run_folder):
    report = report_of(run_folder)
    assert read_report(run_folder) == report
    assert {arm: entry.value for arm, entry in report.arms.items()} == {"base": 0.4, "psr": 70 / 150, "spd": 0.6}
    assert [(one.before, one.after) for one in report.comparisons] == [
        ("base", "psr"), ("base", "spd"), ("psr", "spd"),
    ]  # fmt: skip
    assert report.cost["arms/psr/generate"].device_hours == 1.0
    assert set(report.stages) == {"project", "arms/psr/generate", "arms/psr/finetune"}
    assert report.cost["arms/psr/generate"].tokens == 1234
    assert report.artifacts["the adapter"] == "finetune/adapter"
    assert report.verdict.startswith("SPD against BASE: +20.0 points")


def test_a_notebook_shows_a_report_as_a_table_with_the_verdict_and_names_as_text(run_folder):
    report = report_of(run_folder)
    shown = dataclasses.replace(report, notes=["<script>alert(1)</script>"])._repr_html_()
    assert "<td>spd</td><td>0.600</td>" in shown
    assert report.verdict in shown
    assert "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>" in shown
    assert shown.count("<tr>") == 1 + len(ARMS)


def test_the_same_answers_give_the_same_report(run_folder):
    report_of(run_folder)
    first = (run_folder / "report.json").read_bytes()
    report_of(run_folder)
    assert (run_folder / "report.json").read_bytes() == first


def test_arms_that_answered_other_examples_make_no_report(run_folder):
    write_merged(answers_path(run_folder / "evaluate", "spd", "arithmetic"), answers(10, num=100))
    with pytest.raises(DataError, match="150 and 100 examples cannot be compared"):
        report_of(run_folder)
    assert not (run_folder / "report.json").exists()


def test_the_text_is_a_table_a_verdict_and_where_everything_is(run_folder):
    text = report_text(report_of(run_folder), run_folder)
    lines = text.splitlines()
    (row,) = [line for line in lines if line.split()[:1] == ["spd"]]
    arm, correct, low, _, high, num, difference, *_, ended, strict, lenient, tokens, loops = row.split()
    assert (arm, correct, num, difference) == ("spd", "60.0", "150", "+20.0")
    assert float(low) < 60 < float(high)
    assert (ended, strict, lenient, tokens, loops) == ("100", "100", "100", "20", "0")
    assert "SPD against BASE" in text
    assert "In short: SPD answers better than BASE on these 150 examples; other seeds may say otherwise." in text
    assert re.search(r"^Time: \d+ s \(project 9 s", text, re.MULTILINE)
    assert f"Report: {run_folder / 'report.html'}" in lines
    assert max(map(len, lines[:-1])) <= 100
    head, *commands = next_steps(run_folder).splitlines()
    assert re.fullmatch(r"Next, after `source .*/bin/activate`:", head)
    assert f"  python launchers/corpus.py show {run_folder} --num 3" in commands, "whole, to be copied"


def test_several_samples_make_a_table_of_pass_at_k(run_folder):
    for more, arm in enumerate(ARMS):
        rows = sampled([min(4, right + more) for right in (0, 1, 2, 3) * 10])
        write_merged(answers_path(run_folder / "evaluate", arm, "arithmetic"), rows)
    report = write_report(run_folder, ARMS, Asked("arithmetic", "accuracy", 1, 0.8))
    assert read_report(run_folder) == report
    lines = report_text(report, run_folder).splitlines()
    assert lines[0] == "arithmetic: 3 arms, 4 samples at temperature 0.8, seed 1"
    (row,) = [line.split() for line in lines if line.split()[:2] == ["base", "37.5"] and len(line.split()) == 4]
    assert row == ["base", "37.5", "58.3", "75.0"]
    write_page(run_folder, report, Questions({}))
    page = (run_folder / "report.html").read_text()
    assert "<td>base</td><td>37.5</td><td>58.3</td><td>75.0</td>" in page
    assert "Answers (4 samples at temperature 0.8) to the same 40 examples" in page
    assert 'class="right">spd 4/4' in page
    assert page.count("<details>") == 40
    with MetricLogger(run_folder / "metrics", mirror=Recorder()) as metrics:
        log_report(metrics, run_folder, report)


def test_what_a_likelihood_test_could_find_is_in_nats(run_folder):
    for shift, arm in enumerate(ARMS):
        rows = [dataclasses.replace(row, nll=2 + shift * (i % 3)) for i, row in enumerate(answers(10, num=150))]
        write_merged(answers_path(run_folder / "evaluate", arm, "codealpaca"), rows)
    text = report_text(write_report(run_folder, ARMS, Asked("codealpaca", "nll", 1)), run_folder, width=200)
    said = (
        "Smallest difference found in 4 runs of 5, each alone, before the correction, in nats a token: psr - base 0.189"
    )
    assert said in text


def test_what_a_test_could_find_is_said_to_be_of_each_alone_if_there_are_several(run_folder):
    """The correction for all comparisons makes it larger; one comparison has none."""
    several, one = report_of(run_folder), report_of(run_folder, {"base": "", "spd": ""})
    for report, is_said in ((several, True), (one, False)):
        write_page(run_folder, report, Questions({}))
        page = " ".join((run_folder / "report.html").read_text().split())
        text = report_text(report, run_folder, width=200)
        assert ("found in 4 runs of 5, each alone, before the correction, in points:" in text) is is_said
        assert ("show in four runs of five, each alone, before the correction. By" in page) is is_said
        assert "show in four runs of five" in page


def test_a_dot_is_filled_where_interval_and_correction_show_a_difference():
    """As the verdict says it: an interval without zero that does not survive the correction is hollow."""
    for p_holm, interval, is_shown in ((0.01, [0.1, 0.3], True), (0.2, [0.1, 0.3], False), (0.01, [-0.1, 0.3], False)):
        one = Difference(1.0, None, None, None, None, "base", "spd", 0.2, interval, 0.01, None, p_holm=p_holm)
        drawing = figures.forest([one], "accuracy")
        hollow, filled = (re.search(rf"<use [^>]*style=\"fill: {colour}", drawing) for colour in ("#ffffff", "#334455"))
        assert (filled is not None, hollow is not None) == (is_shown, not is_shown)


def test_a_report_of_before_its_side_comparisons_were_corrected_is_read(run_folder):
    arms = {"base": "", "base@evaluate.temperature=0.4": "", "spd": ""}
    for task in ("arithmetic", "mmlu"):
        for arm, num_correct in zip(arms, (60, 70, 90), strict=True):
            write_merged(answers_path(run_folder / "evaluate", arm, task), answers(num_correct, num=150))
    write_report(run_folder, arms, Asked("arithmetic", "accuracy", 1, also=(("mmlu", "accuracy"),)))
    old = read_json(run_folder / "report.json")
    for one in old["decode_controls"]:
        del one["p_holm"]
    for one in old["other_tasks"]:
        del one["p_holm"], one["p_value"]
    write_json(run_folder / "report.json", old)
    found = read_report(run_folder)
    assert [one.p_holm for one in found.decode_controls] == [None]
    assert [(one.p_value, one.p_holm) for one in found.other_tasks] == [(None, None)] * 3
    write_page(run_folder, found, Questions({}))


def test_the_page_shows_the_correction_of_other_tasks(run_folder):
    for arm, num_correct in zip(ARMS, (90, 89, 30), strict=True):
        write_merged(answers_path(run_folder / "evaluate", arm, "mmlu"), answers(num_correct, num=150))
    asked = Asked("arithmetic", "accuracy", 1, also=(("mmlu", "accuracy"),))
    report = write_report(run_folder, ARMS, asked)
    write_page(run_folder, report, Questions({}))
    page = (run_folder / "report.html").read_text()
    (psr,) = [one for one in report.other_tasks if one.arm == "psr"]
    assert (psr.p_value, psr.p_holm) == (1.0, 1.0)
    assert "p Holm: corrected for these 2 comparisons" in page
    assert re.search(r"<td>mmlu</td><td>psr</td>.*?<td>1</td></tr>", page, re.DOTALL)


def test_the_report_is_in_the_metrics_and_on_the_mirror(run_folder):
    mirror = Recorder()
    report = report_of(run_folder)
    with MetricLogger(run_folder / "metrics", mirror=mirror) as metrics:
        log_report(metrics, run_folder, report)
    (row,) = read_metrics(run_folder / "metrics")
    assert row["evaluate/spd_accuracy"] == 0.6
    assert row["evaluate/base_to_spd_difference"] == pytest.approx(0.2)
    shown = {name: (columns, rows) for name, columns, rows in mirror.tables}
    columns, rows = shown["evaluate/answers"]
    assert columns == ["id", "gold", "base", "psr", "spd"]
    assert rows[0] == ["p0", "4", "#### True", "#### True", "#### True"]
    assert [row[0] for row in shown["evaluate/arms"][1]] == list(ARMS)
    assert len(dict(mirror.histograms)["evaluate/spd_length_tokens"]) == report.arms["spd"].num_examples


def test_answers_that_other_code_judged_are_told_apart(run_folder):
    for arm, code in (("base", "spd_dist 1 (aaaa)"), ("psr", "spd_dist 2 (bbbb)"), ("spd", "spd_dist 2 (bbbb)")):
        file = answers_path(run_folder / "evaluate", arm, "arithmetic")
        write_merged(file, [dataclasses.replace(one, judged_by=code) for one in read_answers(file)])
    report = report_of(run_folder)
    assert report.judged_by == "spd_dist 1 (aaaa), spd_dist 2 (bbbb)"
    assert report.notes[-1] == (
        "Not all were judged by the same code: spd_dist 1 (aaaa) (answers of base); spd_dist 2 (bbbb) (answers of psr, "
        "spd). spd.py --restart-from evaluate, in each run, judges anew."
    )


def test_arms_that_are_never_right_are_a_hint_at_the_task(run_folder):
    assert not any("single right answer" in note for note in report_of(run_folder).notes)
    for arm in ARMS:
        file = answers_path(run_folder / "evaluate", arm, "arithmetic")
        wrong = {"correct": False, "strict_correct": False, "lenient_correct": False}
        write_merged(file, [dataclasses.replace(one, **wrong) for one in read_answers(file)])
    assert report_of(run_folder).notes[0].startswith("No arm has a single right answer: the task may be too hard, or")

"""The comparison of an experiment, as data and as a page."""

import dataclasses
import re

import pytest
from answering import ARMS, answered_run, answers
from browsing import CHROMIUM, screenshot, widths

from spd_dist.analysis.report import ExperimentReport, RunsTotal, StageTotal, read_report
from spd_dist.reports.experiment_report import read_experiment, total_cost, write_experiment
from spd_dist.reports.run_report import Asked, write_report
from spd_dist.reports.seeds import over_seeds
from spd_dist.storage.answers import answers_path
from spd_dist.storage.artifacts import read_json, write_json
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.storage.records import read_record
from spd_dist.tracking.metrics import MetricLogger

pytestmark = pytest.mark.seconds


@pytest.fixture
def places(tmp_path):
    """Three runs; under seed 2 spd has 96 of 150 right, else 90."""
    found = {}
    for seed in (1, 2, 3):
        run = answered_run(tmp_path / "e" / f"seed_{seed}")
        if seed == 2:
            write_merged(answers_path(run / "evaluate", "spd", "arithmetic"), answers(96, num=150))
        with MetricLogger(run / "metrics") as metrics:
            for step in range(1, 5):
                metrics.log("finetune", {"loss": seed / step}, step)
        write_report(run, ARMS, Asked("arithmetic", "accuracy", seed))
        found[seed] = [run]
    return found


def written(places):
    folder = places[1][0].parent
    return write_experiment(folder, places, {"p65": "How many <b>apples</b>?"}), (folder / "report.html").read_text()


def test_the_report_holds_every_seed_and_what_all_cost(places):
    report, _ = written(places)
    assert read_record(places[1][0].parent / "report.json", ExperimentReport) == report
    assert report.arms["spd"].values == [0.6, 0.64, 0.6]
    assert report.runs == {"1": "seed_1", "2": "seed_2", "3": "seed_3"}
    assert report.cost["arms/psr/generate"].device_hours == 3.0
    assert report.cost["arms/psr/generate"].tokens == 3 * 1234
    assert report.later_rounds == []
    assert report.losses["spd"] == {"steps": [1, 2, 3, 4], "losses": [2 / step for step in (1, 2, 3, 4)]}
    second = report.by_seed["2"]
    assert second.losses["spd"]["losses"] == [2 / step for step in (1, 2, 3, 4)]
    assert second.stages["project"]["sites"]["layers.1.key"]["spectrum"] == [4.0, 2.0, 1.0, 0.0]
    assert second.angles == {"sites": {}, "arms": {}}


def test_the_page_shows_what_arms_kept_of_other_domains(places):
    for seed, (run,) in places.items():
        for arm, num_correct in zip(ARMS, (90, 89, 30), strict=True):
            write_merged(answers_path(run / "evaluate", arm, "mmlu"), answers(num_correct, num=150))
        write_report(run, ARMS, Asked("arithmetic", "accuracy", seed, also=(("mmlu", "accuracy"),)))
    _, text = written(places)
    assert "<td>mmlu</td><td>spd</td><td>0.200</td>" in text
    assert "paired over the examples and seeds; intervals" in text


def test_the_page_shows_all_seeds_and_links_to_their_pages(places):
    _, text = written(places)
    assert "SPD, over 3 seeds and 150 examples, against BASE: +21.3 points" in text
    assert "<td>60.0</td><td>64.0</td>" in re.sub(r"\s+", "", text)
    gained = "<td>32.0</td><td>0.0</td><td>32.0</td><td>0.0</td><td>78.7</td>"
    assert gained in re.sub(r"\s+", "", text), "the means of 30, 36 and 30"
    assert '<a href="seed_2/report.html">seed 2</a>' in text
    assert "spd 1/3" in text, "an example that one seed had right"
    assert "How many &lt;b&gt;apples&lt;/b&gt;?" in text
    assert len(re.findall(r"<svg", text)) == 4
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?https?:", re.sub(r"xmlns(:\w+)?=\"[^\"]*\"", "", text))


def test_the_page_says_what_several_samples_show_over_seeds(places):
    _, text = written(places)
    shown = " ".join(text.split())
    assert "<h2>Samples together</h2>" in shown
    assert "Intervals: 95 %, of the examples and seeds." in shown
    assert "<td>spd - base</td><td>+0.000 (+0.000 to +0.000)</td>" in shown, "repetition"
    assert "in four of five cases, each alone, before the correction." in shown


def test_an_experiment_of_before_is_read_and_so_are_its_later_rounds(places):
    report, _ = written(places)
    file = places[1][0].parent / "report.json"
    assert read_experiment(file.parent) == report
    old = read_json(file)
    old["later_rounds"] = [{name: old[name] for name in vars(over_seeds([run for (run,) in places.values()]))}]
    for each in (old, *old["later_rounds"]):
        del each["decode_controls"]
        for one in (*each["comparisons"], *each["arms"].values()):
            one.pop("samples", None)
    write_json(file, old)
    found = read_experiment(file.parent)
    assert found.decode_controls == found.later_rounds[0].decode_controls == []
    assert [one.samples for one in (*found.comparisons, *found.later_rounds[0].arms.values())] == [{}] * 6


def test_the_page_has_the_decode_controls_over_seeds(places):
    arms = {"base": "", "base@evaluate.temperature=0.4": "", "spd": ""}
    for seed, (folder,) in places.items():
        write_merged(
            answers_path(folder / "evaluate", "base@evaluate.temperature=0.4", "arithmetic"), answers(70, num=150)
        )
        write_report(folder, arms, Asked("arithmetic", "accuracy", seed))
    report, text = written(places)
    (control,) = report.decode_controls
    assert control.sentence in text
    assert read_record(places[1][0].parent / "report.json", ExperimentReport) == report


def test_stages_that_a_run_took_over_cost_it_nothing(places):
    entry = StageTotal(5, 2.0, 2, 0.5, None, "2026-01-01")
    taken = StageTotal(None, 0.0, 1, 0.0, None, "2026-01-01")
    of_runs = [dataclasses.replace(read_report(places[1][0]), cost={"project": one}) for one in (entry, taken)]
    assert total_cost(of_runs)["project"] == RunsTotal(5, 2.0, 2, 0.5)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_phone_shows_the_page_without_scrolling_sideways(places, tmp_path):
    written(places)
    page = places[1][0].parent / "report.html"
    client, scroll = widths(page, 390, tmp_path)
    assert 370 <= client <= 390
    assert scroll <= client
    assert screenshot(page, 390, tmp_path).stat().st_size > 20_000


def test_the_plan_that_was_written_before_is_the_first_note(places):
    folder = places[1][0].parent
    report = write_experiment(folder, places, {}, "Planned before: done as planned.")
    assert report.notes[0] == "Planned before: done as planned."
    assert '<p class="note">Planned before: done as planned.</p>' in (folder / "report.html").read_text()

import dataclasses
import html
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from answering import ARMS, answered_run, answers
from browsing import CHROMIUM, screenshot, widths

from spd_dist.analysis.report import ArmInRound, Difference, RoundResult, read_report
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.overrides import load_config, to_yaml
from spd_dist.process.environment import environment
from spd_dist.reports.page import NUM_SHOWN, Questions, learned, side_by_side, write_page
from spd_dist.reports.run_report import Asked, write_report
from spd_dist.storage.answers import answers_path
from spd_dist.storage.artifacts import write_json
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.storage.records import KEY, SCHEMA, write_record
from spd_dist.storage.subspace_file import SiteDrift, save_subspace
from spd_dist.tracking.metrics import MetricLogger, mean_losses, training_losses
from spd_dist.types import Certificate, KVSite, LeakReport, SiteSubspace, Subspace


def page_of(folder):
    overlap = LeakReport("train", "test", num_rows=96, num_exact=2, num_near=1, leaks=())
    report = write_report(folder, ARMS, Asked("arithmetic", "accuracy", 1), [overlap])
    write_page(folder, report, Questions({"p65": "How many <b>apples</b>?"}))
    return (folder / "report.html").read_text()


@pytest.fixture
def folder(tmp_path):
    folder = answered_run(tmp_path)
    write_record(folder / "environment.json", environment(World(0, 1, torch.device("cpu"))))
    (folder / "config.yaml").write_text(to_yaml(load_config(overrides=["seed=1", "finetune.num_epochs=3"])))
    with MetricLogger(folder / "metrics") as metrics:
        for step in range(1, 9):
            metrics.log("finetune", {"loss": 2.0 / step, "grad_norm": 1.0}, step)
            metrics.labelled("psr").log("finetune", {"loss": 3.0 / step}, step)
    return folder


def test_the_page_holds_verdict_numbers_figures_costs_and_settings(folder):
    text = page_of(folder)
    assert "SPD against BASE: +20.0 points" in text
    assert "<td>60.0</td><td>52.0 to 67.5</td>" in text
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == 4
    assert all(ElementTree.fromstring(figure) is not None for figure in figures)
    assert "<td>arms/psr/generate</td><td>1,234</td><td>1800.0</td><td>2</td><td>1.000</td>" in text
    assert "<td>train</td><td>test</td><td>96</td><td>2</td><td>1</td>" in text
    assert "2 exact and 1 near copies of test problems" in text
    assert '<td>finetune.num_epochs</td><td class="text">5</td><td class="text">3</td>' in text
    assert "<td>finetune.learning_rate</td>" not in text


def test_the_page_needs_no_network(folder):
    text = re.sub(r"xmlns(:\w+)?=\"[^\"]*\"", "", page_of(folder))
    assert re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#)[^\s\"'#)]+", text) == []


def test_what_models_and_data_say_is_shown_and_never_run(folder):
    rows = answers(150, num=150)
    hostile = '<script>alert("x")</script>'
    write_merged(
        answers_path(folder / "evaluate", "base", "arithmetic"),
        [*rows[:-1], type(rows[0])(**vars(rows[-1]) | {"output": hostile})],
    )
    text = page_of(folder)
    assert "<script" not in text
    assert html.escape(hostile, quote=True).replace("&quot;", "&#34;") in text
    assert "How many &lt;b&gt;apples&lt;/b&gt;?" in text


def test_examples_on_which_arms_differ_come_first():
    examples = side_by_side([{"base": answers(10, num=30), "spd": answers(20, num=30)}], {})
    assert [example.id for example in examples[:10]] == [f"p{index}" for index in range(10, 20)]
    assert {example.kind for example in examples[10:]} == {"same"}


def test_answers_that_are_not_to_the_same_examples_are_refused():
    match = r"the answers of spd and base are not to the same examples \(p29 is of one alone\): .* delete evaluate/ARM"
    with pytest.raises(DataError, match=match):
        side_by_side([{"base": answers(10, num=30), "spd": answers(20, num=29)}], {})


@pytest.mark.seconds
def test_a_large_test_set_does_not_make_a_large_page(folder):
    for arm in ARMS:
        write_merged(answers_path(folder / "evaluate", arm, "arithmetic"), answers(1000, num=2000))
    text = page_of(folder)
    assert text.count("<details>") == NUM_SHOWN
    assert f"{NUM_SHOWN} of 2000 examples" in text


@pytest.mark.seconds
def test_the_same_numbers_give_the_same_page(folder):
    assert page_of(folder) == page_of(folder)


def test_a_step_that_was_done_again_counts_once(folder):
    with MetricLogger(folder / "metrics") as metrics:
        metrics.log("finetune", {"loss": 0.125, "epoch_loss": 9.0}, 8)
    losses = training_losses(folder)
    assert set(losses) == {"psr", "spd"}
    assert losses["spd"]["steps"] == list(range(1, 9))
    assert losses["spd"]["losses"][-1] == 0.125


def test_what_an_earlier_config_left_is_no_part_of_the_report(tmp_path):
    """An arm that is not asked any more, iterations beyond the last, steps of a longer training; and a poor match."""

    def left(stage, summary):
        (tmp_path / stage).mkdir(parents=True, exist_ok=True)
        write_json(
            tmp_path / stage / ("match.json" if stage.endswith("match") else "summary.json"), {KEY: SCHEMA, **summary}
        )

    answered_run(tmp_path)
    with MetricLogger(tmp_path / "metrics") as metrics:
        for name in ("psr_loss", "dropped_loss", "psr_iteration1_loss", "psr_iteration2_loss"):
            for step in range(1, 9):
                metrics.log("finetune", {name: 1.0}, step)
    for stage in ("arms/psr/finetune", "arms/dropped/finetune", "arms/psr_iteration1/finetune", "finetune"):
        left(stage, {"num_steps": 3, "num_targets": 5, "epochs": []})
    left("arms/psr_iteration2/finetune", {"num_steps": 3, "num_targets": 5, "epochs": []})
    left("arms/psr/match", {"share": 1.0, "kl": 0.038, "random_kl": 0.021, "is_matched": False, "num_rows": 32})
    made = {"base": ["base"], "psr": ["psr_iteration1", "psr"]}
    arms = {name: ARMS[name] for name in made}
    report = write_report(tmp_path, arms, Asked("arithmetic", "accuracy", 1, made=made))
    assert report.iterations == {"psr": ["psr_iteration1", "psr"]}
    dropped = {"finetune", "arms/dropped/finetune", "arms/psr_iteration2/finetune"}
    assert report.stages.keys() >= {"arms/psr/finetune", "arms/psr_iteration1/finetune", "arms/psr/match"}
    assert not dropped & report.stages.keys()
    assert {arm: one["steps"] for arm, one in report.losses.items()} == {name: [1, 2, 3] for name in made["psr"]}
    assert [row.arm for row in learned(report)] == made["psr"]
    assert any("PSR is NOT at equal KL: it keeps 1.00 of its projection, KL 0.0210" in note for note in report.notes)


def test_losses_of_seeds_are_averaged_at_the_steps_that_all_did():
    one = {"spd": {"steps": [1, 2, 3], "losses": [4.0, 2.0, 1.0]}, "psr": {"steps": [1], "losses": [5.0]}}
    two = {"spd": {"steps": [2, 3], "losses": [4.0, 2.0]}}
    assert mean_losses([one, two]) == {"spd": {"steps": [2, 3], "losses": [3.0, 1.5]}}


def subspaces(folder):
    """That of spd holds the first two and the last two of four directions, psr's the first two at both sites."""
    key, value = (KVSite(1, kind, f"{kind}_proj", ((0, 4),)) for kind in ("key", "value"))
    first, last = (
        SiteSubspace(basis_DR, torch.ones(4, dtype=torch.float64), 1.0, Certificate())
        for basis_DR in torch.eye(4).split(2, 1)
    )
    for stage, sites in {"project": {key: first, value: last}, "arms/psr/project": {key: first, value: first}}.items():
        save_subspace(folder / stage / "subspace.safetensors", Subspace(sites))


@pytest.mark.seconds
def test_angles_and_losses_are_in_the_report_and_the_page_draws_them_from_there(folder):
    subspaces(folder)
    text = page_of(folder)
    report = read_report(folder)
    assert report.angles == {
        "sites": {"layers.1.key and layers.1.value": [90.0, 90.0]},
        "arms": {"psr, layers.1.key": [0.0, 0.0], "psr, layers.1.value": [90.0, 90.0]},
    }
    assert report.losses["psr"] == {"steps": list(range(1, 9)), "losses": [3.0 / step for step in range(1, 9)]}
    for title in ("Training", "Principal angles between sites", "Principal angles between arms"):
        assert f"<h2>{title}</h2>" in text
    write_page(folder, dataclasses.replace(report, losses={}, angles={"sites": {}, "arms": {}}), Questions({}))
    assert "<h2>Training</h2>" not in (folder / "report.html").read_text()
    assert "Principal angles" not in (folder / "report.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.seconds
def test_a_browser_shows_the_page_without_scrolling_sideways(folder, tmp_path, width):
    page_of(folder)
    client, scroll = widths(folder / "report.html", width, tmp_path)
    assert width - 20 <= client <= width
    assert scroll <= client
    assert screenshot(folder / "report.html", width, tmp_path).stat().st_size > 20_000


def test_rounds_are_a_table_and_a_figure(folder):
    site = SiteDrift(
        [1.0], mean_angle_degrees=4.5, largest_angle_degrees=20.0, overlap_fraction=0.9, energy_ratio=0.8,
        energy_fraction_before=0.8, energy_fraction=0.75, energy_fraction_held=0.7,
    )  # fmt: skip
    report = write_report(folder, ARMS, Asked("arithmetic", "accuracy", 1))
    arms = {arm: ArmInRound(0.5, [0.4, 0.6]) for arm in ARMS}
    one = RoundResult(1, "run", "", arms, energy_fraction={"layers.1.key": 0.8}, drift={})
    two = dataclasses.replace(one, round=2, drift={"1": {"layers.1.key": site}})
    write_page(folder, dataclasses.replace(report, rounds=[one, two], progress=report.comparisons), Questions({}))
    text = (folder / "report.html").read_text()
    assert "<th>round 2</th>" in text
    assert "<td>layers.1.key</td><td>4.5</td><td>20.0</td>" in text
    assert "Subspace over rounds" in text


def test_the_page_runs_nothing_and_shows_letters_that_would_turn_or_cut_what_it_says(folder):
    """A question of a data set, with a NUL, a right-to-left override, half a surrogate pair and a script."""
    write_report(folder, ARMS, Asked("arithmetic", "accuracy", 1), [])
    hostile = "a\0b \u202egnp.exe \ud800 <script>alert(1)</script>"
    write_page(folder, read_report(folder), Questions({"p65": hostile}))
    text = (folder / "report.html").read_text()
    assert "a[U+0000]b [U+202E]gnp.exe [U+D800] &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not set(text) & {"\0", "\u202e"}
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)[1]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script" not in policy


@pytest.mark.parametrize("label", ["$x^{$", "$\\frac$", "cost $5 of $9", "half \ud800 of a pair", "\0 and \u202e"])
def test_labels_of_figures_are_text(label):
    """Names of arms and settings: no mathematics, and no letter that SVG cannot hold."""
    from spd_dist.reports import figures

    comparison = Difference(1.0, None, None, None, None, "base", label, 0.1, [0.0, 0.2], 0.5, None)
    drawing = figures.forest([comparison], "accuracy")
    assert ElementTree.fromstring(drawing) is not None
    assert all(part in html.unescape(drawing) for part in label.split() if part.isprintable())

import html
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from answering import ARMS, answered_run, answers
from browsing import CHROMIUM, screenshot, widths

from spd_dist.overrides import load_config, to_yaml
from spd_dist.runtime.answers import answers_path, write_merged
from spd_dist.runtime.metrics import MetricLogger
from spd_dist.runtime.page import write_page
from spd_dist.runtime.page.figures import angles
from spd_dist.runtime.page.page import NUM_SHOWN, side_by_side
from spd_dist.runtime.report import write_report
from spd_dist.runtime.training_log import training_losses
from spd_dist.types import Certificate, KVSite, SiteSubspace


def page_of(folder):
    overlap = {"split": "train", "other": "test", "num_rows": 96, "num_exact": 2, "num_near": 1}
    report = write_report(folder, ARMS, task="arithmetic", metric="accuracy", seed=1, overlaps=[overlap])
    write_page(folder, report, {"p65": "How many <b>apples</b>?"})
    return (folder / "report.html").read_text()


@pytest.fixture
def folder(tmp_path):
    folder = answered_run(tmp_path)
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
    assert [example["id"] for example in examples[:10]] == [f"p{index}" for index in range(10, 20)]
    assert {example["kind"] for example in examples[10:]} == {"same"}


def test_a_large_test_set_does_not_make_a_large_page(folder):
    for arm in ARMS:
        write_merged(answers_path(folder / "evaluate", arm, "arithmetic"), answers(1000, num=2000))
    text = page_of(folder)
    assert text.count("<details>") == NUM_SHOWN
    assert f"{NUM_SHOWN} of 2000 examples" in text


def test_the_same_numbers_give_the_same_page(folder):
    assert page_of(folder) == page_of(folder)


def test_a_step_that_was_done_again_counts_once(folder):
    with MetricLogger(folder / "metrics") as metrics:
        metrics.log("finetune", {"loss": 0.125, "epoch_loss": 9.0}, 8)
    losses = training_losses(folder)
    assert set(losses) == {"psr", "spd"}
    assert list(losses["spd"]) == list(range(1, 9))
    assert losses["spd"][8] == 0.125


def test_principal_angles_are_drawn_where_there_is_a_pair():
    eye_DD = torch.eye(4)
    parts = {"key": eye_DD[:, :2], "value": eye_DD[:, 2:]}
    sites = {
        KVSite(1, kind, f"{kind}_proj", ((0, 4),)): SiteSubspace(basis_DR, torch.ones(4), 1.0, Certificate())
        for kind, basis_DR in parts.items()
    }
    key, value = sites.values()
    drawing = angles("angles", {"apart": (key, value), "same": (key, key)})
    assert ElementTree.fromstring(drawing) is not None
    assert angles("angles", {}) is None


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_scrolling_sideways(folder, tmp_path, width):
    page_of(folder)
    client, scroll = widths(folder / "report.html", width, tmp_path)
    assert width - 20 <= client <= width
    assert scroll <= client
    assert screenshot(folder / "report.html", width, tmp_path).stat().st_size > 20_000


def test_rounds_are_a_table_and_a_figure(folder):
    site = {"mean_angle_degrees": 4.5, "largest_angle_degrees": 20.0, "overlap_fraction": 0.9, "energy_ratio": 0.8}
    site |= {"energy_fraction_held": 0.7, "energy_fraction": 0.75}
    report = write_report(folder, ARMS, task="arithmetic", metric="accuracy", seed=1)
    arms = {arm: {"value": 0.5, "interval": [0.4, 0.6]} for arm in ARMS}
    one = {"round": 1, "arms": arms, "drift": {}, "energy_fraction": {"layers.1.key": 0.8}}
    two = one | {"round": 2, "drift": {"1": {"layers.1.key": site}}}
    write_page(folder, report | {"rounds": [one, two], "progress": report["comparisons"]}, {})
    text = (folder / "report.html").read_text()
    assert "<th>round 2</th>" in text
    assert "<td>layers.1.key</td><td>4.5</td><td>20.0</td>" in text
    assert "Subspace over rounds" in text

"""The completions of `report.html`: what the page holds, by its data; and what a browser makes of it."""

import base64
import dataclasses
import hashlib
import html
import json
import re
from pathlib import Path

import pytest
import torch
from answering import ARMS, answered_run, answers
from browsing import CHROMIUM, axe_source, look

from spd_dist.analysis.mechanism_verdict import MatchedPair, MechanismDetails, VariantSummary
from spd_dist.analysis.report import read_report
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.launch.write_report import main
from spd_dist.overrides import load_config, to_yaml
from spd_dist.process.environment import environment
from spd_dist.reports import browser as browsers
from spd_dist.reports.difference import difference_of
from spd_dist.reports.page import Questions, write_page
from spd_dist.reports.run_report import Asked, write_report
from spd_dist.storage.answers import answers_path, effects_path, read_answers
from spd_dist.storage.completions import to_text
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.storage.records import write_record
from spd_dist.storage.subspace_file import save_subspace
from spd_dist.types import Certificate, Completion, KVSite, SiteSubspace, Subspace, TokenEffects

pytestmark = pytest.mark.seconds

HOSTILE = "a\0b \u202egnp \ud800 </script><script>alert(1)</script> <!-- \u2028 &amp;"
SHOWN = "a[U+0000]b [U+202E]gnp [U+D800] </script><script>alert(1)</script> <!-- \u2028 &amp;"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def written(folder, num=6, coloured=2, text="Seven, as 3 + 4 = 7."):
    """What spd and psr wrote, and the first tokens scored."""
    for arm, place in (("spd", "generate"), ("psr", "arms/psr/generate")):
        rows = [Completion(f"p{i}", 0, 0, (1,), (2, 3, 4), f"{arm} {i}: {text}", "stop") for i in range(num)]
        (folder / place / "completions").mkdir(parents=True, exist_ok=True)
        to_text(rows, folder / place / "completions" / "completions.jsonl")
        effects = [
            TokenEffects(f"p{i}", 0, (f"{arm} {i}:", f" {text}", "<|im_end|>"), (1.25, 4.0, 0.5), (1.0, 0.5, 2.5))
            for i in range(coloured)
        ]
        (folder / "token_effects").mkdir(exist_ok=True)
        write_merged(effects_path(folder / "token_effects", arm), effects)


def page_of(folder, prompts=None, **options):
    report = write_report(folder, ARMS, Asked("arithmetic", "accuracy", 1))
    prompts = {f"p{i}": f"How many? {i}" for i in range(20_000)} if prompts is None else prompts
    return write_page(folder, report, Questions({}, lambda: prompts), **options)


@pytest.fixture
def folder(tmp_path):
    folder = answered_run(tmp_path / "run")
    write_record(folder / "environment.json", environment(World(0, 1, torch.device("cpu"))))
    (folder / "config.yaml").write_text(to_yaml(load_config(overrides=["seed=1", "data.num_train=6"])))
    written(folder)
    return folder


def data_of(page):
    """Head and rows, as the page's script reads them: an element ends at the first `</script`."""
    found = re.findall(r'<script type="application/json" id="completions-(\w+)">(.*?)</script', page.read_text(), re.S)
    blocks = [json.loads(text) for _, text in found]
    return blocks[0], [row for block in blocks[1:] for row in block]


def test_the_page_holds_what_each_arm_wrote_and_what_the_projection_changes_at_each_token(folder):
    head, rows = data_of(page_of(folder))
    assert head["arms"] == ["psr", "spd"]
    assert head["keys"] == [[f"p{i}", 0] for i in range(6)]
    assert head["coloured"] == [0, 1]
    assert rows[1]["question"] == "How many? 1"
    assert rows[1]["arms"][1] == {
        "num_tokens": 3, "finish_reason": "stop", "pieces": ["spd 1:", " Seven, as 3 + 4 = 7.", "<|im_end|>"],
        "base": [1250, 4000, 500], "change": [250, 3500, -2000],
    }  # fmt: skip
    assert rows[5]["arms"][0] == {"num_tokens": 3, "finish_reason": "stop", "text": "psr 5: Seven, as 3 + 4 = 7."}
    assert "All 6 prompts and samples" in page_of(folder).read_text()


def test_only_the_pages_own_script_may_run(folder):
    text = page_of(folder).read_text()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"; script-src 'sha256-{digest}'")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert set(re.findall(r"<script[^>]*>", text)) == {"<script>"} | {
        f'<script type="application/json" id="completions-{name}">' for name in ("head", "0")
    }
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("):
        assert word not in script


def test_a_text_can_neither_end_its_element_nor_turn_what_is_shown(folder):
    written(folder, text=HOSTILE)
    page = page_of(folder, {"p0": HOSTILE})
    _, rows = data_of(page)
    assert rows[0]["question"] == SHOWN
    assert rows[0]["arms"][1]["pieces"][1] == f" {SHOWN}"
    assert rows[5]["arms"][1]["text"] == f"spd 5: {SHOWN}"
    assert not set(page.read_text()) & {"\0", "\u202e", "\ud800"}


def test_of_more_than_a_page_holds_it_has_a_sample_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(browsers, "MOST_COMPLETIONS", 40)
    written(folder, num=100, coloured=3)
    page = page_of(folder)
    head, rows = data_of(page)
    assert len(rows) == len(head["keys"]) == 22, "the coloured three, and twenty evenly spread, one of them coloured"
    assert [key for key, _ in head["keys"]][:5] == ["p0", "p1", "p2", "p5", "p10"]
    assert "22 of 100 prompts and samples, evenly spread: a page holds no more" in page.read_text()
    monkeypatch.setattr(browsers, "MOST_CHARACTERS", 100)
    assert len(data_of(page_of(folder))[1]) < 6, "long ones are fewer"


def test_arms_that_wrote_to_other_prompts_have_gaps_and_a_run_without_completions_has_no_script(folder):
    other = [Completion("q1", 0, 0, (1,), (2,), "alone", "stop")]
    to_text(other, folder / "arms/psr/generate/completions/completions.jsonl")
    head, rows = data_of(page_of(folder))
    assert head["keys"] == [["q1", 0]]
    assert rows[0]["arms"][1] is None
    for place in ("generate", "arms/psr/generate"):
        (folder / place / "completions" / "completions.jsonl").unlink()
    assert "<script" not in page_of(folder).read_text()


def details():
    variant = VariantSummary(
        comparison="primary", prompt="task", name="spd", kind="spd", share=1.0, num_rows=4, effect=-0.5,
        interval=(-0.7, -0.3), solution_effect=0.1, log_odds_change=None, kl=0.2, kl_prompt=None, kl_solution=None,
        kl_answer=None, entropy_change=0.0, leakage=0.0,
    )  # fmt: skip
    pair = MatchedPair("random_000", "neither", 1.0, 0.2, 0.2, -0.5, -0.1, -0.4, (-0.6, -0.2), True)
    return MechanismDetails(
        schema_version=1, sentence="", task="arithmetic", model="tiny", prompt="task", kinds="key", operator="hard",
        rank={"layers.1.key": 4}, base_nll=2.0, variants=[variant], matches=[pair], explored=[],
    )  # fmt: skip


def test_the_curves_of_the_mechanism_test_stand_in_the_report_once_it_is_done(folder):
    assert "Mechanism:" not in page_of(folder).read_text()
    write_record(folder / "mechanism" / "details.json", details())
    text = page_of(folder).read_text()
    assert "<h2>Mechanism: effect against distortion</h2>" in text
    assert "<h2>Mechanism: at equal distortion</h2>" in text


@pytest.fixture
def other(folder, tmp_path):
    """A run of fewer arms, in which spd has 75 right and not 90."""
    other = answered_run(tmp_path / "other")
    write_record(other / "environment.json", environment(World(0, 1, torch.device("cpu"))))
    (other / "config.yaml").write_text(to_yaml(load_config(overrides=["seed=1", "finetune.num_epochs=2"])))
    write_merged(answers_path(other / "evaluate", "spd", "arithmetic"), answers(75, num=150))
    written(other, num=4, coloured=1, text="Eight.")
    write_report(other, {arm: ARMS[arm] for arm in ("base", "spd")}, Asked("arithmetic", "accuracy", 1))
    return other


def test_two_runs_are_compared_example_by_example_with_what_both_wrote(folder, other):
    page = page_of(folder, against=other)
    text = page.read_text()
    row = re.search(r"<tr><td>spd</td><td>50.0</td><td>60.0</td><td>(.*?)</tr>", text, re.S)[1]
    assert row.startswith("+10.0</td><td>+")
    assert "<td>15</td><td>0</td>" in row
    assert "Only in this run: psr." in text
    assert '<td>finetune.num_epochs</td><td class="text">2</td><td class="text">5</td>' in text
    head, rows = data_of(page)
    assert head["arms"] == ["psr", "spd", "spd of other"]
    assert rows[0]["arms"][2]["pieces"][1] == " Eight."
    assert rows[5]["arms"][2] is None


def test_runs_of_other_examples_or_of_no_common_arm_are_refused(folder, other):
    write_report(other, {"psr": "plain"}, Asked("arithmetic", "accuracy", 1))
    with pytest.raises(DataError, match=r"no arm is in both runs: it has psr, and .* has base; name a run"):
        write_page(folder, only_base(folder), Questions({}), against=other)
    for arm in ARMS:
        write_merged(answers_path(other / "evaluate", arm, "arithmetic"), answers(3, num=10))
    write_report(other, ARMS, Asked("arithmetic", "accuracy", 1))
    with pytest.raises(DataError, match=r"other: its examples is .*; compare runs of one data.task"):
        page_of(folder, against=other)


def test_other_problems_under_the_same_ids_and_answers_drawn_otherwise_are_refused(folder, other):
    page_of(folder)
    report, files = read_report(folder), [answers_path(other / "evaluate", arm, "arithmetic") for arm in ARMS]
    hot = dataclasses.replace(report, temperature=0.8)
    with pytest.raises(DataError, match=r"its temperature is 0.0, and that of .* is 0.8; compare runs of"):
        difference_of(folder, hot, other)
    for file in files:
        write_merged(file, [dataclasses.replace(one, gold="11") for one in read_answers(file)])
    write_report(other, ARMS, Asked("arithmetic", "accuracy", 1))
    with pytest.raises(DataError, match=r"other: its examples is"):
        difference_of(folder, report, other)


def test_a_report_of_other_answers_than_there_are_is_not_shown(folder, other):
    page_of(folder)
    report, file = read_report(folder), answers_path(folder / "evaluate", "spd", "arithmetic")
    write_merged(file, [dataclasses.replace(one, num_tokens=one.num_tokens + 1) for one in read_answers(file)])
    with pytest.raises(DataError, match=r"report.json is of other answers of spd than there are now; start the run's"):
        write_page(folder, report, Questions({}))
    with pytest.raises(DataError, match=r"report.json is of other answers of spd"):
        difference_of(other, read_report(other), folder)


def only_base(folder):
    page_of(folder)
    report = read_report(folder)
    return dataclasses.replace(report, arms={"base": report.arms["base"]})


def test_the_launcher_writes_the_page_again_beside_another_run(folder, other, tmp_path, capsys):
    page_of(folder).unlink()
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "Against" not in (folder / "report.html").read_text()
    assert main([str(folder), "--against", str(other), "--out", str(tmp_path / "d.html")]) == 0
    assert "<h2>Against other</h2>" in (tmp_path / "d.html").read_text()
    assert main([str(tmp_path / "none")]) == 3
    assert f"error: {tmp_path / 'none' / 'report.json'} is missing" in capsys.readouterr().err


def test_the_lines_of_the_docs_run_as_they_stand(folder, monkeypatch, capsys):
    page = Path("docs/report.md").read_text()
    effects, shown = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    page_of(folder)
    (folder.parent / "runs").mkdir()
    folder.rename(folder.parent / "runs" / "quickstart")
    monkeypatch.chdir(folder.parent)
    site = KVSite(1, "key", "k_proj", ((0, 4),))
    part = SiteSubspace(torch.eye(4)[:, :2], torch.ones(4, dtype=torch.float64), 0.5, Certificate())
    save_subspace(Path("runs/quickstart/project/subspace.safetensors"), Subspace({site: part}))
    exec(effects, {})
    exec(shown, {})
    assert capsys.readouterr().out == "".join(f"p{i} ' Seven, as 3 + 4 = 7.' 3.5\n" for i in range(2))


KEYS = """
const press = (key, target) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const shown = document.getElementById("completions-shown");
const place = document.getElementById("completions-place");
const number = document.getElementById("completions-number");
const seen = [];
const note = () => seen.push(`${number.value} ${place.textContent}`);
note();
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home", "x"]) { press(key, shown); note(); }
const box = document.getElementById("completions-coloured");
box.click();
note();
document.getElementById("completions-after").click();
note();
press("ArrowRight", number);
note();
press("End", shown);
note();
const find = document.getElementById("completions-find");
find.value = "P3";
find.dispatchEvent(new Event("input"));
note();
find.value = "nothing";
find.dispatchEvent(new Event("input"));
note();
find.value = "";
find.dispatchEvent(new Event("input"));
shown.focus();
const tokens = [...shown.querySelectorAll("pre span")].map((one) => [one.textContent, one.className]);
const outline = getComputedStyle(shown).outlineStyle;
const frame = document.documentElement;
say({seen, tokens, outline, fits: frame.scrollWidth <= frame.clientWidth,
     paper: getComputedStyle(document.body).backgroundColor});
"""


@needs_browser
@pytest.mark.parametrize(("width", "is_dark"), [(1280, False), (400, True)])
def test_keys_and_buttons_go_through_the_completions_without_an_error(folder, tmp_path, width, is_dark):
    written(folder, text=HOSTILE)
    seen = look(page_of(folder), tmp_path, width, KEYS, is_dark=is_dark)
    assert seen.console == []
    steps = ["1 of 2: p0", "2 of 2: p1", "2 of 2: p1", "1 of 2: p0", "2 of 2: p1", "1 of 2: p0", "1 of 2: p0"]
    more = ["1 of 6: p0", "2 of 6: p1", "2 of 6: p1", "6 of 6: p5", "1 of 1: p3"]
    assert seen.said["seen"][:12] == [*steps, *more]
    assert seen.said["seen"][12].endswith(" none of this id")
    assert seen.said["tokens"][3:] == [["spd 0:", "up1"], [f" {SHOWN}", "up4"], ["<|im_end|>", "down3"]]
    assert seen.said["outline"] == "solid", "focus is seen"
    assert seen.said["fits"], "nothing scrolls sideways but tables"
    assert seen.said["paper"] == ("rgb(20, 23, 29)" if is_dark else "rgb(255, 255, 255)")


@needs_browser
def test_a_fault_of_a_script_and_one_that_the_policy_refuses_would_be_seen(folder, tmp_path):
    broken = "const image = document.createElement('img'); image.src = 'https://example.org/a.png'; say(1); none();"
    console = look(page_of(folder), tmp_path, 1280, broken).console
    assert any("none is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


@needs_browser
def test_ten_thousand_completions_are_read_when_they_are_looked_at(folder, tmp_path):
    written(folder, num=5000, text="word " * 100)
    page = page_of(folder)
    assert len(data_of(page)[1]) == 5000
    seen = look(page, tmp_path, 1280, "say(document.getElementById('completions-place').textContent);")
    assert (seen.console, seen.said) == ([], "of 2: p0")
    assert seen.num_elements < 5000, "rows are no elements until they are shown"


AXE = """
say(axe.run(document, {resultTypes: ["violations"]}).then((found) => found.violations
  .filter((one) => ["serious", "critical"].includes(one.impact))
  .map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 160)).join(" | ")}`)));
"""


@pytest.mark.slow
@needs_browser
@pytest.mark.skipif(axe_source() is None, reason="needs axe-core: make test-slow brings it")
@pytest.mark.parametrize(("width", "is_dark"), [(1280, False), (400, False), (1280, True)])
def test_axe_finds_nothing_serious(folder, other, tmp_path, width, is_dark):
    write_record(folder / "mechanism" / "details.json", details())
    seen = look(page_of(folder, against=other), tmp_path, width, axe_source(), AXE, is_dark=is_dark)
    assert seen.said == []

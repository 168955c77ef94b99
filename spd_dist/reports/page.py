"""`report.html`: a comparison of arms as one page that needs no network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from spd_dist.analysis.answer_summary import manner, samples_by_id
from spd_dist.analysis.mechanism_verdict import MechanismDetails
from spd_dist.analysis.report import ExperimentReport, Report, SeedDetails
from spd_dist.config import Config
from spd_dist.errors import DataError
from spd_dist.reports import figures
from spd_dist.reports.browser import browser, corpus_of, written_by
from spd_dist.reports.difference import difference_of
from spd_dist.reports.mechanism_page import drawings, template_of
from spd_dist.reports.seeds import answers_of
from spd_dist.storage.artifacts import write_text
from spd_dist.storage.records import read_record
from spd_dist.storage.run_folder import read_config, read_environment
from spd_dist.storage.settings import settings_by_key
from spd_dist.storage.tables import column_of, num_tokens_of
from spd_dist.types import Answer


def render(template: str, report: Report | ExperimentReport, run_folder: Path, shown: Mapping[str, Any]) -> str:
    """A page of `report` and of what else is `shown`, with settings and machine of the run in the folder."""
    is_nll = report.metric == "nll"
    everywhere = {
        "report": report,
        "manner": manner(report.temperature, report.num_samples),
        "differing": config_diff(run_folder),
        "environment": read_environment(run_folder),
        "percent": lambda value: f"{100 * value:.1f}",
        "signed": lambda value: f"{value:+.3f}" if is_nll else f"{100 * value:+.1f}",
        "value": lambda value: f"{value:.3f}" if is_nll else f"{100 * value:.1f}",
    }
    return template_of(template).render({**shown, **everywhere})


class PageFigure(NamedTuple):
    """A figure of a page."""

    title: str
    sentence: str
    """What to see in it."""
    svg: Markup | None
    """None where there is nothing to draw."""


def drawn(title: str, sentence: str, drawing: str | None) -> PageFigure:
    """A figure with its title and what to see in it."""
    return PageFigure(title, sentence, Markup(drawing) if drawing else None)


def config_diff(run_folder: Path) -> list[tuple[str, Any, Any]]:
    """Key, default and value of every setting that is not the default."""
    file = run_folder / "config.yaml"
    if not file.exists():
        return []
    ours = settings_by_key(read_config(file))
    default = settings_by_key(dataclasses.asdict(Config()))
    keys = sorted(ours.keys() | default.keys())
    return [(key, default.get(key), ours.get(key)) for key in keys if ours.get(key) != default.get(key)]


NUM_SHOWN = 200
"""Examples on a page; those on which arms differ come first."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a run's rows ask, by their ids."""

    test: Mapping[str, str]
    train: Callable[[], Mapping[str, str]] = dict
    """Gives them to who writes the page: there may be a million."""


def write_page(
    run_folder: Path, report: Report, questions: Questions, *, against: Path | None = None, out: Path | None = None
) -> Path:
    """Write `report.html` beside `report.json`: figures, tables, completions and answers inside; nothing is loaded.

    With `against`, another run's folder, the two are compared; `out` is the file, if it is to stand elsewhere.

    Raises:
        DataError: an artifact that the page shows is corrupt, or the two runs cannot be compared.
    """
    answers = answers_of(run_folder, report)
    found = [
        *drawn_comparisons(report, {arm: [lengths_of(rows)] for arm, rows in answers.items()}),
        *_drawn_training(run_folder, report),
        *drawn_subspaces(report),
        *_drawn_mechanism(run_folder / "mechanism" / "details.json"),
    ]
    columns, difference = written_by(run_folder, report.arms, iterations=report.iterations), None
    if against is not None:
        difference = difference_of(run_folder, report, against)
        columns += written_by(against, difference.both, difference.other)
    shown = {
        "title": f"{report.task}, seed {report.seed}: {len(report.arms)} arms",
        "figures": [one for one in found if one.svg],
        "examples": side_by_side([answers], questions.test)[:NUM_SHOWN],
        "num_examples": next(iter(report.arms.values())).num_examples,
        "num_seeds": 1,
        "learned": learned(report),
        "browser": browser(columns, questions.train() if columns else {}),
        "difference": difference,
    }
    file = run_folder / "report.html" if out is None else out
    write_text(file, render("page.html.j2", report, run_folder, shown))
    return file


class AnsweredExample(NamedTuple):
    """An example with all arms' first answers under the first seed, and how often each arm was right over all."""

    id: str
    question: str
    gold: str
    kind: str
    differs: tuple[int, bool]
    num_right: Mapping[str, int]
    answers: Mapping[str, Answer]


def side_by_side(
    by_seed: Sequence[Mapping[str, Sequence[Answer]]], questions: Mapping[str, str]
) -> list[AnsweredExample]:
    """Every example: those come first on which arms differ most in being right, then those of other words.

    Raises:
        DataError: the arms answered other examples.
    """
    examples = []
    grouped = [{arm: samples_by_id(rows) for arm, rows in answers.items()} for answers in by_seed]
    first, *others = [(arm, found.keys()) for each in grouped for arm, found in each.items()]
    for arm, found in others:
        if other := sorted(first[1] ^ found):
            raise DataError(
                f"the answers of {arm} and {first[0]} are not to the same examples ({other[0]} is of one alone): a "
                "file was changed; delete evaluate/ARM of the one that is wrong and start the same command again"
            )
    for key in next(iter(grouped[0].values())):
        rows = [samples[key][0] for samples in grouped[0].values()]
        right = {arm: sum(one.correct for each in grouped for one in each[arm][key]) for arm in grouped[0]}
        differs = max(right.values()) - min(right.values()), len({row.output for row in rows}) > 1
        kind = "right and wrong" if differs[0] else "other words" if differs[1] else "same"
        answers = dict(zip(by_seed[0], rows, strict=True))
        examples.append(AnsweredExample(key, questions.get(key, ""), rows[0].gold, kind, differs, right, answers))
    return sorted(examples, key=lambda example: example.differs, reverse=True)


def lengths_of(answers: Sequence[Answer]) -> figures.Lengths:
    """Of answers: tokens, and whether each ended by itself."""
    return [(answer.num_tokens, answer.finish_reason == "stop") for answer in answers]


def drawn_comparisons(
    report: Report | ExperimentReport, lengths: Mapping[str, Sequence[figures.Lengths]]
) -> list[PageFigure]:
    """The forest of differences, and the lengths of each arm's answers over all seeds."""
    pooled = {arm: [one for rows in seeds for one in rows] for arm, seeds in lengths.items()}
    sentence = "A model that only learned to stop shows it here."
    found = [drawn("Answers: lengths and endings", sentence, figures.lengths("lengths", pooled))]
    if report.comparisons:
        sentence = "Same examples, 95 % intervals; a hollow dot is a difference that is not shown."
        drawing = figures.forest(report.comparisons, report.metric)
        return [drawn("Paired differences", sentence, drawing), *found]
    return found


def _drawn_training(run_folder: Path, report: Report) -> list[PageFigure]:
    corpora = {}
    for arm in report.arms:
        corpus = corpus_of(run_folder, report.iterations.get(arm, [arm]))
        if corpus is not None:
            ends = (reason == "stop" for reason in column_of(corpus, "finish_reason"))
            corpora[arm] = list(zip(num_tokens_of(corpus, "tokens").tolist(), ends, strict=True))
    found = []
    if corpora:
        sentence = "All that was written for each student: it ends as often as what it learns from does."
        found.append(drawn("Completions: lengths and endings", sentence, figures.lengths("corpora", corpora)))
    drawing = figures.curves(report.losses)
    return [*found, drawn("Training", "Loss of each student on its own corpus.", drawing)]


def _drawn_mechanism(file: Path) -> list[PageFigure]:
    """The curves of the mechanism test, if it was done."""
    if not file.exists():
        return []
    details = read_record(file, MechanismDetails)
    return [drawn(f"Mechanism: {title.lower()}", words, drawing) for title, words, drawing in drawings(details)]


def drawn_subspaces(report: Report | SeedDetails) -> list[PageFigure]:
    """Spectra, energies and principal angles of one run: between sites, between arms, between rounds."""
    found = []
    if "project" in report.stages:
        sentence = "Spectrum of the gradients at each site, and how much of it the subspace keeps."
        found.append(drawn("Capability subspace", sentence, figures.spectra(report.stages["project"])))
    sentence = "90 degrees: nothing in common; 0: a shared direction."
    drawing = figures.angles("angles", report.angles["sites"])
    found.append(drawn("Principal angles between sites", sentence, drawing))
    sentence = "Of the arms that have a subspace of their own, against that of spd."
    found.append(drawn("Principal angles between arms", sentence, figures.angles("arms", report.angles["arms"])))
    if report.rounds is not None:
        sentence = "How far the gradients moved from the subspace of the first round; means over the sites."
        found.append(drawn("Subspace over rounds", sentence, figures.rounds(report.rounds)))
    return found


class Learned(NamedTuple):
    """What a student learned from, and how; the summaries as the stages wrote them."""

    arm: str
    corpus: Mapping[str, Any]
    """Empty where it wrote none of its own."""
    student: Mapping[str, Any]
    losses: list[float]
    """Of the first epoch, and of the last."""


def learned(report: Report) -> list[Learned]:
    """One row an arm that trained, or an iteration: its corpus, steps and losses, as far as there are summaries."""
    rows = []
    for arm in (each for whole in report.arms for each in report.iterations.get(whole, [whole])):
        prefix = "" if arm == "spd" else f"arms/{arm}/"
        corpus, student = (report.stages.get(f"{prefix}{verb}", {}) for verb in ("generate", "finetune"))
        if student:
            epochs = student["epochs"]
            losses = [epochs[0]["loss"], epochs[-1]["loss"]] if epochs else []
            rows.append(Learned(arm, corpus, student, losses))
    return rows

"""The end of a run: what all arms answered, summed up and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spd_dist.analysis.answer_summary import AnswersSummary, answers_summary
from spd_dist.analysis.report import read_report
from spd_dist.arms import Arm, chosen, iterations_of
from spd_dist.data.sources import check_leaks, published_size
from spd_dist.data.tasks.protocol import Task
from spd_dist.distributed.uneven_work import on_main
from spd_dist.reports.page import Questions, write_page
from spd_dist.reports.report_text import report_text
from spd_dist.reports.run_report import Asked, log_report, write_report
from spd_dist.run import Run
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.manifests import why_not_complete
from spd_dist.storage.records import write_record
from spd_dist.tracking.stage_outputs import report_product, show_cost


@dataclass(frozen=True)
class EvaluateSummary:
    """`evaluate/summary.json`."""

    arms: Mapping[str, Mapping[str, AnswersSummary]]
    """By arm, and task."""


def report(run: Run, arms: Sequence[Arm]) -> str:
    """Write the comparison of the arms, as data and as a page; the text for a terminal is given on every rank."""
    config, folder, task = run.config, run.folder.path, run.task
    sentences = {arm.name: arm.sentence for arm in arms}
    questions = questions_of(run, arms)
    others = [run.other_test(word)[0] for word in config.evaluate.also]
    sum_up_answers(run, sentences)

    def write() -> str:
        shared = check_leaks(task, config.data, num_calibration=config.calibrate.num_examples)
        size = published_size(task, config.data)
        also = tuple((one.name, one.metric) for one in others)
        made = {arm.name: [one.made_as for one in iterations_of(arm, run.config_of(arm))] for arm in arms}
        asked = Asked(task.name, task.metric, config.seed, config.evaluate.temperature, also, size, made)
        found = write_report(folder, sentences, asked, shared)
        write_page(folder, found, questions)
        log_report(run.metrics, folder, found)
        show_cost(run.metrics, found.cost)
        run.metrics.product(report_product(folder, found), is_input=False)
        return report_text(found, folder)

    return on_main("writing the report", write)


def questions_of(run: Run, arms: Iterable[Arm]) -> Questions:
    """What a run's rows ask: of the test set, and of the training prompts if an arm writes to them. A collective."""
    rows = run.rows("train") if any(arm.writes for arm in arms) else []
    asked = {row["id"]: run.task.prompt(row) for row in run.rows("test")}
    return Questions(asked, lambda: {row["id"]: run.task.prompt(row) for row in rows})


def renew_page(run: Run) -> None:
    """Write the page again, if there is a report: with what was measured since. A collective."""
    folder = run.folder.path
    if on_main("looking for a report", (folder / "report.json").exists):
        questions = questions_of(run, chosen(run.config.evaluate.arms))
        on_main("writing the page", lambda: write_page(folder, read_report(folder), questions))


def sum_up_answers(run: Run, arms: Iterable[str]) -> None:
    """Write `evaluate/summary.json` and the manifest of the whole stage, unless they are of these answers."""
    answers = {arm: run.folder.output_hash(f"evaluate/{arm}") for arm in arms}
    folder, others = run.folder.folder("evaluate"), run.config.evaluate.also
    tasks = [run.task, *(run.other_test(word)[0] for word in others)]
    if on_main("checking evaluate", lambda: why_not_complete(folder, answers)) is None:
        return

    def write() -> None:
        def summed(arm: str, task: Task) -> AnswersSummary:
            return answers_summary(read_answers(answers_path(folder, arm, task.name)), task.metric)

        found = {arm: {task.name: summed(arm, task) for task in tasks} for arm in answers}
        write_record(folder / "summary.json", EvaluateSummary(found))

    on_main("writing the summary of the answers", write)
    run.folder.finish("evaluate", answers, ["summary.json", *answers], seconds=0.0)

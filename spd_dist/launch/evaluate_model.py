"""Evaluate a model by itself: `python launchers/evaluate.py MODEL --tasks gsm8k mbpp [section.key=value ...]`.

MODEL is what model.name takes: a hub name, a folder, a GGUF file. Also by deepspeed, torchrun or srun, on any number of
ranks. A task is a name or a YAML file, or NAME=SOURCE with the test rows' own source (data.test); several with spaces
or commas. After --tasks, a word whose part before `=` begins with a section or key of the config (data.num_test=5) is
an override, any other a task. In the folder (--out) are every answer, in TASK/evaluate/model/TASK.jsonl, and all
numbers, in summary.json; start the same command again to go on where it stopped. Programs run in a sandbox, and only
with evaluate.allow_code_execution=true. Answers are greedy; evaluate.num_samples=8 evaluate.temperature=0.8 samples
several an example, for pass@k.

`--judge FILE.jsonl --task NAME [--json OUT]` judges outputs that are there already, without a model: a line of the file
is {"row": {...}, "output": "..."}, the row as in the task's data file, and so many lines come out, in the same order:
{"correct": ..., "strict": ..., "extracted": ..., "reason": ...}.

With --lm-eval EleutherAI's harness answers instead, where the package lm_eval is installed, with its own prompts and
rows.
Exit codes: 0 done, 2 the config is wrong, 3 the data or the model is wrong, 75 stopped on request, 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spd_dist.config import Config
from spd_dist.data.tasks import find_task
from spd_dist.errors import ConfigError
from spd_dist.launch import launcher
from spd_dist.launch.run_method import begin, on_every_rank
from spd_dist.overrides import load_config
from spd_dist.process.environment import make_room

if TYPE_CHECKING:
    from spd_dist.distributed.world import World
    from spd_dist.runs.standalone_eval import StandaloneSummary, TaskSummary

DEFAULTS = ("metrics.wandb=disabled",)
CONFIG_KEYS = frozenset(field.name for field in dataclasses.fields(Config))
TASK_FILES = (".yaml", ".yml")
HARNESS_NAMES = {"math": "hendrycks_math"}
NOT_IN_THE_HARNESS = ("arithmetic", "svamp", "codealpaca")
"""Where it has a task of that name, it is another one."""


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse, check, evaluate, and turn the outcome into an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = parse_arguments(words)
    if arguments.judge is not None:
        return judge(arguments)
    tasks = named_tasks(arguments.tasks)
    out = arguments.out or default_folder(arguments.model, arguments.adapter)
    own = [f"model.name={arguments.model}", f"run_dir={out}"]
    config = load_config(arguments.config, [*DEFAULTS, *arguments.overrides, *own])
    if arguments.lm_eval:
        return subprocess.run(harness_command(config, tasks, arguments.adapter), check=False).returncode
    for name in tasks:
        find_task(name, "--tasks")
    signals = begin()

    def work(world: World) -> str:
        from spd_dist.runs.standalone_eval import evaluate_alone

        summary = evaluate_alone(config, tasks, adapter=arguments.adapter, world=world, signals=signals)
        return table(summary, config.run_dir)

    return on_every_rank(config, work)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--local_rank` is what the deepspeed launcher adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for spd.py")
    parser.add_argument("--tasks", nargs="+", action="extend", metavar="TASK", help="names, YAML files, or NAME=SOURCE")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter, put beside the weights")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="runs/evaluate/MODEL if not given")
    parser.add_argument("--config", nargs=1, action="extend", default=[], metavar="YAML", help="later files win")
    parser.add_argument("--lm-eval", action="store_true", help="let EleutherAI's harness do it, as a cross-check")
    parser.add_argument("--judge", metavar="FILE", help="judge these outputs, a line a row and its output; no MODEL")
    parser.add_argument("--task", metavar="NAME", help="with --judge: the task of its rows")
    parser.add_argument("--json", type=Path, metavar="OUT", help="with --judge: where the judgements go, else printed")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(words)
    given = arguments.tasks or []  # argparse gives --tasks every word that follows it
    arguments.overrides += filter(is_override, given)
    if arguments.judge is None:
        if arguments.model is None or arguments.tasks is None:
            parser.error("the following arguments are required: MODEL, --tasks (or --judge FILE --task NAME)")
        if arguments.task is not None or arguments.json is not None:
            parser.error("--task and --json go with --judge; to evaluate a model give --tasks and --out")
    else:
        if arguments.task is None or arguments.tasks is not None:
            parser.error("--judge takes one --task NAME, and no --tasks")
        if arguments.adapter is not None or arguments.out is not None or arguments.lm_eval:
            parser.error(
                "--judge starts no model: leave --adapter, --out and --lm-eval out, and give --json for a file"
            )
        arguments.overrides = [*filter(None, [arguments.model]), *arguments.overrides]
    arguments.tasks = [word for word in given if not is_override(word)]
    return arguments


def judge(arguments: argparse.Namespace) -> int:
    """Judge a file of outputs; the exit code."""
    make_room(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--judge: it takes one process; start this file by python, not by deepspeed or torchrun")
    config = load_config(arguments.config, [*DEFAULTS, *arguments.overrides, f"data.task={arguments.task}"])
    from spd_dist.judging import able_to_judge, judge_file, write_judgements

    task = able_to_judge(find_task(config.data.task), allowed=config.evaluate.allow_code_execution)
    print(write_judgements(judge_file(arguments.judge, task, config.data), arguments.json), flush=True)
    return 0


def is_override(word: str) -> bool:
    """Whether `word` sets a key of the config; `data.yaml=rows.jsonl` is a task with its source."""
    key, equals, _ = word.partition("=")
    return bool(equals) and key.partition(".")[0] in CONFIG_KEYS and not key.endswith(TASK_FILES)


def named_tasks(words: Sequence[str]) -> dict[str, str | None]:
    """The tasks, each with its source or None.

    Raises:
        ConfigError: none is named, or one twice.
    """
    parts = [part.partition("=") for word in words for part in word.split(",") if part.strip()]
    tasks = {name.strip(): source.strip() or None for name, _, source in parts}
    if len(tasks) != len(parts) or not tasks:
        raise ConfigError(f"--tasks: {' '.join(words)!r} names no task, or one twice; give names as in gsm8k mbpp")
    return tasks


def default_folder(model: str, adapter: Path | None) -> Path:
    """One folder a model and adapter."""
    names = [model.removeprefix("package:"), *([] if adapter is None else [str(adapter.resolve())])]
    return Path("runs/evaluate") / "+".join(name.strip("/").replace("/", "_") for name in names)


def table(summary: StandaloneSummary, folder: str) -> str:
    """One row a task, for a terminal.

    `ended` are the answers that the model ended by itself, `strict` and `lenient` those that a result could be
    extracted from, and `loops` those that repeat themselves.
    """
    from rich import box
    from rich.table import Table

    from spd_dist.analysis.answer_summary import manner
    from spd_dist.reports.report_text import pass_table
    from spd_dist.tracking.console import TextConsole

    named = summary.model if summary.adapter is None else f"{summary.model} with {summary.adapter}"
    console = TextConsole()
    num_samples = max(one.num_samples for one in summary.tasks.values())
    console.print(f"{named}: {manner(summary.temperature, num_samples)}", soft_wrap=True)
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("task")
    for name in ("metric", "value", "95 %\ninterval", "n", "ended\n%", "strict\n%", "lenient\n%", "tokens", "loops\n%"):
        found.add_column(name, justify="right", no_wrap=True)
    for task, one in summary.tasks.items():
        numbers = [one.value, *one.interval]
        value, low, high = (f"{x:.3f}" if one.metric == "nll" else f"{100 * x:.1f}" for x in numbers)
        shares = (one.ended_fraction, one.strict_extraction_fraction, one.lenient_extraction_fraction)
        found.add_row(
            task, "nll" if one.metric == "nll" else "right %", value, f"{low} to {high}", number_of(one),
            *(f"{100 * share:.0f}" for share in shares), f"{one.mean_tokens:.0f}",
            f"{100 * one.repetition_fraction:.0f}",
        )  # fmt: skip
    console.print(found)
    if num_samples > 1:
        console.print(pass_table(summary.tasks))
    console.print(f"Files: {folder}/summary.json, and every answer in {folder}/TASK/evaluate/model/", soft_wrap=True)
    return console.text()


def number_of(one: TaskSummary) -> str:
    """How many examples were answered, and of how many, if that is not all of the published split."""
    num, size = one.num_examples, one.test_size
    return str(num) if size in (None, num) else f"{num} of {size}"


def harness_command(config: Config, tasks: Mapping[str, str | None], adapter: Path | None) -> list[str]:
    """What runs the harness on the same model and tasks.

    Raises:
        ConfigError: it is not installed, this is one of many ranks, or it can't do what is asked for.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval: the package lm_eval is not installed; pip install 'lm_eval[hf]', or drop --lm-eval"
        )
    if config.evaluate.temperature > 0:
        raise ConfigError(
            f"--lm-eval: evaluate.temperature: {config.evaluate.temperature} is not for the harness, which decodes as "
            "its tasks say; leave it out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--lm-eval: it takes one process; start this file by python, not by deepspeed or torchrun")
    check_for_harness(config, tasks)
    model = {"pretrained": model_folder(config), "dtype": config.model.dtype, "revision": config.model.revision}
    model |= {"peft": adapter, "trust_remote_code": config.model.trust_remote_code or None}
    for name, value in model.items():
        if "," in str(value):
            raise ConfigError(f"--lm-eval: {name}: {str(value)!r} holds a comma, which ends a setting of the harness")
    words = {
        "--model": "hf",
        "--model_args": ",".join(f"{name}={value}" for name, value in model.items() if value is not None),
        "--tasks": ",".join(HARNESS_NAMES.get(task, task) for task in tasks),
        "--batch_size": str(config.evaluate.batch_size),
        "--gen_kwargs": f"max_gen_toks={config.evaluate.max_new_tokens}",
        "--output_path": str(Path(config.run_dir) / "lm_eval"),
        "--seed": str(config.seed),
    }
    if config.data.num_test is not None:
        words["--limit"] = str(config.data.num_test)
    if config.data.system is not None:
        words["--system_instruction"] = config.data.system
    flags = ["--log_samples", *(["--apply_chat_template"] if config.data.template == "chat" else [])]
    return [sys.executable, "-m", "lm_eval", *(word for pair in words.items() for word in pair), *flags]


def check_for_harness(config: Config, tasks: Mapping[str, str | None]) -> None:
    """Refuse what the harness would leave out without a word: it has rows, prompts and tasks of its own.

    Raises:
        ConfigError: a task that it has not, or a setting that does not reach it.
    """
    for task, source in tasks.items():
        if task in NOT_IN_THE_HARNESS or task.endswith(TASK_FILES):
            raise ConfigError(f"--lm-eval: the harness has no task that is our {task}; name others, as gsm8k mmlu")
        if task.startswith(("mbpp", "humaneval")):
            raise ConfigError(
                f"--lm-eval: the harness would run the programs of {task} outside of a sandbox; leave that task out"
            )
        if source is not None:
            raise ConfigError(
                f"--lm-eval: {task}={source}: the harness reads its own rows; write {task}, or drop --lm-eval"
            )
    for key, value in {"test": config.data.test, "template_options": config.data.template_options or None}.items():
        if value is not None:
            raise ConfigError(
                f"--lm-eval: data.{key}: {value!r} does not reach the harness; leave it out, or drop --lm-eval"
            )


def model_folder(config: Config) -> str:
    """What transformers can load: a GGUF file as the folder that it is converted into."""
    from spd_dist.models.gguf import converted, find_gguf

    gguf = find_gguf(config.model.name)
    return config.model.name if gguf is None else str(converted(gguf, config.model.cache_dir))

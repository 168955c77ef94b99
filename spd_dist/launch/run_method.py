"""Run Self-Policy Distillation: `deepspeed launchers/spd.py --config configs/NAME.yaml [section.key=value ...]`.

Also by torchrun, by srun (one task a rank), or alone. Start the same command again to go on where a run stopped.
Exit codes: 0 done, 2 the config is wrong, 3 the data or the model is wrong, 75 stopped on request, 1 anything else.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import locale
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from spd_dist.config import STAGES, Config
from spd_dist.data.tasks import check_tasks
from spd_dist.errors import ConfigError, DataError, UserError, writing
from spd_dist.launch import at_least, launcher, own_rank
from spd_dist.overrides import load_config, split_words, to_yaml
from spd_dist.process.environment import home_of, make_room, where_files_go
from spd_dist.process.launcher_watchdog import watch_launchers
from spd_dist.process.signals import StopSignals
from spd_dist.redaction import redacted

if TYPE_CHECKING:
    from spd_dist.distributed.world import World

SECONDS_FOR_THE_CAUSE = 5
"""A rank that fails since another one did ends this much later: the launcher takes the exit code of the first."""
NOTHING_GIVEN = (
    "no config and no setting is given: try --config package:quickstart, which brings its model; or name your own, as "
    "in model.name=FOLDER_OR_HUB_NAME data.task=TASK; --show-config prints every setting, --help the options"
)


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse, check the config, run, and turn the outcome into an exit code."""
    return from_command_line(parser(), start, words)


MECHANISM = """\
Does the subspace carry correctness? `deepspeed launchers/mechanism.py --config configs/NAME.yaml [key=value ...]`.

Scores gold answers of held-out rows under the capability subspace and under controls; nothing is sampled or trained.
It calibrates first where the run folder has no subspace. Start the same command again to go on where it stopped.
Exit codes: 0 done, 2 the config is wrong, 3 the data or the model is wrong, 75 stopped on request, 1 anything else.
"""


@launcher
def measure(words: Sequence[str] | None = None) -> int:
    """The mechanism test alone: parse, check the config, measure, and turn the outcome into an exit code."""
    parser = argparse.ArgumentParser(description=MECHANISM, formatter_class=argparse.RawDescriptionHelpFormatter)
    return from_command_line(parser, measure_alone, words)


def measure_alone(config: Config, arguments: argparse.Namespace, signals: StopSignals) -> int:
    """Score gold answers under the subspace and under controls."""

    def work(world: World) -> str:
        from spd_dist.mechanism.mechanism_stage import measure_mechanism

        return measure_mechanism(config, world, signals)

    return on_every_rank(config, work)


def start(config: Config, arguments: argparse.Namespace, signals: StopSignals) -> int:
    """Preview, or run.

    Raises:
        ConfigError: `--restart-from` does not fit the rest.
    """
    check_restart(config, arguments)
    if arguments.preview_masks or arguments.preview_scoring:
        return preview(config, arguments)
    return run(config, arguments, signals)


def begin() -> StopSignals:
    """Before any library is imported: heed requests to stop, end with the launcher, and have folders to write to."""
    signals = StopSignals()
    signals.install()
    watch_launchers(os.environ, signals.is_interrupted)
    make_room(os.environ)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # our own lines say how far a stage is
    return signals


def from_command_line(
    parser: argparse.ArgumentParser,
    work: Callable[[Config, argparse.Namespace, StopSignals], int],
    words: Sequence[str] | None,
) -> int:
    """Read a run's config off the command line, and do `work` with it, or show it; the exit code.

    `parser` has the options that the launcher has for its own.

    Raises:
        UserError: what the user can put right.
    """
    signals = begin()
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="YAML", help="later files win")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over every file")
    parser.add_argument("--show-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    arguments = parser.parse_intermixed_args(words)
    given = arguments.config + arguments.overrides
    if not given and not arguments.show_config:
        raise ConfigError(NOTHING_GIVEN)
    config = load_config(*split_words(given))
    if arguments.show_config:
        print(to_yaml(config), end="")
        return 0
    check_tasks(config)
    return work(config, arguments, signals)


def parser() -> argparse.ArgumentParser:
    """The options of a run beside those that every launcher of a config has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="first", choices=STAGES, default=STAGES[0], help="stages before it are complete")
    parser.add_argument(
        "--restart-from", choices=STAGES, default="", metavar="STAGE",
        help="do this stage and all later ones again, under this config; what they made is moved to RUN_DIR/replaced",
    )  # fmt: skip
    parser.add_argument("--until", dest="last", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    for option, shown in (
        ("--preview-masks", "examples, kept tokens marked"),
        ("--preview-scoring", "test rows, their references judged"),
    ):
        parser.add_argument(option, type=at_least(1), metavar="N", help=f"print N {shown}, and exit")
    return parser


def check_restart(config: Config, arguments: argparse.Namespace) -> None:
    """See that `--restart-from` names a stage that this command does, alone in its folder.

    Raises:
        ConfigError: it does not.
    """
    stage = arguments.restart_from
    if stage and not STAGES.index(arguments.first) <= STAGES.index(stage) <= STAGES.index(arguments.last):
        raise ConfigError(
            f"--restart-from {stage}: not among the stages from {arguments.first} to {arguments.last} that this "
            "command does; change --from or --until"
        )
    if stage and config.generate.num_tasks > 1:
        raise ConfigError(
            f"--restart-from {stage}: with generate.num_tasks={config.generate.num_tasks} each task of the array would "
            "move what the others made; restart once with generate.num_tasks=1, then start the array"
        )


def preview(config: Config, arguments: argparse.Namespace) -> int:
    """Show which tokens the mask keeps, or how test rows are judged; on a terminal in colour."""
    from rich.console import Console

    from spd_dist.data.masking import preview_masks
    from spd_dist.data.sources import load_rows
    from spd_dist.data.tasks import find_task
    from spd_dist.judging import preview_scoring
    from spd_dist.models.policy import load_tokenizer

    console, task, tokenizer = Console(), find_task(config.data.task), load_tokenizer(config.model)
    if arguments.preview_masks:
        rows = load_rows(task, "calibration", config.data)[: arguments.preview_masks]
        shown = preview_masks(rows, task, tokenizer, config.data, config.calibrate, colour=console.is_terminal)
    else:
        rows = load_rows(task, "test", config.data)[: arguments.preview_scoring]
        shown = preview_scoring(rows, task, tokenizer, config)
    for text in shown:
        console.print(text, soft_wrap=True)
    return 0


def run(config: Config, arguments: argparse.Namespace, signals: StopSignals) -> int:
    """Run the stages."""
    from spd_dist.arms import Scope
    from spd_dist.mechanism.mechanism_stage import check, measure_mechanism
    from spd_dist.reports.report_text import next_steps
    from spd_dist.runs.rounds import folders, run_rounds
    from spd_dist.storage.restart import restart

    is_measured = config.mechanism.in_run and arguments.last == STAGES[-1]

    def work(world: World) -> str:
        if is_measured:
            check(config)
        if arguments.restart_from:
            restart(Path(config.run_dir), arguments.restart_from, dataclasses.asdict(config))
        text = run_rounds(config, world, signals, Scope(arguments.first, arguments.last))
        if arguments.last != STAGES[-1]:
            return text
        if is_measured:
            try:
                text += f"\n\n{measure_mechanism(config, world, signals)}"
            except (ConfigError, DataError) as error:  # the run itself is done, and all that it wrote stays good
                text += f"\n\nThe mechanism test was not done: {error}"
        return f"{text}\n{next_steps(folders(config)[-1])}"

    return on_every_rank(config, work)


def on_every_rank(config: Config, work: Callable[[World], str]) -> int:
    """Join the other ranks and print what `work` gives; every failure ends all ranks, and none waits for ever."""
    from spd_dist.distributed.heartbeat import brief
    from spd_dist.distributed.world import join_world, leave_world
    from spd_dist.tracking.console import set_up_logging

    set_up_logging(own_rank())
    encoding = codecs.lookup(locale.getpreferredencoding(do_setlocale=False)).name
    if encoding != "utf-8":  # DeepSpeed reads its own files by it
        raise ConfigError(f"LC_ALL: files are read as {encoding} here; set PYTHONUTF8=1, or LC_ALL=C.UTF-8")
    if home_of(os.environ) is None:
        logging.getLogger("spd_dist").info(where_files_go(os.environ))
    try:
        world = join_world(config.distributed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    try:
        with writing():  # wherever a disk breaks, it is one sentence
            summary = work(world)
    except UserError as error:
        if world.is_main or not error.is_shared:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not error.is_shared:
            end_now(error.exit_code)  # the others are inside a collective: only a closed connection reaches them
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001 - printed, and no rank may be left waiting for this one
        print(redacted(brief(error) or traceback.format_exc()), file=sys.stderr, flush=True)
        time.sleep(SECONDS_FOR_THE_CAUSE if world.size > 1 else 0)
        end_now(1)
    else:
        if world.is_main:
            print(summary, flush=True)
        code = 0
    leave_world()
    return code


def end_now(code: int) -> NoReturn:
    """Leave without a word to the other ranks: closing the process group could wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

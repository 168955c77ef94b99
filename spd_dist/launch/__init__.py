"""Every launcher by its name: `spd NAME [ARGUMENTS]` is `launchers/NAME.py [ARGUMENTS]` (`spd run` is `spd.py`).

On several ranks: `deepspeed --module spd_dist.launch NAME [ARGUMENTS]`.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from spd_dist.errors import UserError
from spd_dist.redaction import redacted

LAUNCHERS = {
    "run": "run_method:main",
    "experiment": "run_experiment:main",
    "mechanism": "run_method:measure",
    "evaluate": "evaluate_model:main",
    "compare": "compare:main",
    "report": "write_report:main",
    "corpus": "show_corpus:main",
    "export": "export_policy:main",
    "push": "push_product:main",
    "plan": "plan_run:main",
    "doctor": "doctor:main",
    "dashboard": "wandb_tools:dashboard",
    "submit": "submit:main",
    "sweep": "sweep:main",
    "wandb_sync": "wandb_tools:sync",
}
"""Name of a launcher -> the module of this package, and the function in it, as entry points are written."""


class Main(Protocol):
    """Words of a command line, those of this process if not given -> exit code."""

    def __call__(self, words: Sequence[str] | None = None) -> int:
        """Do what the words ask for."""
        ...


def own_rank() -> int:
    """This process among all, as a launcher or SLURM says, before they have met."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def launcher(work: Callable[[Sequence[str] | None], int]) -> Main:
    """A launcher's `main`: what the user can put right is one line on rank 0's stderr, and the error's exit code."""

    @functools.wraps(work)
    def main_of(words: Sequence[str] | None = None) -> int:
        hide_secrets()
        say_where_native_code_crashes()
        try:
            return work(words)
        except UserError as error:
            if own_rank() == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            return error.exit_code

    return main_of


def at_least(smallest: float, kind: Callable[[str], float] = int) -> Callable[[str], Any]:
    """The type of an option that is a number: one that is none, or smaller, ends with exit code 2 and a sentence."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not smallest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; it must be {smallest:g} or more")
        return value

    return number


def hide_secrets() -> None:
    """From now on, a fault of ours is printed as Python does, but without what is secret in it."""
    sys.excepthook = _without_secrets


def say_where_native_code_crashes() -> None:
    """From now on SIGSEGV, SIGABRT and their kin print each thread's Python calls: a launcher tells only the number."""
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, RuntimeError):  # stderr is closed, or no file
            faulthandler.enable()


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the launcher that the first word names; gives its exit code.

    Args:
        arguments: The words of the command line; those of this process if not given. A `--local_rank` before the name,
            as deepspeed's launcher puts it there, is left out: ranks are read from the environment.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    while words and words[0].startswith("--local_rank"):
        del words[: 1 if "=" in words[0] else 2]
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nNames: {', '.join(LAUNCHERS)}; `spd NAME --help` says more.")
        return 0 if words else 2
    name = words[0].replace("-", "_")
    if name not in LAUNCHERS:
        print(f"error: {words[0]}: no launcher has this name; choose one of {', '.join(LAUNCHERS)}", file=sys.stderr)
        return 2
    sys.argv = [f"spd {words[0]}", *words[1:]]
    module, _, function = LAUNCHERS[name].partition(":")
    return vars(importlib.import_module(f"spd_dist.launch.{module}"))[function]()

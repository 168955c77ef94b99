"""Messages for people: one line each, with the rank that says it; live bars where a person watches a terminal."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from spd_dist.redaction import redacted


class TerminalHandler(logging.Handler):
    """Prints messages on a terminal, above whatever bars are there."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message as it is."""
        self.console.print(self.format(record), markup=False, highlight=False, emoji=False, soft_wrap=True)


def terminal() -> Console | None:
    """The terminal that messages go to, if it can draw; None in a log file, a pipe, and on all ranks but the first."""
    handlers = logging.getLogger("spd_dist").handlers
    return next((handler.console for handler in handlers if isinstance(handler, TerminalHandler)), None)


def message_handler() -> logging.Handler:
    """Where messages of the first rank go: to a terminal that can draw, else line by line to stderr."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalHandler(console)
    return logging.StreamHandler(sys.stderr)


class Bars:
    """A bar for the present stage and one for the whole run; nothing where there is no terminal."""

    def __init__(self, console: Console | None) -> None:
        columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[words]}"))
        self.are_drawn = console is not None
        """Whether there is somebody to look at them."""
        self._bars = Progress(*columns, console=console, transient=True, disable=not self.are_drawn)
        self._stage = self._bars.add_task("", total=None, words="")
        self._run = self._bars.add_task("run", total=None, words="")
        self.start, self.stop = self._bars.start, self._bars.stop

    def show(self, stage: str, done: int, total: int | None, words: str) -> None:
        """Draw how far the stage is."""
        self._bars.update(self._stage, description=stage, completed=done, total=total, words=words)

    def show_run(self, seconds: float, seconds_left: float | None, words: str) -> None:
        """Draw how far the run is; without an end while that is not known."""
        total = None if seconds_left is None else seconds + seconds_left
        self._bars.update(self._run, completed=seconds, total=total, words=words)


class TextConsole(Console):
    """Renders for a string, without colours."""

    def __init__(self, width: int = 100) -> None:
        self.written = io.StringIO()
        super().__init__(file=self.written, width=width, color_system=None, highlight=False)

    def text(self) -> str:
        """What was printed, without white space at the ends of lines."""
        return "\n".join(line.rstrip() for line in self.written.getvalue().splitlines())


class Discreet(logging.Formatter):
    """Lines without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a message, with its traceback if it has one."""
        return redacted(super().format(record))


def set_up_logging(rank: int, stream: TextIO | None = None) -> None:
    """Send `spd_dist` messages to `stream` (stderr): all of rank 0, warnings of the others; libraries only warn.

    What libraries say of later versions of themselves is for us to read, in the tests, and not for users.
    """
    handler = message_handler() if stream is None and rank == 0 else logging.StreamHandler(stream or sys.stderr)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch|deepspeed|transformers|peft|accelerate")
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(Discreet(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    ours = logging.getLogger("spd_dist")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ours.propagate = False
    for library in ("DeepSpeed", "transformers", "datasets", "urllib3", "httpx"):
        logging.getLogger(library).setLevel(logging.WARNING)

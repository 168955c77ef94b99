"""A terminal gets bars and messages above them, a file gets lines; in the end the bars are gone, however it comes."""

import os
import pty
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.seconds

PROGRAM = """
import logging, sys
from spd_dist.tracking.console import set_up_logging
from spd_dist.tracking.progress import Progress, ProgressReports

set_up_logging(0)
logging.getLogger("spd_dist").info("before")
with Progress("generate", 4, "prompts", ProgressReports(every_seconds=0.0)) as progress:
    for unit in range(4):
        import time; time.sleep(0.3)
        progress.advance(1, tokens=10)
        if sys.argv[1:] == ["fail"] and unit == 2:
            raise KeyError("failed")
logging.getLogger("spd_dist").info("after [x]")
"""


def on_a_terminal(*words: str, **variables: str) -> str:
    """What a person sees, as it came."""
    main, worker = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **variables}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stdout=worker, stderr=worker, env=environment)
    os.close(worker)
    seen = b""
    while True:
        try:
            block = os.read(main, 4096)
        except OSError:
            break
        if not block:
            break
        seen += block
    process.wait()
    os.close(main)
    return seen.decode()


def test_a_terminal_gets_bars_that_are_gone_in_the_end():
    seen = on_a_terminal()
    assert "\x1b[?25l" in seen  # the cursor is hidden while bars are drawn,
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # and shown again
    assert "run" in seen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "after [x]" in plain
    assert "generate: done, 4/4 prompts" in plain


def test_a_failure_gives_the_cursor_back():
    seen = on_a_terminal("fail")
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    assert "KeyError" in seen


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}])
def test_a_terminal_that_cannot_draw_gets_lines(variables):
    seen = on_a_terminal(**variables)
    assert "\x1b" not in seen
    assert "generate: 2/4 prompts" in seen


def test_a_file_gets_lines():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert "\x1b" not in done.stderr
    assert done.stderr.count("prompts") == 5, "it starts, of four units three, done"

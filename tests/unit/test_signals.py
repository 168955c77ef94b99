"""What counts as a request to stop, and when."""

import os
import signal
import subprocess
import sys

import pytest

from spd_dist.process.signals import STOP_FILE, StopSignals, seconds_allowed, seconds_between_looks, stop_file, touched


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield StopSignals()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_a_request_however_often_it_comes(signals, name):
    signals.install()
    assert signals.reason() is None
    for _ in range(3):
        os.kill(os.getpid(), signal.Signals[name])
    assert signals.reason() == name


PROCESS = """
import sys
from spd_dist.process.signals import StopSignals
signals = StopSignals()
signals.install()
for line in sys.stdin:
    print(signals.reason(), signals.is_interrupted(), flush=True)
"""


@pytest.mark.seconds
def test_a_first_interrupt_is_a_request_and_a_second_ends_the_process_at_once():
    with interruptible(signal.default_int_handler) as process:
        assert answer(process) == "None False"
        process.send_signal(signal.SIGINT)
        assert answer(process) == "SIGINT True"
        process.send_signal(signal.SIGTERM)  # deepspeed's launcher sends it, too
        assert answer(process) == "SIGINT True"
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == -signal.SIGINT
    assert (
        said.count("SIGINT: stopping at the next unit, where the same command goes on; another Ctrl-C ends it at once")
        == 1
    )


@pytest.mark.seconds
def test_a_job_in_the_background_goes_on_ignoring_interrupts():
    with interruptible(signal.SIG_IGN) as process:
        answer(process)
        process.send_signal(signal.SIGINT)
        assert answer(process) == "None False"
        process.communicate()
    assert process.returncode == 0


def interruptible(handler):
    """A process that heeds requests, and answers each line by what it was asked; it starts with this for SIGINT."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, "-c", PROCESS], text=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def answer(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_file_is_a_request_and_tasks_of_an_array_have_one_each(signals, tmp_path):
    everyones, own = tmp_path / STOP_FILE, tmp_path / stop_file(3)
    assert stop_file() == "PREEMPT"
    assert own.name == "PREEMPT.task-00003"
    signals.watch({everyones: touched(everyones), own: touched(own)})
    (tmp_path / stop_file(4)).touch()
    assert signals.reason() is None
    own.touch()
    assert signals.reason() == f"the file {own}"


def test_a_file_that_lay_there_is_no_request_until_it_is_touched_again(signals, tmp_path):
    file = tmp_path / STOP_FILE
    file.touch()
    signals.watch({file: touched(file)})
    assert signals.reason() is None
    os.utime(file, ns=(0, touched(file) + 1))
    assert signals.reason() == f"the file {file}"


def test_many_ranks_look_at_the_stop_files_seldom_and_a_signal_is_seen_at_once(signals, tmp_path):
    assert [seconds_between_looks(size) for size in (1, 8, 16, 64, 1024)] == [0.0, 0.0, pytest.approx(4.8), 19.2, 20.0]
    file = tmp_path / STOP_FILE
    signals.watch({file: touched(file)})
    signals.seconds_between = 20.0
    assert signals.reason() is None
    file.touch()
    assert signals.reason() is None
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.reason() == "SIGTERM"
    signals.received.clear()
    signals.seconds_between = 0.0
    assert signals.reason() == f"the file {file}"


def test_a_file_system_that_fails_for_a_moment_holds_no_request(signals, tmp_path, monkeypatch):
    file = tmp_path / STOP_FILE
    signals.watch({file: 0})
    file.touch()

    def fail(_):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as failing:
        failing.setattr("pathlib.Path.stat", fail)
        assert signals.reason() is None
    assert signals.reason() == f"the file {file}"


def test_a_request_is_not_lost_when_a_later_run_of_the_process_watches_the_same_file(signals, tmp_path):
    file = tmp_path / STOP_FILE
    signals.watch({file: touched(file)})
    file.touch()
    signals.watch({file: touched(file)})
    assert signals.reason() == f"the file {file}"


def test_a_folder_that_is_not_there_or_is_a_file_holds_no_request(signals, tmp_path):
    (tmp_path / "file").touch()
    files = [tmp_path / "nowhere" / STOP_FILE, tmp_path / "file" / STOP_FILE]
    signals.watch({file: touched(file) for file in files})
    assert signals.reason() is None


def test_the_time_limit_is_a_request_once_it_has_passed_since_the_start(signals):
    signals.limit({}, None, 120)
    assert signals.reason() is None
    signals.limit({}, 60, 0)
    assert signals.reason() is None
    signals.started -= 100
    signals.limit({}, 60, 0)
    assert signals.reason() == "the time limit"
    signals.limit({"SLURM_JOB_END_TIME": str(signals.started + 300)}, None, 120)
    assert signals.reason() is None
    signals.started -= 100
    signals.limit({"SLURM_JOB_END_TIME": str(signals.started + 300)}, None, 120)
    assert signals.reason() == "the time limit"


def test_the_limit_is_the_configs_or_slurms_less_the_margin_but_never_less_than_half():
    assert seconds_allowed(None, None, 120, started=1e9) is None
    assert seconds_allowed(None, 1000, 120, started=1e9) == 880
    assert seconds_allowed(1e9 + 600, 1000, 120, started=1e9) == 880
    assert seconds_allowed(1e9 + 600, None, 120, started=1e9) == 480
    assert seconds_allowed(None, 100, 120, started=1e9) == 50

"""What counts as a request to stop, and when."""

import os
import signal
import time

import pytest

from spd_dist.signals import STOP_FILE, StopSignals, seconds_allowed, stop_file


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield StopSignals()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_a_request_however_often_it_comes(signals, name):
    signals.install()
    assert signals.reason() is None
    for _ in range(3):
        os.kill(os.getpid(), signal.Signals[name])
    assert signals.reason() == name


def test_a_file_is_a_request_and_tasks_of_an_array_have_one_each(signals, tmp_path):
    everyones, own = tmp_path / STOP_FILE, tmp_path / stop_file(3)
    assert stop_file() == "PREEMPT"
    assert own.name == "PREEMPT.task-00003"
    (tmp_path / stop_file(4)).touch()
    assert signals.reason(everyones, own) is None
    own.touch()
    assert signals.reason(everyones, own) == f"the file {own}"


def test_the_time_limit_is_a_request_once_it_has_passed(signals):
    signals.stop_after(None)
    assert signals.reason() is None
    signals.stop_after(60)
    assert signals.reason() is None
    signals.stop_after(0)
    assert signals.reason() == "the time limit"


def test_the_limit_is_the_configs_or_slurms_less_the_margin_but_never_less_than_half():
    slurm = {"SLURM_JOB_END_TIME": str(int(time.time()) + 600)}
    assert seconds_allowed({}, None, 120) is None
    assert seconds_allowed({}, 1000, 120) == 880
    assert seconds_allowed(slurm, 1000, 120) == 880
    assert seconds_allowed(slurm, None, 120) == pytest.approx(480, abs=2)
    assert seconds_allowed({}, 100, 120) == 50

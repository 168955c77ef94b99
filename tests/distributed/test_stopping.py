"""All ranks agree on which requests to stop are old, whatever a network file system shows them, and heed a new one."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_on_ranks

from spd_dist.config import Distributed
from spd_dist.errors import StopRequested
from spd_dist.process.signals import STOP_FILE, StopSignals, touched
from spd_dist.process.stopping import Stopping, watch


def heed_only_new_requests(folder: Path) -> None:
    rank = dist.get_rank()
    experiment, job = (folder / f"seen_by_{rank}" / name for name in ("", "job"))
    job.mkdir(parents=True)
    if rank == 0:
        (experiment / STOP_FILE).touch()
    dist.barrier()
    signals = StopSignals()
    watch(signals, experiment)
    stopping = Stopping(signals, job, 3, Distributed())
    assert not stopping.should_stop()

    old = touched(folder / "seen_by_0" / STOP_FILE)
    if rank == 1:  # the old one appears here only now, as on a host that had cached that there was none
        (experiment / STOP_FILE).touch()
        os.utime(experiment / STOP_FILE, ns=(old, old))
    dist.barrier()
    assert not stopping.should_stop()
    stopping.stop_alone()

    dist.barrier()
    if rank == 1:
        os.utime(experiment / STOP_FILE, ns=(old + 1, old + 1))
        with pytest.raises(StopRequested, match=r"stopped on request \(the file .*seen_by_1/PREEMPT\)"):
            stopping.stop_alone()
        assert (job / "PREEMPT.task-00003").exists(), "the ranks that share this folder are asked, too"
    with pytest.raises(StopRequested, match=r"seen_by_1/PREEMPT\); start the same command again to go on") as stop:
        stopping.stop_if_asked()
    assert stop.value.is_shared

    again = StopSignals()
    watch(again, experiment)
    assert not Stopping(again, job, 3, Distributed()).should_stop()


def test_old_requests_are_not_heeded_again_and_new_ones_stop_all_ranks(tmp_path):
    run_on_ranks(2, tmp_path / "store", heed_only_new_requests, tmp_path)

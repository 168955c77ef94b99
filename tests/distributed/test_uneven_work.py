"""A rank that is done waits for the others beyond the time of a collective, and notices one that is gone."""

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import slow_link
import torch
import torch.distributed as dist
from ranks import ends_of_ranks

from spd_dist.distributed import lost_ranks
from spd_dist.distributed.collectives import max_over_ranks, together
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.errors import DataError

LIMIT_SECONDS = 2.0


def take_longer_than_a_collective_may() -> None:
    """The last rank does."""
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(1.5 * LIMIT_SECONDS)


def wait_patiently() -> None:
    with wait_for_all_ranks("working"):
        take_longer_than_a_collective_may()
    assert max_over_ranks(dist.get_rank()) == dist.get_world_size() - 1  # all are in step
    fail_on_the_last_rank()
    wait_for_rank_0()


def wait_for_rank_0() -> None:
    """Its result, or its error, reaches the others however long it takes."""

    def work() -> int:
        time.sleep(1.5 * LIMIT_SECONDS)
        return 7

    assert on_main("merging", work) == 7
    with pytest.raises(DataError, match="the disk is full") as failure:
        on_main("merging", refuse)
    assert failure.value.is_shared


def refuse() -> None:
    raise DataError("the disk is full")


def raise_on_the_last_rank() -> None:
    take_longer_than_a_collective_may()
    if dist.get_rank() == dist.get_world_size() - 1:
        raise DataError("row 7 is empty")


def fail_on_the_last_rank() -> None:
    with pytest.raises(DataError, match="row 7 is empty") as failure, wait_for_all_ranks("working"):
        raise_on_the_last_rank()
    assert failure.value.is_shared
    assert max_over_ranks(dist.get_rank()) == dist.get_world_size() - 1


def wait_in_a_collective() -> None:
    with together("working"):
        take_longer_than_a_collective_may()


def lose_the_last_rank() -> None:
    with wait_for_all_ranks("working"):
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_done_waits_longer_than_a_collective_may_take(tmp_path: Path):
    assert ends_of_ranks(3, tmp_path / "patient", wait_patiently, timeout_seconds=LIMIT_SECONDS) == [""] * 3
    first, _ = ends_of_ranks(2, tmp_path / "hasty", wait_in_a_collective, timeout_seconds=LIMIT_SECONDS)
    assert "imed out" in first


def test_a_rank_that_is_gone_is_missed_and_named(tmp_path: Path):
    *alive, _ = ends_of_ranks(3, tmp_path / "store", lose_the_last_rank, timeout_seconds=LIMIT_SECONDS)
    assert alive == ["RuntimeError: no sign of life from rank 2 for 2 s, while working"] * 2


def wait_for_each_other_after_one_is_gone(folder: Path) -> None:
    lost_ranks.GRACE_SECONDS = 2.0
    lost_ranks.watch_ranks()
    rank = dist.get_rank()
    try:
        lose_the_last_rank()
    except RuntimeError as error:
        (folder / f"heard-{rank}").write_text(str(error))
    dist.recv(torch.zeros(1), 1 - rank)  # neither waits for the rank that is gone


def test_who_waits_for_one_that_is_gone_ends_long_before_a_collective_would(tmp_path: Path):
    """In the store by an error; in a collective of two ranks that are alive, which times out else, by its process."""
    assert ends_of_ranks(3, tmp_path / "store", wait_for_each_other_after_one_is_gone, tmp_path) == [""] * 3
    heard = [(tmp_path / f"heard-{rank}").read_text() for rank in range(2)]
    assert all(text.startswith("rank 2 on ") for text in heard)
    assert all(text.endswith(": its process is gone, while working") for text in heard)


def leave_before_the_others(folder: Path) -> None:
    lost_ranks.GRACE_SECONDS = 0.1
    lost_ranks.watch_ranks()
    rank = dist.get_rank()
    dist.barrier()
    if rank == 2:
        lost_ranks.leave_ranks()
        os._exit(0)
    time.sleep(1.0)
    assert lost_ranks.lost_ranks() == []
    (folder / f"alive-{rank}").write_text("")
    lost_ranks.leave_ranks()


def test_a_rank_that_ends_in_order_is_not_missed(tmp_path: Path):
    assert ends_of_ranks(3, tmp_path / "store", leave_before_the_others, tmp_path) == [""] * 3
    assert sorted(path.name for path in tmp_path.glob("alive-*")) == ["alive-0", "alive-1"]


def of_host(space: str, make: Callable[[], socket.socket]) -> socket.socket:
    """What a host makes; only the thread that makes it moves there."""

    def made() -> socket.socket:
        slow_link.enter(space)
        return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def test_a_host_that_is_cut_off_is_missed_on_both_sides(monkeypatch):
    """Nothing is closed: the kernels' questions get no answers. A cable that is slow is no reason."""
    if lacking := slow_link.is_there():
        pytest.skip(lacking)
    monkeypatch.setattr(lost_ranks, "SILENCE_SECONDS", 3)
    monkeypatch.setattr(lost_ranks, "ASK_SECONDS", 1)
    watches = [lost_ranks.RankWatch(rank, lambda gone: None) for rank in range(2)]
    with slow_link.SlowLink() as link:
        server = of_host(link.spaces[0], lambda: socket.create_server((slow_link.ADDRESSES[0], 0)))
        watches[0].serve(server, "token")
        connection = of_host(link.spaces[1], lambda: socket.create_connection(server.getsockname()))
        watches[1].join(connection, "token")
        link.delay(0.2)
        time.sleep(4)
        assert [watch.lost for watch in watches] == [[], []]
        link.cut()
        deadline = time.monotonic() + 60
        while not all(watch.lost for watch in watches) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert [str(watch.lost[0]) for watch in watches] == [
        f"rank 1 on {socket.gethostname()}: its host does not answer",
        f"rank 0 on {slow_link.ADDRESSES[0]}: its host does not answer",
    ]
    for end in (server, connection):
        end.close()

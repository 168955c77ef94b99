import io
import logging

from spd_dist.tracking.console import set_up_logging


def messages(rank):
    stream = io.StringIO()
    set_up_logging(rank, stream)
    logging.getLogger("spd_dist.stages.generate").info("progress")
    logging.getLogger("spd_dist.stages.generate").warning("trouble")
    return stream.getvalue().splitlines()


def test_rank_zero_tells_all_and_the_others_only_warn_with_their_rank():
    assert [line.split(" ", 1)[1] for line in messages(0)] == ["progress", "trouble"]
    assert [line.split(" ", 1)[1] for line in messages(3)] == ["[rank 3] trouble"]


def test_setting_up_twice_says_everything_once():
    messages(0)
    assert len(messages(0)) == 2

"""A data set of the hub is asked for by one rank of a host, also where two hosts fill one cache at once."""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path

import datasets.config
import pytest
import torch.distributed as dist
from fake_hub import FakeHub
from huggingface_hub import constants
from ranks import run_on_ranks

from spd_dist.config import Data
from spd_dist.data.tasks import find_task
from spd_dist.errors import DataError
from spd_dist.run import read_together

GSM8K = find_task("gsm8k")
SOURCES = {"train": "me/sums::train", "test": "me/sums::test[:3]"}


def on_two_hosts(url: str, folder: Path, is_shared: bool) -> None:
    """Ranks 0 and 1 are on one host, 2 and 3 on another."""
    rank = dist.get_rank()
    host = f"node{rank // 2}"
    cache = folder / ("shared" if is_shared else host)
    socket.gethostname = lambda: host
    constants.ENDPOINT = datasets.config.HF_ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = constants.HUGGINGFACE_HUB_CACHE = str(cache / "hub")
    datasets.config.HF_DATASETS_CACHE = cache / "datasets"
    constants.HF_HUB_DISABLE_XET = True
    datasets.disable_progress_bars()
    data = Data(task="gsm8k", **SOURCES)
    train, test = (read_together(GSM8K, split, data) for split in ("train", "test"))
    assert [row["question"] for row in train] == [f"q{number}?" for number in range(20)]
    assert [row["question"] for row in test] == ["q20?", "q21?", "q22?"]
    with pytest.raises(DataError, match=r"hub data set me/summs:train: cannot be loaded"):
        read_together(GSM8K, "train", Data(task="gsm8k", train="me/summs::train"))


@pytest.mark.parametrize("is_shared", [True, False])
def test_each_file_is_asked_for_once_a_cache(tmp_path: Path, is_shared: bool):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, numbers in (("train", range(20)), ("test", range(20, 30))):
        rows = [{"question": f"q{number}?", "answer": f"so #### {number}"} for number in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeHub() as hub:
        hub.add("datasets/me/sums", folder)
        run_on_ranks(4, tmp_path / "store", on_two_hosts, hub.url, tmp_path, is_shared)
        files = Counter({name: count for name, count in hub.asked.items() if name.startswith("GET datasets/me/sums/")})
        assert files.keys() == {f"GET datasets/me/sums/{split}.jsonl" for split in ("train", "test")}
        assert set(files.values()) == {1 if is_shared else 2}

"""A model of the hub is asked for once a host, whatever the number of ranks, and not at all once the cache has it."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_hub import FakeHub
from huggingface_hub import constants
from ranks import run_on_ranks
from tiny import save_tiny_model

from spd_dist.config import Distributed, Model
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.policy import load_policy, load_settings, locate_model


def on_two_hosts(url: str, folder: Path) -> None:
    """Ranks 0 and 1 are on one host, 2 and 3 on another, each host with a cache of its own."""
    rank = dist.get_rank()
    host = f"node{rank // 2}"
    socket.gethostname = lambda: host
    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = constants.HUGGINGFACE_HUB_CACHE = str(folder / host)
    constants.HF_HUB_DISABLE_XET = True
    world = World(rank, dist.get_world_size(), torch.device("cpu"))
    policy = load_policy(Model("me/tiny"), Distributed(zero_stage=0), world)
    assert policy.name == "me/tiny"
    if (folder / "first").exists():
        with pytest.raises(DataError, match=r"model.name: me/tinny is no folder here, .* not to be had from the hub"):
            load_policy(Model("me/tinny"), Distributed(zero_stage=0), world)


def test_each_file_is_asked_for_once_a_host_and_never_again(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model")
    with FakeHub() as hub:
        hub.add("me/tiny", model)
        run_on_ranks(4, tmp_path / "store-1", on_two_hosts, hub.url, tmp_path)
        asked = Counter({name: count for name, count in hub.asked.items() if name.startswith("GET me/tiny/")})
        assert {"GET me/tiny/model.safetensors", "GET me/tiny/config.json"} <= asked.keys()
        assert set(asked.values()) == {2}
        (tmp_path / "first").touch()
        hub.asked.clear()
        run_on_ranks(4, tmp_path / "store-2", on_two_hosts, hub.url, tmp_path)
        assert not [name for name in hub.asked if name.startswith("GET me/tiny/")]


@pytest.mark.parametrize("read", [load_settings, locate_model])
def test_a_hub_that_does_not_answer_is_asked_once(read, monkeypatch: pytest.MonkeyPatch):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return  # the server is closed
                asked.append(read)

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        with pytest.raises(DataError, match=r"model\.name: nowhere/model .*nowhere/model: "):
            read(Model("nowhere/model"))
        server.shutdown(socket.SHUT_RDWR)
    assert asked == [read]

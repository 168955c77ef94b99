"""The emulated cluster, once a session, and an undisturbed run to compare with."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import HERE, Run, cancel_all, ended
from launching import SETTINGS, SMALL, results
from tiny import save_tiny_model


@pytest.fixture(scope="session")
def cluster():
    with open("/run/spd-cluster.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # names and addresses of hosts are the machine's
        subprocess.run([HERE / "down.sh"], check=False)
        try:
            subprocess.run([HERE / "up.sh"], check=True)
            yield
        finally:
            subprocess.run([HERE / "down.sh"], check=False)


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> tuple[str, ...]:
    model = save_tiny_model(tmp_path_factory.mktemp("policy") / "model")
    slower = ["calibrate.num_examples=40", "calibrate.batch_size=1"]  # a stage must last long enough to be disturbed
    return (
        "--config",
        "configs/quickstart.yaml",
        f"model.name={model}",
        *SMALL,
        *slower,
        *SETTINGS,
        "evaluate.arms=[base,spd]",
        "mechanism.in_run=false",  # its own test says what it gives; here it would only take time
    )


@pytest.fixture
def run(cluster, words, tmp_path) -> Iterator[Run]:
    yield Run(tmp_path / "run", words)
    cancel_all()


@pytest.fixture(scope="session")
def undisturbed(cluster, words, tmp_path_factory) -> dict[str, object]:
    """The results of a run to which nothing happens, on two nodes by `srun python`."""
    whole = Run(tmp_path_factory.mktemp("undisturbed") / "run", words)
    ended(whole.submit("--nodes=2"), "COMPLETED", whole)
    return results(Path(whole.folder))

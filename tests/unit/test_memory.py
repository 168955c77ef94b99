"""Memory that a stage has freed."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FREES = """
from pathlib import Path
import torch
from spd_dist.distributed.memory import give_back_free_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

class Cycle:
    def __init__(self, tensor):
        self.own, self.tensor = self, tensor

many = [Cycle(torch.ones(2**12)) for _ in range(2**14)]  # 16 KiB each: none is a mapping of its own
above = torch.ones(2**12)
held = resident()
del many
give_back_free_memory()
print(held - resident())
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps it"
)
def test_what_was_freed_goes_back_to_the_system_and_cycles_with_it():
    done = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 200, "of 256 MiB"

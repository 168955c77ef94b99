"""Which launcher set what: the variables of each, as they were seen, must end in the same rendezvous."""

import os
import subprocess
import sys

import pytest

from spd_dist.distributed.world import check_interface, num_threads, rendezvous
from spd_dist.errors import ConfigError

DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "778800", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu-a[03-05,9],gpu-b1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "1",
}  # fmt: skip


def test_a_launcher_that_sets_the_rank_is_taken_at_its_word():
    assert rendezvous(DEEPSPEED | SRUN) == DEEPSPEED


def test_srun_ranks_meet_on_the_first_node_of_the_step_and_a_port_of_the_job():
    port = str(10000 + 778800 % 20000)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu-a03", "MASTER_PORT": port}
    assert rendezvous(SRUN) == expected | {"LOCAL_WORLD_SIZE": "2"}
    assert rendezvous(SRUN | {"SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node0", "node0"),
        ("n1,n2", "n1"),
        ("n[2,4]", "n2"),
        ("a,b[1-2]", "a"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("node[1-3]-ib", "node1-ib"),
        ("rack[01,03]-n[007-009,12].x,other[1-2]", "rack01-n007.x"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, first):
    assert rendezvous(SRUN | {"SLURM_STEP_NODELIST": nodelist})["MASTER_ADDR"] == first


def test_a_plain_process_is_a_world_of_one_also_inside_a_batch_script():
    batch_script = {name: value for name, value in SRUN.items() if "STEP" not in name}
    alone = rendezvous(batch_script)
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_a_rank_without_an_address_is_refused():
    with pytest.raises(
        ConfigError, match="RANK=3 is set and MASTER_ADDR, MASTER_PORT not; use deepspeed, torchrun or srun"
    ):
        rendezvous({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})


def test_an_interface_that_a_host_lacks_is_refused_with_those_it_has():
    check_interface("eth0", ["lo", "eth0"])
    check_interface("ib0,ib1", ["lo", "ib0", "ib1"])
    match = r"distributed.interface: 'ib1' is no network interface of .*, which has lo, ib0; name one that all hosts"
    with pytest.raises(ConfigError, match=match):
        check_interface("ib0,ib1", ["lo", "ib0"])


def test_threads_are_divided_only_among_ranks_that_share_cores():
    all_cores, bound = frozenset(range(16)), [frozenset(range(8 * k, 8 * k + 8)) for k in range(2)]
    assert num_threads(("a", all_cores), [("a", all_cores)] * 4 + [("b", all_cores)] * 4) == 4
    assert num_threads(("a", bound[0]), [(host, cores) for host in "ab" for cores in bound]) == 8
    assert num_threads(("a", bound[0]), [("a", bound[0])]) == 8
    assert num_threads(("a", frozenset({3})), [("a", frozenset({3}))] * 2) == 1


def check_ends_well(program: str) -> None:
    """In a process of its own, that no launcher has started."""
    environment = {name: value for name, value in os.environ.items() if name not in DEEPSPEED}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TWO_WORLDS = """
import os, socket
from spd_dist.config import Distributed
from spd_dist.distributed.world import join_world, leave_world
join_world(Distributed())
port = int(os.environ["MASTER_PORT"])
leave_world()
with socket.create_server(("", port)):
    join_world(Distributed())
    leave_world()
"""


@pytest.mark.seconds
def test_a_process_without_a_launcher_takes_another_port_for_its_next_world():
    """Its first one may be taken in between."""
    check_ends_well(TWO_WORLDS)


KEPT_GROUP = """
import gc
from pathlib import Path
import torch.distributed as dist
from spd_dist.config import Distributed
from spd_dist.distributed.uneven_work import StoreWait, _own_connection
from spd_dist.distributed.world import join_world, leave_world

class Engine:
    def __init__(self):
        self.group, self.world = dist.new_group([0]), dist.distributed_c10d._get_default_group()
        self.itself = self

def threads():
    return {file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")}

gc.disable()
join_world(Distributed())
Engine()
StoreWait(_own_connection(), 0, 1).wait("working")
assert {"gloo_tcp_loop", "pt_tcpstore_uv"} <= threads(), threads()
leave_world()
assert not {name for name in threads() if "gloo" in name or "store" in name}, threads()
"""


@pytest.mark.seconds
def test_no_thread_of_the_process_group_is_left_when_the_interpreter_ends():
    """Such a thread may see the peers close while the process is taken down, and abort it after its work is done."""
    check_ends_well(KEPT_GROUP)

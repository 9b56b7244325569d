"""srun's tasks join as ranks: by which variables, where they are refused, and that they train as torchrun's ranks do."""

import re

import pytest

from byolt.configs import slurm
from byolt.configs.slurm import first_host, join, tasks_per_node

TASK = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_JOB_ID": "4012",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "gpu-a[07-08,11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "64",  # the job's: never read
    "SLURM_JOB_NODELIST": "other[1-9]",
}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[01-03,07],login", "gpu01"),
        ("gpu[7,01-03]", "gpu7"),
        ("login,gpu[01-03]", "login"),
        ("rack[1-2]node[008-016]-ib", "rack1node008-ib"),
        ("a-b.cluster_1.example.org,c", "a-b.cluster_1.example.org"),
    ],
)
def test_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    "hosts", ["", ",a", "a[1-3", "a]1", "a[x]", "a[]", "a b", "a[1-]", "$(reboot)", "a[1]/b"]
)
def test_malformed_host_list(hosts: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"SLURM_STEP_NODELIST={hosts} is not a list of hosts")):
        first_host(hosts)


def test_tasks_per_node() -> None:
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]
    for text in ("", "2(x", "x2", "2,,3", "-1"):
        with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE"):
            tasks_per_node(text)


def test_a_task_becomes_a_rank() -> None:
    environment = dict(TASK)
    join(environment, "")
    joined = {name: value for name, value in environment.items() if name not in TASK}
    assert joined == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu-a07",
        "MASTER_PORT": str(10_000 + (7 * 4012 + 3) % 20_000),
    }
    chosen = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    join(chosen, "")
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"], chosen["RANK"]) == ("10.0.0.1", "4000", "3")


@pytest.mark.parametrize(
    "more",
    [{"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "1"}],
    ids=["torchrun's word counts", "one task"],
)
def test_what_is_left_alone(more: dict[str, str]) -> None:
    environment = TASK | more
    join(environment, "")
    assert environment == TASK | more
    join(empty := {"SLURM_NTASKS": "8"}, "")
    assert empty == {"SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"SLURM_PROCID": None, "SLURM_NODEID": None}, "SLURM_NODEID, SLURM_PROCID not set"),
        ({"SLURM_STEP_NUM_TASKS": "5x"}, "SLURM_STEP_NUM_TASKS=5x is not a valid number"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID=-1 is not a valid number"),
        ({"SLURM_PROCID": "5"}, "SLURM_PROCID=5, SLURM_LOCALID=1, SLURM_NODEID=1, SLURM_STEP_TASKS_PER_NODE=2(x2),1 do"),
        ({"SLURM_LOCALID": "2"}, "do not fit"),
        ({"SLURM_NODEID": "3"}, "do not fit"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, "do not fit"),
        ({"SLURM_STEP_NODELIST": "a["}, "SLURM_STEP_NODELIST=a[ is not a list of hosts"),
        ({"SLURM_PROCID": "0"}, "task 0 is not on the step's first node: set MASTER_ADDR to its host"),
        ({"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE=2: a heterogeneous job has several steps at once"),
        ({"OMPI_COMM_WORLD_SIZE": "40"}, "OMPI_COMM_WORLD_SIZE=40: mpirun started this process"),
        ({"WORLD_SIZE": "5"}, "WORLD_SIZE=5 is set without RANK"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused_with_the_torchrun_line(
    change: dict[str, str | None], reason: str
) -> None:
    environment = {name: value for name, value in (TASK | change).items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        join(environment, "torchrun --nproc-per-node=2 train.py")
    assert "the tasks cannot join as ranks" in str(caught.value)
    assert str(caught.value).endswith(":\n  torchrun --nproc-per-node=2 train.py")
    assert "RANK" not in environment


def test_ports_stay_clear_of_outgoing_connections() -> None:
    assert slurm._PORTS.stop <= 32_768 and slurm._PORTS.start >= 1024

"""Joins the tasks of an srun step as ranks, by setting the variables that torchrun would set.

Only variables of the step count: those of the job are also set in its batch script and in steps of another size.
"""

import re
from collections.abc import Mapping, MutableMapping

_STEP = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID",
    "SLURM_PROCID", "SLURM_LOCALID",
)  # fmt: skip
_PORTS = range(10_000, 30_000)  # below those that Linux gives to outgoing connections


def join(environment: MutableMapping[str, str], torchrun: str) -> None:
    """Makes this process a rank if it is one of several tasks of an srun step; leaves torchrun's own ranks alone.

    Args:
        environment: `os.environ`; gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, and MASTER_ADDR and MASTER_PORT
            where they are not set.
        torchrun: the command that starts the same ranks, for messages.

    Raises:
        ValueError: the step's variables are incomplete or contradict each other.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return
    try:
        found = _variables(environment)
    except ValueError as error:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={tasks}, but the tasks cannot join as ranks: {error}. Start them with torchrun, one "
            f"per node, or a single process with srun --ntasks=1:\n  {torchrun}"
        ) from None
    for name, value in found.items():
        if name in ("MASTER_ADDR", "MASTER_PORT"):
            environment.setdefault(name, value)
        else:
            environment[name] = value


def _variables(step: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for this task."""
    # mpirun starts one task per node, which starts several processes.
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if step.get(name, step["SLURM_STEP_NUM_TASKS"]) != step["SLURM_STEP_NUM_TASKS"]:
            raise ValueError(f"{name}={step[name]}: mpirun started this process")
    if "WORLD_SIZE" in step:
        raise ValueError(f"WORLD_SIZE={step['WORLD_SIZE']} is set without RANK")
    if step.get("SLURM_HET_SIZE", "1") != "1":
        raise ValueError(
            f"SLURM_HET_SIZE={step['SLURM_HET_SIZE']}: a heterogeneous job has several steps at once"
        )
    if missing := [name for name in _STEP if name not in step]:
        raise ValueError(f"{', '.join(missing)} not set")
    job, number, node, rank, local, size = (
        _number(step, f"SLURM_{name}")
        for name in ("JOB_ID", "STEP_ID", "NODEID", "PROCID", "LOCALID", "STEP_NUM_TASKS")
    )
    per_node = tasks_per_node(step["SLURM_STEP_TASKS_PER_NODE"])
    if sum(per_node) != size or not (rank < size and node < len(per_node) and local < per_node[node]):
        stated = "PROCID", "LOCALID", "NODEID", "STEP_TASKS_PER_NODE"
        raise ValueError(
            ", ".join(f"SLURM_{name}={step[f'SLURM_{name}']}" for name in stated) + " do not fit"
        )
    if rank == 0 and node and "MASTER_ADDR" not in step:
        raise ValueError("task 0 is not on the step's first node: set MASTER_ADDR to its host")
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "MASTER_ADDR": first_host(step["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[(7 * job + number) % len(_PORTS)]),  # steps of a job may run side by side
    }


def _number(step: Mapping[str, str], name: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", step[name]):
        raise ValueError(f"{name}={step[name]} is not a valid number")
    return int(step[name])


def first_host(hosts: str) -> str:
    """The first host of a Slurm host list: "gpu01" of "gpu[01-03,07],login"."""
    first = re.match(r"(?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+(?=,|$)", hosts, re.ASCII)
    if not first:
        raise ValueError(f"SLURM_STEP_NODELIST={hosts} is not a list of hosts")
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])


def tasks_per_node(text: str) -> list[int]:
    """The tasks of each node of a step: [2, 2, 1] of "2(x2),1"."""
    if not re.fullmatch(r"\d{1,6}(\(x\d{1,6}\))?(,\d{1,6}(\(x\d{1,6}\))?)*", text, re.ASCII):
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text} is not a list of numbers")
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    return counts

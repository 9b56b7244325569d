"""The command line of programs that take settings, and the number of ranks that the environment states.

Imports no torch, so that a mistake is reported at once.
"""

import difflib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from byolt.configs import schema, slurm
from byolt.files.console import Parser
from byolt.files.paths import without_secrets
from byolt.files.weights import weights_kind

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class SettingsParser(Parser):
    """A parser that answers `--batch_size 64` with `train.batch_size=64`."""

    def error(self, message: str) -> NoReturn:
        for word, following in pairwise([*sys.argv[1:], "-"]):
            option, _, value = word.partition("=")
            known = any(name.startswith(option) for name in self._option_string_actions)  # or an abbreviation
            if known or not option.startswith("--") or not message.startswith("unrecognized"):
                continue
            if close := difflib.get_close_matches(option, self._option_string_actions, n=1, cutoff=0.7):
                message = f"{option}: no such option; did you mean {close[0]}?"
            elif key := _nearest(option):
                value = value or ("VALUE" if following.startswith("-") or "=" in following else following)
                message = f"{option}: settings are written without dashes: {key}={value}"
            break
        super().error(message)


def _nearest(option: str) -> str | None:
    """The setting that an option like --batch-size or --train.batch_size stands for."""
    dotted = schema.dotted_keys()
    names = {key.replace(".", "_"): key for key in dotted}
    names |= {key.partition(".")[2]: key for key in reversed(dotted)}  # data.path comes before eval.path
    close = difflib.get_close_matches(re.sub(r"[-.]", "_", option.lstrip("-")), names, n=1, cutoff=0.4)
    return names[close[0]] if close else None


def check_resume(resume: str | None) -> None:
    """Refuses a --resume that is neither auto nor a file which may be a checkpoint; a ValueError names the remedy."""
    if resume in (None, "auto"):
        return
    if os.path.isdir(resume):
        raise ValueError(
            f"--resume {resume} is a folder: use --resume auto with run.out={resume}, or name a checkpoint-*.pt in it"
        )
    if resume.endswith(".safetensors") or not os.path.isfile(resume):
        problem = "is an exported encoder, not a checkpoint" if os.path.isfile(resume) else "does not exist"
        raise ValueError(
            f"--resume {without_secrets(resume)} {problem}: name a checkpoint-*.pt of a run, or use auto"
        )


def check_logger(project: str | None) -> None:
    """Refuses run.wandb if the package is not installed; a ValueError says how to get it."""
    found = importlib.util.find_spec("wandb") if project else None
    if project and (found is None or found.origin is None):  # a folder wandb/ without code has no origin
        raise ValueError(
            f"run.wandb={project} needs the package wandb, which is not installed: pip install -e '.[wandb]', or leave "
            "run.wandb out: metrics.jsonl and TensorBoard have the same rows"
        )


def check_backbone(backbone: str) -> None:
    """Refuses a backbone timm:NAME if timm is not installed; a ValueError says how to get it."""
    if backbone.startswith(schema.TIMM) and importlib.util.find_spec("timm") is None:
        raise ValueError(
            f"model.backbone={backbone} needs the package timm, which is not installed: pip install -e '.[timm]'"
        )


def check_init_from(config: schema.Config, resume: str | None) -> None:
    """Refuses a model.init_from that is not a file of weights, unless the run resumes and does not read it.

    Raises:
        ValueError, OSError: names the setting, the file and the remedy.
    """
    path, out = config.model.init_from, Path(config.run.out)
    is_new = not config.run.mirror and not any(out.glob("checkpoint-*.pt"))
    if path and (resume is None or (resume == "auto" and is_new)):
        weights_kind(path)


def world_size() -> int:
    """Number of ranks, by torchrun's variables; the tasks of an srun step get them here (`slurm.join`).

    Raises:
        ValueError: a number is not valid, srun's tasks cannot join, mpirun started several processes, or torchrun's
            variables are incomplete.
    """
    name = next((name for name in _LAUNCHERS if name in os.environ), "")
    tasks = os.environ.get(name, "1")
    by_slurm = "SLURM" in name
    if "RANK" not in os.environ and (not re.fullmatch("[0-9]{1,9}", tasks) or int(tasks) < 1):
        ranks = "srun or torchrun" if by_slurm else "torchrun"
        raise ValueError(
            f"in the environment, {name}={tasks} is not a valid number of tasks: start the ranks with {ranks}, or "
            f"unset {name} for a single process"
        )
    if "RANK" not in os.environ and int(tasks) > 1:
        command = _torchrun(int(tasks))
        slurm.join(os.environ, command)
        if "RANK" not in os.environ:
            remedy = "srun, whose tasks become ranks, or with torchrun" if by_slurm else "torchrun"
            single = "with srun --ntasks=1" if by_slurm else "without mpirun"
            raise ValueError(
                f"in the environment, {name}={tasks}, but there is no RANK: the {tasks} processes would be runs of "
                f"their own. Start the ranks with {remedy}, or a single process {single}:\n  {command}"
            )
    return torchrun_ranks(os.environ)[2]


def torchrun_ranks(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """RANK, LOCAL_RANK and WORLD_SIZE of this process; (0, 0, 1) without them.

    Raises:
        ValueError: torchrun's variables are incomplete, or a number is not valid.
    """
    present = [name for name in _TORCHRUN if name in environment]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return 0, 0, 1
    rank, local_rank, size = (environment.get(name, "0") for name in _TORCHRUN[:3])
    if "WORLD_SIZE" in present and (not re.fullmatch("[0-9]{1,9}", size) or int(size) < 1):
        raise ValueError(
            f"in the environment, WORLD_SIZE={size} is not a valid number of ranks: use torchrun"
        )
    if missing := [name for name in _TORCHRUN if not environment.get(name)]:
        raise ValueError(
            f"environment variables {', '.join(missing)} are not set though {present[0]} is; start with torchrun"
        )
    for name, text in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= int(size):
            raise ValueError(
                f"in the environment, {name}={text} is not a number below WORLD_SIZE={size}: use torchrun"
            )
    port = environment["MASTER_PORT"]
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ValueError(
            f"in the environment, MASTER_PORT={port} is not a port from 1 to 65535: use torchrun"
        )
    here = environment.get("LOCAL_WORLD_SIZE", size)
    if not re.fullmatch("[0-9]{1,9}", here) or int(local_rank) >= int(here):
        raise ValueError(
            f"in the environment, LOCAL_RANK={local_rank} is not a number below LOCAL_WORLD_SIZE={here}: use torchrun"
        )
    return int(rank), int(local_rank), int(size)


def _torchrun(tasks: int) -> str:
    """The command that starts this program on as many ranks as there are tasks."""
    text = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    nodes = int(text) if text.isdecimal() else 1
    program = shlex.join(sys.argv)
    if nodes <= 1:
        return f"torchrun --nproc-per-node={tasks} {program}"
    return (
        f"srun --nodes={nodes} --ntasks={nodes} torchrun --nnodes={nodes} --nproc-per-node={-(-tasks // nodes)} "
        f"--rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 {program}"
    )

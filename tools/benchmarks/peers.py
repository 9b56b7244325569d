"""Compares the whole loader with the pipelines of other projects, in one interleaved run.

The pipelines and the harness are in benchmarks/peers of a checkout. The harness runs `loader` below in a process of its
own, like every peer.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from byolt.configs import schema
from byolt.pipelines.backends import make_backend, make_resident
from byolt.pipelines.loader import Loader
from byolt.pipelines.sources import open_source

ROOT = Path(__file__).resolve().parent.parent.parent
HARNESS = ROOT / "benchmarks" / "peers" / "measure.py"
OURS = "byolt"
CONFIG = "BYOLT_PEERS_CONFIG"  # environment variable: a YAML file with the run's settings


class Request(Protocol):
    """The harness's request to a pipeline."""

    data: str
    batch_size: int
    size: int
    workers: int


def loader(request: Request) -> Iterator[tuple[Tensor, Tensor]]:
    """Both views of the images by the recipe of the run, float32 on the CPU, kept in memory if train.py does so."""
    overrides = [
        f"data.path={request.data}", f"data.threads={request.workers}", f"augment.size={request.size}",
        f"train.batch_size={request.batch_size}", "train.accumulation=1",
    ]  # fmt: skip
    config = schema.load(os.environ[CONFIG], overrides)
    source, where = open_source(config.data.path), (torch.device("cpu"), torch.float32)
    source.proven = True  # as after the first epoch
    kept = make_resident(config, source, *where)
    backend, _ = kept or make_backend(config, *where)
    with Loader(config, source, backend) as batches:
        for (batch,) in batches:
            yield batch.view1, batch.view2


def check_harness(harness: Path = HARNESS) -> None:
    """Refuses --peers where the harness is missing, before anything is measured."""
    if not harness.is_file():
        raise ValueError(f"--peers needs {harness}, which is in a checkout and not in an installed package")


def run_harness(
    peers: list[str], config: schema.Config, workers: int, batches: int, repeats: int, harness: Path = HARNESS
) -> list[dict[str, Any]]:
    """Runs the harness on the folder of JPEGs at data.path; its log goes to stderr.

    Args:
        peers: names of peers; empty for all.
        config: of the run. Ours follows all settings; peers follow the path, the batch size and the view size.
        workers: number of processes of the peers and of threads of ours.
        batches: number of timed batches of each turn.
        repeats: number of turns.
        harness: the program, benchmarks/peers/measure.py.

    Returns:
        A row for every pipeline, ours first: "peer", "cpu_ms", "images_per_s", and "ratio", the multiple of our CPU
        time that it takes; or "peer" and "error".

    Raises:
        ValueError: the harness is missing, failed, or could not run our loader.
    """
    check_harness(harness)
    with tempfile.TemporaryDirectory() as scratch:
        out, settings = Path(scratch) / "peers.json", Path(scratch) / "config.yaml"
        settings.write_text(schema.to_yaml(config))
        command = [sys.executable, str(harness), config.data.path, "--out", str(out)]
        command += ["--extra", f"{OURS}={__file__}:loader"]
        command += ["--peers", OURS, *peers] if peers else []
        numbers = {
            "warmup": 2 * config.data.prefetch + 2,  # until batches are made in memory that was used before
            "batches": batches,
            "batch-size": config.train.batch_size,
            "size": config.augment.size,
            "workers": workers,
            "repeats": repeats,
        }
        command += [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, CONFIG: str(settings)}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode or not out.exists():
            raise ValueError(
                f"--peers: {harness} ended with {done.returncode} (its message is above); data.path must be a folder "
                f"of JPEGs, which {config.data.path} may not be"
            )
        rows = json.loads(out.read_text())["peers"]
    return compare(rows)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The harness's rows, ours first, failed ones last, each with its ratio to ours (see `run_harness`)."""
    (ours,) = (row for row in rows if row["peer"] == OURS)
    if "error" in ours:
        raise ValueError(f"the harness could not run our loader: {ours['error']}")
    compared = [row if "error" in row else row | {"ratio": row["cpu_ms"] / ours["cpu_ms"]} for row in rows]
    return sorted(compared, key=lambda row: ("error" in row, row["peer"] != OURS))

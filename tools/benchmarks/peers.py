"""The whole loader beside the pipelines that a BYOL user would otherwise take, in one interleaved run.

The pipelines come with a harness of their own, a Python program with the interface

    HARNESS --data JPEGS --peers NAME ... --extra NAME=FILE.py:FUNCTION ... --out FILE.json
            --warmup N --batches N --batch-size N --size N --workers N --repeats N --retries N --quiet-wait SECONDS

which runs every pipeline in a process of its own, in turns, and writes throughput.summary: rows with peer, wallN
(images/s with N workers), cpu_ms_per_image (of the process and its children), or error. FUNCTION takes a job with the
fields data (class folders of JPEGs), batch_size, workers and size, and yields (view 1, view 2) without end: ours is
`loader`.
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
OURS = "byolt"
CONFIG = (
    "BYOLT_PEERS_CONFIG"  # environment variable: the run's settings, a YAML file, for the harness's process
)


class Job(Protocol):
    """What the harness asks for."""

    data: str
    batch_size: int
    size: int
    workers: int


def loader(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """The run's own recipe, kept in memory or not as train.py would, on the harness's images; float32 on the CPU."""
    config = schema.load(
        os.environ[CONFIG],
        [
            f"data.path={job.data}",
            f"data.threads={job.workers}",
            f"augment.size={job.size}",
            f"train.batch_size={job.batch_size}",
            "train.accumulation=1",
        ],
    )
    source, where = open_source(config.data.path), (torch.device("cpu"), torch.float32)
    kept = make_resident(config, source, *where)
    backend, _ = kept or make_backend(config, *where)
    with Loader(config, source, backend) as batches:
        for (batch,) in batches:
            yield batch.view1, batch.view2


def run_harness(
    harness: Path, peers: list[str], config: schema.Config, workers: int, batches: int, repeats: int
) -> list[dict[str, Any]]:
    """Runs the harness on the folder of JPEGs at data.path; its log goes to stderr as it comes.

    Args:
        harness: the program.
        peers: its pipelines by name; empty for all.
        config: the run: ours follows all of it, the peers the path, the batch and the size of a view.
        workers: processes of the peers, threads of ours.
        batches: timed ones of each turn.
        repeats: turns.

    Returns:
        A row for every pipeline, ours first: "peer", "cpu_ms", "images_per_s", and "ratio", how many times our CPU
        time it takes; or "peer" and "error".

    Raises:
        ValueError: the harness is not there, failed, or could not run our loader.
    """
    if not harness.is_file():
        raise ValueError(f"--peers {harness}: no such file; give the peers' harness, a Python program")
    with tempfile.TemporaryDirectory() as scratch:
        out, settings = Path(scratch) / "peers.json", Path(scratch) / "config.yaml"
        settings.write_text(schema.to_yaml(config))
        command = [sys.executable, str(harness), "--data", config.data.path, "--out", str(out)]
        command += [
            "--extra",
            f"{OURS}={__file__}:loader",
            "--peers",
            *([OURS, *peers] if peers else ["all"]),
        ]
        numbers = {
            "warmup": 2 * config.data.prefetch + 2,  # until batches are made in memory that was used before
            "batches": batches,
            "batch-size": config.train.batch_size,
            "size": config.augment.size,
            "workers": workers,
            "repeats": repeats,
            # CPU time is compared, which another turn would not make truer.
            "retries": 0,
            "quiet-wait": 0,
        }
        command += [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, CONFIG: str(settings)}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode or not out.exists():
            raise ValueError(
                f"--peers {harness} ended with {done.returncode} (its message is above); it needs a folder of JPEGs "
                f"as data set, not {config.data.path}, if that is not one"
            )
        summary = json.loads(out.read_text())["throughput"]["summary"]
    return compare(summary, workers)


def compare(summary: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """The harness's rows in our terms, ours first, each with its ratio to ours (see `run_harness`)."""
    failed = {row["peer"]: row["error"] for row in summary if row.get("cpu_ms_per_image") is None}
    if OURS in failed:
        raise ValueError(f"the harness could not run our loader: {failed[OURS]}")
    (ours,) = (row["cpu_ms_per_image"] for row in summary if row["peer"] == OURS)
    rows: list[dict[str, Any]] = [
        {
            "peer": row["peer"],
            "cpu_ms": row["cpu_ms_per_image"],
            "images_per_s": row[f"wall{workers}"],
            "ratio": row["cpu_ms_per_image"] / ours,
        }
        for row in summary
        if row["peer"] not in failed
    ]
    rows.sort(key=lambda row: row["peer"] != OURS)
    return rows + [{"peer": name, "error": reason} for name, reason in failed.items()]

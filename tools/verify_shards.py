"""Reads a whole data set again and names everything in it that is not as its manifest says.

python tools/verify_shards.py DATASET [--no-decode]
"""

import argparse
import os
import sys
import time
import zlib
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.convert import prove
from pipelines.encoded import inspect
from pipelines.index import index_tar
from pipelines.shards import Manifest, Shard, file_sha256
from pipelines.workers import spread


class Task(NamedTuple):
    """One shard: its records, and the number of its first sample in the data set."""

    path: Path
    shard: Shard
    records: np.ndarray
    first: int
    decode: bool


def check_shard(task: Task) -> list[str]:
    """Problems of one shard, each with shard, offset and sample as far as they are known."""
    path, shard, records = task.path, task.shard, task.records
    if path.exists() and not path.is_file():
        return [f"{path} is not a regular file"]
    try:
        size = path.stat().st_size
        sha256 = file_sha256(path)
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    problems = []
    if size != shard.size:
        problems.append(f"{path}: {size:,} bytes, the manifest states {shard.size:,}")
    if sha256 != shard.sha256:
        problems.append(f"{path}: sha256 is {sha256}, the manifest states {shard.sha256}")
    found = None
    try:
        found = index_tar(path).records
    except ValueError as error:
        problems.append(str(error))
    if found is not None and len(found) != len(records):
        problems.append(f"{path}: the tar has {len(found)} samples, the manifest states {len(records)}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, record in enumerate(records):
            data = os.pread(descriptor, int(record["length"]), int(record["offset"]))
            reason = check_sample(data, record, task.decode)
            if not reason and found is not None and len(found) == len(records):
                reason = _compare(found[number], record)
            if reason:
                problems.append(f"{path}: offset {record['offset']}: sample {task.first + number}: {reason}")
    finally:
        os.close(descriptor)
    return problems


def check_sample(data: bytes, record: np.ndarray, decode: bool) -> str:
    """What is wrong with one encoded image, or ""."""
    if len(data) != record["length"]:
        return f"{len(data)} of {record['length']} bytes are there"
    if zlib.crc32(data) != record["crc32"]:
        return "its bytes are not those that the manifest describes (crc32)"
    try:
        header = inspect(data)
        if (header.height, header.width) != (record["height"], record["width"]):
            stated = f"{record['height']} x {record['width']}"
            return f"is {header.height} x {header.width}, the manifest states {stated}"
        if decode:
            prove(data, header)
    except ValueError as error:
        return str(error)
    return ""


def _compare(found: np.ndarray, record: np.ndarray) -> str:
    for name in ("offset", "length", "label"):
        if found[name] != record[name]:
            return f"{name} is {found[name]} in the tar, the manifest states {record[name]}"
    return ""


def verify(folder: Path, decode: bool, workers: int) -> tuple[int, list[str], list[Path]]:
    """Checks every shard.

    Returns:
        The number of samples, all problems in the order of the samples, and the tars that are not in the manifest.

    Raises:
        ValueError: The manifest itself cannot be used.
    """
    manifest = Manifest.load(folder)
    bounds = np.searchsorted(manifest.samples["shard"], np.arange(len(manifest.shards) + 1))
    tasks = [
        Task(folder / shard.name, shard, np.array(manifest.samples[start:stop]), int(start), decode)
        for shard, start, stop in zip(manifest.shards, bounds[:-1], bounds[1:], strict=True)
    ]
    with spread(check_shard, tasks, workers) as pending:
        problems = [future.result() for future in pending]
    strangers = set(folder.glob("*.tar")) - {task.path for task in tasks}
    return len(manifest.samples), [problem for part in problems for problem in part], sorted(strangers)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all is well, 1 there are problems, 2 the data set cannot be opened, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="verify_shards", description=__doc__.split("\n", 1)[0])
    parser.add_argument("dataset", type=Path, help="folder with manifest.json")
    parser.add_argument("--no-decode", action="store_true", help="check hashes and headers only")
    parser.add_argument("--limit", type=int, default=20, help="problems to print (default 20)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all CPUs)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1 or args.limit < 1:
        parser.error("--workers and --limit must be at least 1")
    start = time.perf_counter()
    try:
        samples, problems, strangers = verify(args.dataset, not args.no_decode, args.workers)
    except (ValueError, OSError, futures.BrokenExecutor) as error:
        print(f"verify_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("verify_shards: interrupted", file=sys.stderr)
        return 130
    for path in strangers:
        print(f"verify_shards: note: {path} is not part of the data set: nothing reads it", file=sys.stderr)
    for problem in problems[: args.limit]:
        print(problem, file=sys.stderr)
    if problems:
        print(
            f"verify_shards: {args.dataset}: {len(problems)} problems in {samples:,} samples", file=sys.stderr
        )
        return 1
    seconds = time.perf_counter() - start
    how = f"{'not ' * args.no_decode}decoded, {seconds:.1f} s, {samples / seconds:,.0f} images/s"
    print(f"{args.dataset}: {samples:,} samples are whole ({how})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

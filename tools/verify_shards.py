"""Reads a whole data set again and names everything in it that is not as its manifest says.

python tools/verify_shards.py DATASET [--no-decode]

DATASET is a folder with a manifest, or .beton files with commas between (and "?image=FIELD&label=FIELD"). A .beton is
compared with the manifest beside it; one that has none, as ffcv leaves it, has its structure and every image checked.
"""

import argparse
import os
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np

from byolt.files.atomic import sha256_of
from byolt.pipelines.convert.plan import SUFFIXES
from byolt.pipelines.convert.rules import prove
from byolt.pipelines.convert.workers import spread
from byolt.pipelines.formats import encoded
from byolt.pipelines.formats.beton import BetonSource, split_path
from byolt.pipelines.formats.index import index_beton, index_tar
from byolt.pipelines.manifest import MANIFEST, Manifest, Shard

_TOGETHER = 1024  # samples of a .beton without manifest that one task checks


class Task(NamedTuple):
    """One shard: its records, and the number of its first sample in the data set."""

    path: Path
    shard: Shard
    records: np.ndarray
    first: int
    decode: bool


class Part(NamedTuple):
    """Samples `start` to `stop` of .beton files that have no manifest."""

    paths: list[str]
    fields: dict[str, str]
    start: int
    stop: int
    decode: bool


def check(task: Task | Part) -> list[str]:
    """Problems of one shard or part, each with file, offset and sample as far as they are known."""
    return _check_part(task) if isinstance(task, Part) else check_shard(task)


def check_shard(task: Task) -> list[str]:
    """Problems of one shard, each with shard, offset and sample as far as they are known."""
    path, shard, records = task.path, task.shard, task.records
    if path.exists() and not path.is_file():
        return [f"{path} is not a regular file"]
    try:
        size = path.stat().st_size
        sha256 = sha256_of(path)
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    problems = []
    if size != shard.size:
        problems.append(f"{path}: {size:,} bytes, the manifest states {shard.size:,}")
    if sha256 != shard.sha256:
        problems.append(f"{path}: sha256 is {sha256}, the manifest states {shard.sha256}")
    is_beton = path.suffix == ".beton"
    found = None
    try:
        found = index_beton(path) if is_beton else index_tar(path).records
    except ValueError as error:
        problems.append(str(error))
    if found is not None and len(found) != len(records):
        problems.append(f"{path}: there are {len(found)} samples, the manifest states {len(records)}")
        found = None
    raw = BetonSource([path]).raw if is_beton and found is not None else np.zeros(len(records), bool)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, record in enumerate(records):
            data = os.pread(descriptor, int(record["length"]), int(record["offset"]))
            sides = int(record["height"]), int(record["width"])
            header = encoded.ppm_header(*sides) if raw[number] else b""
            reason = check_sample(data, record, task.decode, header)
            if not reason and found is not None:
                reason = _compare(found[number], record)
            if reason:
                problems.append(f"{path}: offset {record['offset']}: sample {task.first + number}: {reason}")
    finally:
        os.close(descriptor)
    return problems


def _check_part(part: Part) -> list[str]:
    source = BetonSource(part.paths, **part.fields)
    problems = []
    for i in range(part.start, part.stop):
        try:
            data = source.read(i)
            header = encoded.check(data, int(source.heights[i]), int(source.widths[i]))
            if part.decode:
                prove(data, header)
        except ValueError as error:
            problems.append(f"{source.describe(i)}: {error}")
        except OSError as error:  # names the sample itself
            problems.append(str(error))
    return problems


def check_sample(data: bytes, record: np.ndarray, decode: bool, before: bytes = b"") -> str:
    """What is wrong with one encoded image, or ""; `before` is the header that raw pixels need."""
    if len(data) != record["length"]:
        return f"{len(data)} of {record['length']} bytes are there"
    if zlib.crc32(data) != record["crc32"]:
        return "its bytes are not those that the manifest describes (crc32)"
    try:
        header = encoded.check(before + data, int(record["height"]), int(record["width"]))
        if decode:
            prove(data, header)
    except ValueError as error:
        return str(error)
    return ""


def _compare(found: np.ndarray, record: np.ndarray) -> str:
    for name in ("offset", "length", "label"):
        if found[name] != record[name]:
            return f"{name} is {found[name]} in the file, the manifest states {record[name]}"
    return ""


def verify(dataset: str, decode: bool, workers: int) -> tuple[int, list[str], list[Path]]:
    """Checks every shard.

    Returns:
        The number of samples, all problems in the order of the samples, and the shards that are not in the manifest.

    Raises:
        ValueError: The manifest itself cannot be used, or the structure of a .beton without one.
    """
    files, fields = split_path(dataset)
    if not files[0].endswith(".beton") or os.path.isdir(files[0]):
        folder = Path(dataset)
        names = None if (folder / MANIFEST).exists() else sorted(folder.glob("*.beton"))
        if not names:
            return _verify_manifest(folder, None, decode, workers)
        files = [str(path) for path in names]
    folders = {Path(file).parent for file in files}
    if not fields and len(folders) == 1 and (folder := folders.pop() / MANIFEST).exists():
        stated = {shard.name for shard in Manifest.load(folder.parent).shards}
        if stated >= {Path(file).name for file in files}:
            return _verify_manifest(folder.parent, {Path(file).name for file in files}, decode, workers)
    samples = len(BetonSource(files, **fields))
    tasks = [
        Part(files, fields, start, min(start + _TOGETHER, samples), decode)
        for start in range(0, samples, _TOGETHER)
    ]
    return samples, _problems(tasks, workers), []


def _verify_manifest(
    folder: Path, names: set[str] | None, decode: bool, workers: int
) -> tuple[int, list[str], list[Path]]:
    """Checks the shards of these names, or all of them."""
    manifest = Manifest.load(folder)
    tasks = [
        Task(folder / shard.name, shard, np.array(records), first, decode)
        for shard, first, records in manifest.by_shard()
        if names is None or shard.name in names
    ]
    present = {path for path in folder.iterdir() if path.suffix in SUFFIXES.values()}
    strangers = present - {folder / shard.name for shard in manifest.shards}
    return sum(len(task.records) for task in tasks), _problems(tasks, workers), sorted(strangers)


def _problems(tasks: Sequence[Task | Part], workers: int) -> list[str]:
    with spread(check, tasks, workers) as pending:
        return [problem for future in pending for problem in future.result()]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all is well, 1 there are problems, 2 the data set cannot be opened, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="verify_shards", description=__doc__.split("\n", 1)[0])
    parser.add_argument("dataset", help="folder with manifest.json, or .beton files with commas between")
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

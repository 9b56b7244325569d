"""Verifies a data set: reads it again and names each difference from its manifest, with file, offset and sample.

.beton files without a manifest, as ffcv writes them, have their structure and every image checked.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from byolt.files.atomic import sha256_of
from byolt.files.storage.store import Store
from byolt.pipelines.convert.plan import SUFFIXES
from byolt.pipelines.convert.rules import prove
from byolt.pipelines.convert.workers import collect
from byolt.pipelines.formats import encoded
from byolt.pipelines.formats.beton import BetonSource, split_path
from byolt.pipelines.formats.beton_index import index_path, write_index
from byolt.pipelines.formats.index import index_beton, index_tar
from byolt.pipelines.manifest import MANIFEST, NAMED_LABELS, Manifest, Shard
from byolt.pipelines.remote.cache import Cache
from byolt.pipelines.remote.dataset import RemoteData, fetched
from byolt.pipelines.remote.urls import is_remote, parse

_TOGETHER = 1024  # samples of a .beton without manifest that one task checks


class Verified(NamedTuple):
    """The result of `verify`: samples in all, problems in their order, shards that no manifest names, indexes."""

    samples: int
    problems: list[str]
    unlisted: Sequence[Path] = ()
    indexes: Sequence[Path] = ()


class _Stated(NamedTuple):
    """What a manifest states about one shard."""

    shard: Shard
    first: int  # number of its first sample in the data set
    records: np.ndarray
    classes: list[str] | None  # see `index_tar`


def verify(dataset: str, decode: bool, workers: int, index: bool = False) -> Verified:
    """Checks every shard of a folder, or .beton files ("a.beton,b.beton?image=FIELD&label=FIELD").

    With `index` it writes the index of each .beton without a manifest, if all of them are whole.

    Raises:
        ValueError: The manifest itself cannot be used, or the structure of a .beton without one; or there is a manifest
            to index.
    """
    if is_remote(dataset):
        data = RemoteData(parse(dataset))
        if data.manifest is not None:
            if index:
                raise _indexed_by(data.store.url)
            check = partial(_check_fetched, data.store, data.cache, f"{data.key}-verify", decode)
            return _verify_shards(data.manifest, check, None, workers)
        dataset = ",".join(str(data.stage() / name) for name in data.sizes)
    files, fields = split_path(dataset)
    folder = Path(dataset)
    if folder.is_dir() or not files[0].endswith(".beton"):
        betons = sorted(folder.glob("*.beton"))
        if (folder / MANIFEST).exists() or not betons:
            return _verify_folder(folder, None, decode, workers, index)
        files = [str(path) for path in betons]
    folders = {Path(file).parent for file in files}
    if not fields and len(folders) == 1 and ((folder := folders.pop()) / MANIFEST).exists():
        names = {Path(file).name for file in files}
        if names <= {shard.name for shard in Manifest.load(folder).shards}:
            return _verify_folder(folder, names, decode, workers, index)
    if index:
        for file in files:
            index_path(file).unlink(missing_ok=True)
    source = BetonSource(files, **fields)
    samples = len(source)
    ranges = [range(start, min(start + _TOGETHER, samples)) for start in range(0, samples, _TOGETHER)]
    found = collect(partial(_check_samples, files, fields, decode), ranges, workers)
    problems = [problem for part, _ in found for problem in part]
    if not index or problems:
        return Verified(samples, problems)
    parts = np.split(np.concatenate([checksums for _, checksums in found]), source.ends[:-1])
    return Verified(samples, problems, indexes=list(map(write_index, files, parts)))


def _verify_folder(folder: Path, names: set[str] | None, decode: bool, workers: int, index: bool) -> Verified:
    """Checks the shards of these names, or all of them."""
    manifest = Manifest.load(folder)
    if index:
        raise _indexed_by(str(folder))
    verified = _verify_shards(manifest, partial(_check_local, folder, decode), names, workers)
    present = {path for path in folder.iterdir() if path.suffix in SUFFIXES.values()}
    unlisted = present - {folder / shard.name for shard in manifest.shards}
    return verified._replace(unlisted=sorted(unlisted))


def _indexed_by(place: str) -> ValueError:
    return ValueError(f"--index: {place}/{MANIFEST} already has the checksum of every sample")


def _verify_shards(
    manifest: Manifest, check: Callable[[_Stated], list[str]], names: set[str] | None, workers: int
) -> Verified:
    classes = manifest.classes if manifest.settings.get(NAMED_LABELS) else None
    chosen = [
        _Stated(shard, first, np.array(records), classes)
        for shard, first, records in manifest.by_shard()
        if names is None or shard.name in names
    ]
    problems = [problem for part in collect(check, chosen, workers) for problem in part]
    return Verified(sum(len(stated.records) for stated in chosen), problems)


def _check_local(folder: Path, decode: bool, stated: _Stated) -> list[str]:
    return _check_shard(folder / stated.shard.name, decode, stated)


def _check_fetched(store: Store, cache: Cache, key: str, decode: bool, stated: _Stated) -> list[str]:
    """Checks a shard at the server: it is fetched, checked and removed."""
    with fetched(store, cache, key, stated.shard.name, stated.shard.size) as path:
        return [text.replace(str(path.parent), store.url) for text in _check_shard(path, decode, stated)]


def _check_shard(path: Path, decode: bool, stated: _Stated) -> list[str]:
    """Problems of one shard."""
    if path.exists() and not path.is_file():
        return [f"{path} is not a regular file"]
    try:
        before = path.stat()
        problems = _compare_shard(path, decode, stated)
        after = path.stat()
    except OSError as error:
        return [f"{path}: {error.strerror or error}"]
    if any(getattr(before, name) != getattr(after, name) for name in ("st_ino", "st_size", "st_mtime_ns")):
        problems.append(f"{path}: it was replaced or written to while it was verified: verify it again")
    return problems


def _compare_shard(path: Path, decode: bool, stated: _Stated) -> list[str]:
    shard, first, records, classes = stated
    problems = []
    size, sha256 = path.stat().st_size, sha256_of(path)
    if size != shard.size:
        problems.append(f"{path}: {size:,} bytes, the manifest states {shard.size:,}")
    if sha256 != shard.sha256:
        problems.append(f"{path}: sha256 is {sha256}, the manifest states {shard.sha256}")
    is_beton = path.suffix == ".beton"
    found = None
    try:
        found = index_beton(path) if is_beton else index_tar(path, classes).records
    except ValueError as error:
        problems.append(str(error))
    if found is not None and len(found) != len(records):
        problems.append(f"{path}: holds {len(found)} samples, the manifest states {len(records)}")
        found = None
    raw = BetonSource([path]).raw if is_beton and found is not None else np.zeros(len(records), bool)
    with open(path, "rb", buffering=0) as file:
        for number, record in enumerate(records):
            try:
                data = os.pread(file.fileno(), int(record["length"]), int(record["offset"]))
                _check_sample(data, record, bool(raw[number]), decode)
                if found is not None:
                    _compare(found[number], record)
            except ValueError as error:
                problems.append(f"{path}: offset {record['offset']}: sample {first + number}: {error}")
    return problems


def _check_sample(data: bytes, record: np.ndarray, raw: bool, decode: bool) -> None:
    """Raises ValueError if an encoded image, or raw pixels, differ from their record or do not decode."""
    if len(data) != record["length"]:
        raise ValueError(f"{len(data)} of {record['length']} bytes are there")
    if zlib.crc32(data) != record["crc32"]:
        raise ValueError("its bytes are not those that the manifest describes (crc32)")
    height, width = int(record["height"]), int(record["width"])
    header = encoded.check(encoded.ppm_header(height, width) + data if raw else data, height, width)
    if decode:
        prove(data, header)


def _compare(found: np.ndarray, record: np.ndarray) -> None:
    for name in ("offset", "length", "label"):
        if found[name] != record[name]:
            raise ValueError(f"{name} is {found[name]} in the file, the manifest states {record[name]}")


def _check_samples(
    files: list[str], fields: dict[str, str], decode: bool, numbers: range
) -> tuple[list[str], npt.NDArray[np.uint64]]:
    """Problems and checksums of these samples of .beton files."""
    source = BetonSource(files, **fields)
    problems, checksums = [], np.zeros(len(numbers), np.uint64)
    for place, i in enumerate(numbers):
        try:
            data = source.read(i)
            checksums[place] = encoded.checksum(memoryview(data)[-int(source.lengths[i]) :])
            header = encoded.check(data, int(source.heights[i]), int(source.widths[i]))
            if decode:
                prove(data, header)
        except ValueError as error:
            problems.append(f"{source.describe(i)}: {error}")
        except OSError as error:  # names the sample itself
            problems.append(str(error))
    return problems, checksums

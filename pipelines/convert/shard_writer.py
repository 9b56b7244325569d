"""Writes one shard: input files through the rules of `convert` into a WebDataset tar or a .beton, in a worker."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from byolt.files.atomic import sha256_of, writing
from byolt.pipelines import philox
from byolt.pipelines.convert import ffcv_engine
from byolt.pipelines.convert import from_shards as datasets
from byolt.pipelines.convert.beton_writer import PAGE_SIZE, BetonWriter, PageTooSmallError, page_size_for
from byolt.pipelines.convert.from_files import Entry, Reader
from byolt.pipelines.convert.rules import to_jpeg, to_raw
from byolt.pipelines.formats.encoded import inspect, ppm_pixels
from byolt.pipelines.formats.index import SAMPLE, index_beton, index_tar
from byolt.pipelines.manifest import Shard

_RAW_STREAM = 0xFFFE  # of random numbers: which samples become raw


class Unusable(Exception):
    """An input that --strict does not forgive; the message is for the user."""


@dataclass(frozen=True)
class Job:
    """One shard: which entries, under which sample numbers, to which file (.tar or .beton), by which rules.

    `rules` are keyword arguments of `convert.to_raw`; `engine` is "own", or "ffcv" for that library's writer.
    """

    source: tuple[Path, str, str]
    entries: list[tuple[int, Entry]]
    digits: int
    shard: Path
    note: Path
    rules: dict[str, Any]
    quality: int
    strict: bool
    seed: int = 0
    raw_fraction: float = 0.0
    engine: str = "own"


class Done(NamedTuple):
    """What a finished shard's note says. `shard` is None where no sample was left for it."""

    shard: Shard | None
    records: np.ndarray
    quarantine: list[dict[str, str]]


class Sample(NamedTuple):
    """A usable input: how it is called, its encoded image, what is noted with it, and where it came from."""

    key: str
    data: bytes
    info: dict[str, Any]
    entry: Entry


_counters: Any = None  # images done, bytes done, and 1 to stop; shared by all workers


def start_worker(counters: Any) -> None:
    """Called once in each worker."""
    global _counters
    _counters = counters
    _reader.cache_clear()


@lru_cache(maxsize=1)
def _reader(source: tuple[Path, str, str]) -> Reader | datasets.DataSetReader:
    """One for all shards of a worker: the directory of a zip is parsed when it is opened."""
    return datasets.DataSetReader(source[0]) if source[1] == datasets.KIND else Reader(*source)


def make_shard(job: Job) -> None:
    """Streams the entries of one shard into its file; its note, written last, says that it is whole."""
    page_size, counted = PAGE_SIZE, 0
    while True:
        samples = _Samples(job, counted)
        try:
            with writing(job.shard) as file:
                number = _write(job, file, samples, page_size)
            break
        except PageTooSmallError as error:  # known only when the image was made
            page_size, counted = error.page_size, samples.counted
    if number:
        records = index_tar(job.shard).records if job.shard.suffix == ".tar" else index_beton(job.shard)
        shard = Shard(job.shard.name, job.shard.stat().st_size, sha256_of(job.shard), number)
    else:
        job.shard.unlink()
        records, shard = np.empty(0, SAMPLE), None
    note = {"shard": shard, "records": records.tolist(), "quarantine": samples.quarantine}
    with writing(job.note) as file:
        file.write(json.dumps(note).encode())


class _Samples:
    """Iterates once over what can be used of a job's entries; the rest is in `quarantine` afterwards."""

    def __init__(self, job: Job, counted: int) -> None:
        """`counted` entries were counted as done before."""
        self.job, self.counted = job, counted
        self.quarantine: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[Sample]:
        job, reader = self.job, _reader(self.job.source)
        numbers = np.array([number for number, _ in job.entries])
        raw = philox.uniform(job.seed, 0, numbers, _RAW_STREAM, 1)[0] < job.raw_fraction
        for place, (number, entry) in enumerate(job.entries):
            if _counters[2]:
                raise Unusable("stopped")
            try:
                data = _convert(job, reader.read(entry), bool(raw[place]))
                inspect(data)  # training refuses more than MAX_PIXELS, whatever --max-pixels is
            except ValueError as error:
                if job.strict:
                    raise Unusable(f"{entry.name}: {error} (--strict)") from None
                self.quarantine.append({"file": entry.name, "reason": str(error)})
            else:
                info = json.loads(entry.info) if entry.info else {"file": entry.name}
                yield Sample(entry.key or f"{number:0{job.digits}d}", data, info, entry)
            if place >= self.counted:
                self.counted = place + 1
                with _counters.get_lock():
                    _counters[0] += 1
                    _counters[1] += entry.length


def _convert(job: Job, data: bytes, raw: bool) -> bytes:
    if job.shard.suffix == ".beton" and (raw or data[:3] == b"P6\n"):
        return to_raw(data, **job.rules)
    return to_jpeg(data, quality=job.quality, **job.rules)


def _write(job: Job, file: BinaryIO, samples: _Samples, page_size: int) -> int:
    """Writes the shard; returns the number of its samples."""
    if job.engine == "ffcv":
        return _write_with_ffcv(job, Path(file.name), samples)
    number = 0
    if job.shard.suffix == ".beton":
        with BetonWriter(file, len(job.entries), page_size) as beton:
            for sample in samples:
                beton.add(sample.key, sample.data, sample.entry.label, sample.info)
        return beton.count
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for sample in samples:
            number += 1
            _add(out, f"{sample.key}.jpg", sample.data)
            if sample.entry.label >= 0:
                _add(out, f"{sample.key}.cls", str(sample.entry.label).encode())
            _add(out, f"{sample.key}.json", json.dumps(sample.info).encode())
    return number


def _write_with_ffcv(job: Job, path: Path, samples: _Samples) -> int:
    """ffcv takes pixels and encodes them itself: the images are proven first, and read again for it."""
    entries, rows, largest = [], [], 0
    for sample in samples:
        header = inspect(sample.data)
        note = {"key": sample.key, **sample.info}
        largest = max(largest, 3 * (header.height + 1) * (header.width + 1) + len(json.dumps(note)) + 1)
        entries.append(sample.entry)
        rows.append((sample.entry.label, note))

    def pixels(i: int) -> npt.NDArray[np.uint8]:
        data = to_raw(_reader(job.source).read(entries[i]), max_pixels=job.rules["max_pixels"], decode=False)
        header = inspect(data)
        return np.frombuffer(ppm_pixels(data, header), np.uint8).reshape(header.height, header.width, 3)

    if rows:
        ffcv_engine.write(
            path,
            pixels,
            rows,
            page_size=page_size_for(largest),
            raw_fraction=job.raw_fraction,
            max_size=job.rules["max_size"],
            quality=job.quality,
            seed=job.seed + job.entries[0][0],
        )
    return len(rows)


def _add(out: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults are fixed: mode 0644, uid, gid and mtime 0
    info.size = len(data)
    out.addfile(info, io.BytesIO(data))


def read_note(job: Job) -> Done | None:
    """The note of a finished shard, or None where the shard has to be made (again)."""
    try:
        note = json.loads(job.note.read_bytes())
        shard = Shard(*note["shard"]) if note["shard"] else None
        if shard and job.shard.stat().st_size != shard.size:
            return None
    except (FileNotFoundError, ValueError):
        return None
    return Done(shard, np.array([tuple(row) for row in note["records"]], SAMPLE), note["quarantine"])

"""Writes one shard: input files through the rules of `convert` into a WebDataset tar, in a worker."""

import io
import json
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.convert import to_jpeg
from pipelines.encoded import inspect
from pipelines.index import index_tar
from pipelines.originals import Entry, Reader
from pipelines.shards import SAMPLE, Shard, Temporary, file_sha256


class Unusable(Exception):
    """An input that --strict does not forgive; the message is for the user."""


@dataclass(frozen=True)
class Job:
    """One shard: which entries, under which sample numbers, to which file, by which rules."""

    source: tuple[Path, str, str]
    entries: list[tuple[int, Entry]]
    digits: int
    shard: Path
    note: Path
    rules: dict[str, int]
    strict: bool


class Done(NamedTuple):
    """What a finished shard's note says. `shard` is None where no sample was left for it."""

    shard: Shard | None
    records: np.ndarray
    quarantine: list[dict[str, str]]


_counters: Any = None  # images done, bytes done, and 1 to stop; shared by all workers


def start_worker(counters: Any) -> None:
    """Called once in each worker."""
    global _counters
    _counters = counters
    _reader.cache_clear()


@lru_cache(maxsize=1)
def _reader(source: tuple[Path, str, str]) -> Reader:
    """One for all shards of a worker: the directory of a zip is parsed when it is opened."""
    return Reader(*source)


def make_shard(job: Job) -> None:
    """Streams the entries of one shard into a tar; its note, written last, says that it is whole."""
    reader = _reader(job.source)
    quarantine = []
    samples = 0
    with (
        Temporary(job.shard) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as out,
    ):
        for number, entry in job.entries:
            if _counters[2]:
                raise Unusable("stopped")
            try:
                data = to_jpeg(reader.read(entry), **job.rules)
                inspect(data)  # training refuses more than MAX_PIXELS, whatever --max-pixels is
            except ValueError as error:
                if job.strict:
                    raise Unusable(f"{entry.name}: {error} (--strict)") from None
                quarantine.append({"file": entry.name, "reason": str(error)})
            else:
                _add_sample(out, f"{number:0{job.digits}d}", data, entry)
                samples += 1
            with _counters.get_lock():
                _counters[0] += 1
                _counters[1] += entry.length
    if samples:
        records = index_tar(job.shard).records
        shard = Shard(job.shard.name, job.shard.stat().st_size, file_sha256(job.shard), samples)
    else:
        job.shard.unlink()
        records, shard = np.empty(0, SAMPLE), None
    note = {"shard": shard, "records": records.tolist(), "quarantine": quarantine}
    with Temporary(job.note) as file:
        file.write(json.dumps(note).encode())


def _add_sample(out: tarfile.TarFile, key: str, data: bytes, entry: Entry) -> None:
    _add(out, f"{key}.jpg", data)
    if entry.label >= 0:
        _add(out, f"{key}.cls", str(entry.label).encode())
    _add(out, f"{key}.json", json.dumps({"file": entry.name}).encode())


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

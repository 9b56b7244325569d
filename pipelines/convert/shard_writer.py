"""Writes one shard, in a worker: reads its images, applies the rules, and writes a WebDataset tar or a .beton."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from byolt.files.atomic import sha256_of, writing
from byolt.pipelines import philox
from byolt.pipelines.convert import ffcv_engine
from byolt.pipelines.convert.beton_writer import PAGE_SIZE, BetonWriter, PageTooSmallError, page_size_for
from byolt.pipelines.convert.from_files import FileReader
from byolt.pipelines.convert.from_shards import DataSetReader
from byolt.pipelines.convert.inputs import InputImage, RefusedFile
from byolt.pipelines.convert.plan import ShardTask
from byolt.pipelines.convert.rules import to_jpeg, to_raw
from byolt.pipelines.formats.encoded import inspect, ppm_pixels
from byolt.pipelines.formats.index import SAMPLE, index_beton, index_tar
from byolt.pipelines.manifest import Shard

_RAW_STREAM = 0xFFFE  # of random numbers: which samples become raw


class UnusableInputError(Exception):
    """No input can be used, or with --strict one cannot. The message is for the user."""


class FinishedShard(NamedTuple):
    """The content of a finished shard's note. `shard` is None if all of its images were refused."""

    shard: Shard | None
    records: np.ndarray
    refused: list[RefusedFile]


class ConvertedImage(NamedTuple):
    """A sample before it is written: its key, encoded image, note, and origin."""

    key: str
    data: bytes
    info: dict[str, Any]
    origin: InputImage


_counters: Any = None  # images done, bytes done, and 1 to stop; shared by all workers


def start_worker(counters: Any) -> None:
    """Called once in each worker."""
    global _counters
    _counters = counters
    _reader.cache_clear()


@lru_cache(maxsize=1)
def _reader(path: Path, is_data_set: bool) -> FileReader | DataSetReader:
    """One for all shards of a worker."""
    return DataSetReader(path) if is_data_set else FileReader(path)


def make_shard(task: ShardTask) -> None:
    """Writes the shard, then its note, which says that the shard is whole."""
    page_size, counted = PAGE_SIZE, 0
    while True:
        samples = _Samples(task, counted)
        try:
            with writing(task.shard) as file:
                number = _write(task, file, samples, page_size)
            break
        except PageTooSmallError as error:  # the size of a raw image is known only when it was decoded
            page_size, counted = error.page_size, samples.counted
    if number:
        records = index_tar(task.shard).records if task.shard.suffix == ".tar" else index_beton(task.shard)
        shard = Shard(task.shard.name, task.shard.stat().st_size, sha256_of(task.shard), number)
    else:
        task.shard.unlink()
        records, shard = np.empty(0, SAMPLE), None
    quarantine = [row._asdict() for row in samples.refused]
    with writing(task.note) as file:
        note = {"shard": shard, "records": records.tolist(), "quarantine": quarantine}
        file.write(json.dumps(note).encode())


def read_note(task: ShardTask) -> FinishedShard | None:
    """Reads the note of a finished shard; None if the shard has to be made (again)."""
    try:
        note = json.loads(task.note.read_bytes())
        shard = Shard(*note["shard"]) if note["shard"] else None
        if shard and task.shard.stat().st_size != shard.size:
            return None
    except (FileNotFoundError, ValueError):
        return None
    records = np.array([tuple(row) for row in note["records"]], SAMPLE)
    return FinishedShard(shard, records, [RefusedFile(**row) for row in note["quarantine"]])


class _Samples:
    """Iterates once over the usable images of a task; afterwards `refused` lists the others."""

    def __init__(self, task: ShardTask, counted: int) -> None:
        """The first `counted` images are in the counters already."""
        self.task, self.counted = task, counted
        self.refused: list[RefusedFile] = []

    def __iter__(self) -> Iterator[ConvertedImage]:
        task, options = self.task, self.task.options
        numbers = np.array([number for number, _ in task.images])
        raw = philox.uniform(options.seed, 0, numbers, _RAW_STREAM, 1)[0] < options.raw_fraction
        for place, (number, image) in enumerate(task.images):
            if _counters[2]:
                raise UnusableInputError("stopped")
            try:
                data = _convert(task, image, bool(raw[place]))
                inspect(data)  # training refuses more than MAX_PIXELS, whatever --max-pixels is
            except ValueError as error:
                self.refused.append(RefusedFile(image.name, str(error)))
                if options.strict:
                    raise strict_error(self.refused) from None
            else:
                info = json.loads(image.info) if image.info else {"file": image.name}
                yield ConvertedImage(image.key or f"{number:0{task.digits}d}", data, info, image)
            if place >= self.counted:
                self.counted = place + 1
                with _counters.get_lock():
                    _counters[0] += 1
                    _counters[1] += image.length


def strict_error(refused: list[RefusedFile]) -> UnusableInputError:
    """The error for the first refused file of a conversion with --strict."""
    return UnusableInputError(f"{refused[0].file}: {refused[0].reason} (--strict)")


def _convert(task: ShardTask, image: InputImage, raw: bool) -> bytes:
    data, options = _reader(*task.source).read(image), task.options
    as_pixels = options.format == "beton" and (raw or data[:3] == b"P6\n")
    convert: Callable[..., bytes] = to_raw if as_pixels else partial(to_jpeg, quality=options.quality)
    return convert(data, max_size=options.max_size, max_pixels=options.max_pixels, decode=task.decode)


def _write(task: ShardTask, file: BinaryIO, samples: _Samples, page_size: int) -> int:
    """Writes the shard; returns the number of its samples."""
    if task.options.engine == "ffcv":
        return _write_with_ffcv(task, Path(file.name), samples)
    if task.options.format == "beton":
        beton = BetonWriter(file, len(task.images), page_size)
        for sample in samples:
            beton.add(sample.key, sample.data, sample.origin.label, sample.info)
        beton.finish()
        return beton.count
    number = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for sample in samples:
            number += 1
            _add(out, f"{sample.key}.jpg", sample.data)
            if sample.origin.label >= 0:
                _add(out, f"{sample.key}.cls", str(sample.origin.label).encode())
            _add(out, f"{sample.key}.json", json.dumps(sample.info).encode())
    return number


def _add(out: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults are fixed: mode 0644, uid, gid and mtime 0
    info.size = len(data)
    out.addfile(info, io.BytesIO(data))


def _write_with_ffcv(task: ShardTask, path: Path, samples: _Samples) -> int:
    """ffcv takes pixels and encodes them itself: the images are fully decoded as a check, then read again for it."""
    options = task.options
    images, rows, largest = [], [], 0
    for sample in samples:
        header = inspect(sample.data)
        note = {"key": sample.key, **sample.info}
        largest = max(largest, 3 * (header.height + 1) * (header.width + 1) + len(json.dumps(note)) + 1)
        images.append(sample.origin)
        rows.append((sample.origin.label, note))

    def pixels(i: int) -> npt.NDArray[np.uint8]:
        data = _reader(*task.source).read(images[i])
        data = to_raw(data, max_pixels=options.max_pixels, decode=False)
        header = inspect(data)
        return np.frombuffer(ppm_pixels(data, header), np.uint8).reshape(header.height, header.width, 3)

    if rows:
        seed = options.seed + task.images[0][0]
        ffcv_engine.write(path, pixels, rows, options, page_size_for(largest), seed)
    return len(rows)

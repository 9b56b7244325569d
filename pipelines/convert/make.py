"""Makes data sets: runs a conversion from SRC to DST, or writes the manifest of tars that were made elsewhere.

Steps of a conversion: list the inputs, plan the shards, write those that are missing, write the manifests. A killed
conversion continues with the shards that have no note yet.
"""

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from byolt.files.atomic import sha256_of, writing
from byolt.files.console import count, shown
from byolt.files.lock import Lock
from byolt.files.paths import searched
from byolt.files.progress import Meter
from byolt.files.storage.store import Store
from byolt.pipelines.convert import ffcv_engine
from byolt.pipelines.convert.destination import QUARANTINE, Upload, claim, is_finished
from byolt.pipelines.convert.from_files import list_files
from byolt.pipelines.convert.from_shards import is_data_set, list_data_set
from byolt.pipelines.convert.inputs import Inputs, RefusedFile
from byolt.pipelines.convert.plan import (
    WORK,
    ConversionOptions,
    ShardTask,
    parse_split,
    plan,
    recorded_settings,
)
from byolt.pipelines.convert.shard_writer import (
    FinishedShard,
    UnusableInputError,
    make_shard,
    read_note,
    start_worker,
    strict_error,
)
from byolt.pipelines.convert.workers import collect, spread
from byolt.pipelines.formats.index import DOTTED, Scan, scan_tar
from byolt.pipelines.formats.labels import class_names, numbers_of
from byolt.pipelines.manifest import MANIFEST, NAMED_LABELS, SAMPLES, Manifest, Shard, join
from byolt.pipelines.remote.cache import Cache
from byolt.pipelines.remote.dataset import digest, fetched, open_cache
from byolt.pipelines.remote.urls import RemotePath


def make(options: ConversionOptions, say: Callable[[str], object], upload: Upload | None = None) -> str:
    """Makes the data set, or one for each part of the split; returns a line that says what was made.

    `say` is called with each note to the user; `upload` gets each finished shard, also of a killed conversion's.

    Raises:
        ValueError: A mistake in the options or in SRC, which may hold no image; DST holds something else.
        UnusableInputError: With `strict`, an image cannot be used.
        OSError: The disk is full or fails.
    """
    src, dst = options.src, options.dst
    split = parse_split(options.split)
    for folder in (dst, *(dst / name for name in split)):
        if src.is_dir() and folder.resolve().is_relative_to(src.resolve()):
            raise ValueError(f"DST {folder} is SRC {src}, or inside of it: name another folder")
    if options.engine == "ffcv":
        ffcv_engine.require()
    from_data_set = _is_from_data_set(options)
    work = dst / WORK
    is_new = not dst.exists()
    work.mkdir(parents=True, exist_ok=True)
    with Lock(work / "lock", f"DST {dst}") as lock:
        if note := lock.take():
            say(note)
        try:
            if from_data_set:
                inputs = list_data_set(src)
            else:
                inputs = list_files(src, options.inside, work, options.labels, options.only)
            settings = recorded_settings(inputs, options)
            if options.strict and inputs.refused:
                raise strict_error(inputs.refused)
            tasks = plan(inputs, options)
            is_there = upload is not None and upload.is_finished(split, settings)
            if is_there or is_finished(dst, split, settings, options.strict):
                shutil.rmtree(work)
                return f"{dst}: already done"
            claim(work, dst, split, {**settings, "source_modified": inputs.modified()})
        except BaseException:
            if not (work / "settings.json").exists():
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    if is_new:
                        dst.rmdir()
            raise
        for note in inputs.notes:
            say(note)
        start = time.perf_counter()
        todo = []
        for task in (task for part in tasks.values() for task in part):
            if read_note(task) is None:
                todo.append(task)
            elif upload:
                upload.add(task.shard)
        _run(todo, options.workers, len(inputs.images), upload)
        summary = commit(options, tasks, inputs, settings)
        seconds = time.perf_counter() - start
        shutil.rmtree(work)
    made = sum(len(task.images) for task in todo)
    return f"{summary}, {seconds:.1f} s, {made / seconds:,.0f} images/s"


def _is_from_data_set(options: ConversionOptions) -> bool:
    """Whether SRC is a data set that was made before, all of it. Raises ValueError if the options do not fit SRC."""
    src = options.src
    if not is_data_set(src) or {*options.only} not in (set(), {path.name for path in src.glob("*.tar")}):
        if not src.exists():
            raise ValueError(f"SRC {src} does not exist{searched(str(src))}")
        return False
    if options.labels:
        raise ValueError(f"--labels {options.labels}: SRC {src} is a data set, which has labels of its own")
    if options.inside:
        raise ValueError(f"--inside {options.inside}: SRC {src} is a data set, which has no folders")
    return True


def _run(tasks: list[ShardTask], workers: int, num_images: int, upload: Upload | None) -> None:
    """Writes the shards of these tasks; `num_images` includes those of finished shards."""
    counters = get_context("spawn").Array("q", 3)
    kept = num_images - sum(len(task.images) for task in tasks)
    with spread(make_shard, tasks, workers, start_worker, (counters,)) as pending:
        try:
            start = time.perf_counter()
            with Meter("image", num_images, kept, line_every=5.0) as meter:
                waiting = dict(zip(pending, tasks, strict=True))
                while waiting:
                    done, _ = futures.wait(waiting, 0.2, futures.FIRST_COMPLETED)
                    images, size = counters[:2]
                    seconds = time.perf_counter() - start
                    text = f"{images / seconds:,.0f} images/s  {size / seconds / 1e6:,.1f} MB/s"
                    meter.update(kept + images, text if images else "")
                    for future in done:
                        future.result()
                        task = waiting.pop(future)
                        if upload:
                            upload.add(task.shard)
        except BaseException:
            counters[2] = 1  # each worker ends at its next image
            raise


def commit(
    options: ConversionOptions, tasks: dict[str, list[ShardTask]], inputs: Inputs, settings: dict[str, Any]
) -> str:
    """Writes the quarantine list, then the manifest of each part; returns a summary."""
    dst = options.dst
    parts = {name: [_finished(task) for task in part] for name, part in tasks.items()}
    refused = inputs.refused + [row for part in parts.values() for note in part for row in note.refused]
    if options.strict and refused:  # in shards that an earlier start made, without --strict
        raise strict_error(refused)
    _write_quarantine(dst, refused)
    manifests = {}
    for name, part in parts.items():
        shards = [note.shard for note in part if note.shard is not None]
        if not shards:
            shutil.rmtree(dst / WORK)  # another SRC may be tried
            raise ValueError(
                f"SRC {options.src}: no file{f' for {name}' if name else ''} is an image, see {dst / QUARANTINE}"
            )
        records = join(note.records for note in part if note.shard is not None)
        manifests[name] = Manifest(shards, records, inputs.classes, settings)
    for name, manifest in manifests.items():
        manifest.save(dst / name)
    *others, last = (len(manifest.samples) for manifest in manifests.values())
    samples = " + ".join([*(f"{number:,}" for number in others), count(last, "sample")])
    number = sum(len(manifest.shards) for manifest in manifests.values())
    labeled = sum(int((manifest.samples["label"] >= 0).sum()) for manifest in manifests.values())
    if inputs.classes:
        labels = f"{len(inputs.classes):,} class{'es' * (len(inputs.classes) != 1)}"
    else:
        labels = count(labeled, "label") if labeled else "no labels"
    return f"{dst}: {samples} in {count(number, 'shard')}, {labels}, {len(refused)} in quarantine"


def _finished(task: ShardTask) -> FinishedShard:
    note = read_note(task)
    if note is None:
        raise UnusableInputError(f"{task.shard} was changed by another process: start again")
    return note


def _write_quarantine(folder: Path, refused: list[RefusedFile]) -> None:
    with writing(folder / QUARANTINE) as file:
        for row in sorted(refused, key=lambda row: row.file):
            file.write(json.dumps(row._asdict()).encode() + b"\n")


def index(folder: Path, workers: int, strict: bool, out: Path | None = None) -> str:
    """Writes manifest and quarantine list of the WebDataset tars of a folder; returns a summary.

    They are written to the folder itself or to `out`, which then gets links to the tars.

    Raises:
        ValueError: Nothing to index, a damaged tar, a manifest is there already, or `folder` is read-only.
        UnusableInputError: With `strict`, a sample that cannot be used.
    """
    if not folder.is_dir():
        raise ValueError(f"--index {folder}: not a folder")
    out = out or folder
    if (out / MANIFEST).exists():
        raise ValueError(f"--index {folder}: {out / MANIFEST} exists already: remove it to index again")
    if out == folder and not os.access(folder, os.W_OK):
        raise ValueError(
            f"--index {folder}: is read-only: --manifest FOLDER writes the manifest there, with links to the tars"
        )
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"--index {folder}: holds no .tar (decompress .tar.gz: it has no random access)")
    scans = collect(_scan, paths, workers)
    manifest, refused, counts = _index_of([path.name for path in paths], scans, str(folder), strict)
    if out != folder:
        _link(paths, out)
    _write_quarantine(out, refused)
    manifest.save(out)
    return f"{out}: {counts}"


def index_url(url: RemotePath, workers: int, strict: bool, out: Path | None = None) -> str:
    """`index` for tars at a URL, each of which is fetched, read and removed; writes the lists there, or to `out`.

    Raises:
        ValueError, UnusableInputError: See `index`.
        RemoteError: The tars cannot be read, or the lists cannot be written.
    """
    if url.folder.startswith("http") and out is None:
        raise ValueError(
            f"--index {url.text}: nothing can be written over HTTP: --manifest FOLDER writes the manifest there, to be "
            "copied beside the tars"
        )
    store, cache = Store(url.folder), open_cache()
    entries = store.list()
    if entries is not None and MANIFEST in entries:
        raise ValueError(f"--index {url.text}: {MANIFEST} exists already: remove it to index again")
    names = url.names or sorted(name for name in entries or {} if name.endswith(".tar"))
    if not names:
        unlisted = "HTTP does not list a folder: write shard-{000000..000099}.tar"
        raise ValueError(f"--index {url.text}: {unlisted if entries is None else 'holds no .tar'}")
    sizes = [entries[name].size if entries and name in entries else store.head(name).size for name in names]
    key = f"{digest(url.folder.encode())}-index"
    jobs = [(store, cache, key, *job) for job in zip(names, sizes, strict=True)]
    scans = collect(_scan_fetched, jobs, workers)
    manifest, refused, counts = _index_of(names, scans, url.text, strict)
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        _write_quarantine(folder, refused)
        manifest.save(folder)
        for name in (QUARANTINE, SAMPLES, MANIFEST) if out is None else ():
            store.put(name, folder / name)
    return f"{out or url.folder}: {counts}"


def _index_of(
    names: list[str], scans: list[tuple[int, str, Scan]], folder: str, strict: bool
) -> tuple[Manifest, list[RefusedFile], str]:
    """The manifest of scanned tars, the refused samples, and a summary."""
    classes = class_names(text for _, _, scan in scans for text in scan.labels)
    found = [scan.numbered(numbers_of(classes)) for _, _, scan in scans]
    shards = [
        Shard(name, size, sha256, len(part.records))
        for name, (size, sha256, _), part in zip(names, scans, found, strict=True)
    ]
    refused = [
        RefusedFile(f"{shard.name}: {key}", why)
        for shard, part in zip(shards, found, strict=True)
        for key, why in part.refused
    ]
    if strict and refused:
        raise strict_error(refused)
    records = join(part.records for part in found)
    imageless = sum(part.imageless for part in found)
    counts = f"{len(refused)} in quarantine, {count(imageless, 'name')} without an image"
    if dotted := sum(part.dotted for part in found):
        counts += f", {DOTTED.format(dotted)}"
    if kinds := sum((Counter(part.kinds) for part in found), Counter()):
        listed = shown(f"{number} .{kind}" for kind, number in sorted(kinds.items()))
        counts += f", to be converted with tools/make_shards.py {folder} DST: {listed}"
    if not len(records):
        example = f", for example {refused[0].file}: {refused[0].reason}" if refused else ""
        raise ValueError(f"--index {folder}: no sample can be used: {counts}{example}")
    settings = {"indexed": True, **({NAMED_LABELS: True} if classes else {})}
    labeled = int((records["label"] >= 0).sum())
    size = f"{count(len(records), 'sample')} in {count(len(names), 'shard')}"
    return Manifest(shards, records, classes, settings), refused, f"{size}, {labeled:,} labeled, {counts}"


def _link(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        link = folder / path.name
        if not (link.exists() and link.samefile(path)):
            link.symlink_to(path.resolve())


def _scan(path: Path) -> tuple[int, str, Scan]:
    return path.stat().st_size, sha256_of(path), scan_tar(path)


def _scan_fetched(job: tuple[Store, Cache, str, str, int]) -> tuple[int, str, Scan]:
    store, _, _, name, _ = job
    with fetched(*job) as path:
        try:
            return _scan(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), f"{store.url}/{name}")) from None

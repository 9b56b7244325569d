"""The folder that a conversion writes to: its settings, whether it is finished, and its way to a URL."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byolt.files.atomic import remove_leftovers, writing
from byolt.files.rows import read_rows
from byolt.pipelines.convert.inputs import RefusedFile
from byolt.pipelines.convert.plan import SUFFIXES, differences
from byolt.pipelines.convert.shard_writer import strict_error
from byolt.pipelines.manifest import MANIFEST, Manifest
from byolt.pipelines.remote.dataset import digest, open_cache
from byolt.pipelines.remote.store import Store
from byolt.pipelines.remote.urls import RemotePath
from byolt.pipelines.sources import open_source

QUARANTINE = "quarantine.jsonl"


def is_finished(dst: Path, split: dict[str, float], settings: dict[str, Any], strict: bool) -> bool:
    """Whether the data sets of all parts are there.

    Raises:
        ValueError: They were made with other settings, or are damaged.
        UnusableInputError: With `strict`, an image is in their quarantine list.
    """
    finished = [name for name in split if (dst / name / MANIFEST).exists()]
    for name in finished:
        difference = differences(Manifest.load(dst / name).settings, settings)
        if difference:
            raise ValueError(f"DST {dst} holds a finished data set: {difference}: name another folder")
        open_source(dst / name)  # every shard is there and has its size
    if len(finished) < len(split):
        return False
    if strict and (dst / QUARANTINE).stat().st_size:
        rows = read_rows(dst / QUARANTINE, file=str, reason=str)
        raise strict_error([RefusedFile(**row) for row in rows] or [RefusedFile(QUARANTINE, "damaged")])
    return True


def claim(work: Path, dst: Path, split: dict[str, float], settings: dict[str, Any]) -> None:
    """Prepares the folder for shards: records the settings, or compares them with those of a killed conversion.

    Raises:
        ValueError: The settings differ, or there are shards already.
    """
    for name in split:
        (dst / name).mkdir(exist_ok=True)
    path = work / "settings.json"
    if path.exists():
        difference = differences(json.loads(path.read_bytes()), settings)
        if difference:
            raise ValueError(
                f"DST {dst} is unfinished and has other settings: {difference}: use those, or remove it"
            )
    else:
        shards = [
            path for name in split for path in (dst / name).iterdir() if path.suffix in SUFFIXES.values()
        ]
        if shards:
            raise ValueError(
                f"DST {dst} already holds {shards[0].name} without a manifest: name another folder"
            )
        with writing(path) as file:
            file.write(json.dumps(settings).encode())
    for folder in (work, dst, *(dst / name for name in split)):
        remove_leftovers(folder)


def scratch_of(url: RemotePath) -> Path:
    """The local folder in which the data set for a URL is made; the same one when it is continued.

    Raises:
        ValueError: There is a data set already, or the URL names files.
    """
    if url.names or url.folder.startswith("http"):
        raise ValueError(f"DST {url.text}: name a folder at s3, gs or az: nothing can be written over HTTP")
    if MANIFEST in (Store(url.folder).list() or {}):
        raise ValueError(f"DST {url.text} holds a data set: name another folder")
    return open_cache().folder.with_name("byolt-make") / digest(url.folder.encode())


def upload(folder: Path, url: RemotePath, say: Callable[[str], object]) -> None:
    """Copies a finished data set, or those of a split, to a URL, each manifest after all else; removes the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
        place = path.relative_to(folder)
        Store(f"{url.folder}/{place.parent.as_posix()}".removesuffix("/.")).put(path.name, path)
        say(f"uploaded {url.folder}/{place.as_posix()}")
    shutil.rmtree(folder)

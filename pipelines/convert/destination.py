"""The folder that a conversion writes to: its settings, whether it is finished, and its way to a URL."""

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from byolt.files import failpoint
from byolt.files.atomic import remove_leftovers, writing
from byolt.files.paths import MissingDataError
from byolt.files.rows import read_rows
from byolt.files.storage.retry import MissingError
from byolt.files.storage.store import Entry, Store
from byolt.pipelines.convert.inputs import RefusedFile
from byolt.pipelines.convert.plan import SUFFIXES, differences
from byolt.pipelines.convert.shard_writer import strict_error
from byolt.pipelines.manifest import MANIFEST, Manifest
from byolt.pipelines.remote.dataset import RemoteData, digest, open_cache
from byolt.pipelines.remote.urls import RemotePath, parse
from byolt.pipelines.sources import open_source

QUARANTINE = "quarantine.jsonl"
_UPLOADED = ".uploaded"  # ends the names of folders that are being removed


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


def scratch_of(url: RemotePath, split: dict[str, float]) -> Path:
    """The local folder in which the data set for a URL is made; the same one when it is continued.

    Raises:
        ValueError: There are shards of another program, or the URL names files.
    """
    if url.names or url.folder.startswith("http"):
        raise ValueError(f"DST {url.text}: name a folder at s3, gs or az: nothing can be written over HTTP")
    scratch = open_cache().folder.with_name("byolt-make") / digest(url.folder.encode())
    for left in scratch.parent.glob(f"*{_UPLOADED}"):
        shutil.rmtree(left, ignore_errors=True)
    for name in split:
        store = Store(f"{url.folder}/{name}".rstrip("/"))
        there = store.list() or {}
        shards = sorted(other for other in there if other.endswith(tuple(SUFFIXES.values())))
        if shards and MANIFEST not in there and store.sha256(shards[0]) is None:
            raise ValueError(
                f"DST {store.url} already holds {shards[0]} of another program: name another folder"
            )
    return scratch


class Upload:
    """Copies the files of a conversion to a URL: shards while others are being made, the manifests last.

    An object that is there already, with the size and the sha256 of the file, is not sent again.

    Attributes:
        url: The folder to copy to.
    """

    def __init__(self, folder: Path, url: RemotePath, say: Callable[[str], object]) -> None:
        """
        Args:
            folder: Of the conversion.
            url: The folder to copy it to.
            say: Called with a line for each file.
        """
        self._folder, self.url, self._say = folder, url.folder, say
        self._done: set[Path] = set()
        self._is_finished = False
        self._there: dict[str, dict[str, Entry]] = {}  # when this process began, by URL of the folder
        self._finished: SimpleQueue[Path | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._copy_shards, name="upload", daemon=True)
        self._thread.start()

    def is_finished(self, split: dict[str, float], settings: dict[str, Any]) -> bool:
        """Whether the data sets of all parts are at the URL.

        Raises:
            ValueError: They were made with other settings, or are damaged.
            RemoteError: The URL cannot be read.
        """
        found = []
        for name in split:
            place = f"{self.url}/{name}".rstrip("/")
            self._there[place] = Store(place).list() or {}
            with suppress(MissingDataError):
                found.append(RemoteData(parse(place)).manifest)
        for manifest in found:
            if difference := differences(manifest.settings if manifest else {}, settings):
                raise ValueError(
                    f"DST {self.url} holds a finished data set: {difference}: name another folder"
                )
        self._is_finished = len(found) == len(split)
        return self._is_finished

    def add(self, shard: Path) -> None:
        """Copies a finished shard in the background."""
        self._finished.put(shard)

    def finish(self) -> None:
        """Copies all files that are not there yet; removes the folder.

        Raises:
            ValueError: Another process has finished a data set there.
            RemoteError: A file cannot be written.
        """
        self._finished.put(None)
        self._thread.join()
        files = [path for path in self._folder.rglob("*") if path.is_file() and not self._is_finished]
        for path in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
            self._copy(path)
        uploaded = self._folder.rename(self._folder.with_suffix(_UPLOADED))  # a kill leaves no half of it
        shutil.rmtree(uploaded, ignore_errors=True)  # another process removes such folders too

    def _copy_shards(self) -> None:
        with suppress(OSError, ValueError):  # `finish` tries again, and reports it
            while path := self._finished.get():
                self._copy(path)

    def _copy(self, path: Path) -> None:
        if path in self._done or not path.exists():  # no image of a shard could be used
            return
        failpoint.reach("upload", len(self._done))
        place = path.relative_to(self._folder)
        store = Store(f"{self.url}/{place.parent.as_posix()}".removesuffix("/."))
        if store.url not in self._there:
            self._there[store.url] = store.list() or {}
        if MANIFEST not in self._there[store.url]:
            with suppress(MissingError):
                store.head(MANIFEST)
                raise ValueError(
                    f"DST {store.url}: another process has finished a data set there: start again"
                )
        written = store.put(path.name, path, self._there[store.url])
        url = f"{store.url}/{path.name}"
        self._say(f"uploaded {url}" if written else f"{url} is there already")
        self._done.add(path)

"""One remote folder: its objects are listed, read by ranges and written. The one file that imports obstore.

Requests run in an event loop in a thread of their own, so that a slow one can be doubled and abandoned. The loop and
obstore's own threads do not survive a fork: a child that was forked after the first request gets an error, not a hang.
"""

import asyncio
import atexit
import hashlib
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from byolt.files import stop
from byolt.files.atomic import sha256_of
from byolt.files.console import say
from byolt.files.storage import retry
from byolt.files.storage.retry import MissingError, OutageError, RemoteError

_ENDPOINTS = {  # by scheme: environment variables that lead to another server
    "s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
}
_SHA256 = "sha256"  # key of the metadata
_STALL = "3s"  # without a byte: a stalled connection
_CONNECT = "5s"
_GRACE, _SLOWEST = 10.0, 1e6  # a request may take 10 s and its bytes at 1 MB/s
_HEDGE, _LONGEST_HEDGE, _SHORTEST_HEDGE = 3.0, 5.0, 0.2  # times the median; seconds
_SLOW = 10.0  # seconds until a request is named that has not failed yet
_NOTE_AFTER, _NOTE_EVERY = 3.0, 30.0  # seconds of failures before a line about them, and between two lines
_FIRST = 15.0  # seconds until an unreachable server is taken for a mistyped one, outside a run
_SETTLE = 0.1  # seconds; without it 5 % of short commands were aborted on busy cores, none of 200 with it
_STUCK = 6.0  # seconds without an answer after which a signal ends the waiting
Result = TypeVar("Result")


class Entry(NamedTuple):
    """An object: its size in bytes, and its ETag if it has a strong one."""

    size: int
    etag: str | None


class Store:
    """The objects of one remote folder; safe from several threads, picklable.

    Args:
        url: Of the folder: s3://bucket/folder, gs://..., az://..., http(s)://host/folder.
        minutes: How long a failing request is repeated, and for how long all may fail.
        reached: Whether the server has answered before. If not, and outside a run (`stop.asked`), a host that does not
            exist or refuses connections is an error after 15 s.
    """

    def __init__(self, url: str, minutes: float = 8.0, reached: bool = False) -> None:
        self.url, self._minutes, self._reached = url, minutes, reached
        self._answered = 0.0  # time of the latest answer
        self._failing_since: float | None = None  # of all requests; None after an answer
        self._client: Any = None
        self._etags: dict[str, str | None] = {}
        self._seconds: deque[float] = deque(maxlen=64)  # of the latest requests
        self._lock = threading.Lock()
        self._running: set[asyncio.Task[Any]] = set()
        self._interrupted = False
        self._last_note = -_NOTE_EVERY

    def list(self) -> dict[str, Entry] | None:
        """The objects directly in the folder, in one LIST; None for HTTP, which has none."""
        import obstore

        if self.url.startswith("http"):
            return None

        async def attempt() -> Any:
            return await obstore.list_with_delimiter_async(self._open())

        found = self._call(self._persist("", attempt))["objects"]
        prefix = urlsplit(self.url).path.strip("/")
        entries = {}
        for meta in found:
            name = meta["path"].removeprefix(f"{prefix}/") if prefix else meta["path"]
            entries[name] = Entry(meta["size"], _strong(meta["e_tag"]))
        self._etags.update({name: entry.etag for name, entry in entries.items()})
        return entries

    def head(self, name: str) -> Entry:
        """Size and ETag of one object; later reads require this ETag."""
        import obstore

        async def attempt() -> Any:
            return await obstore.head_async(self._open(), name)

        meta = self._call(self._persist(name, attempt))
        self._etags[name] = _strong(meta["e_tag"])
        return Entry(meta["size"], self._etags[name])

    def get(self, name: str, most: int = 1 << 31) -> bytes:
        """The whole of an object of at most `most` bytes, in its newest version."""
        self._etags.pop(name, None)
        return bytes(self._call(self._persist(name, lambda: self._get(name, None, most))))

    def range(self, name: str, start: int, length: int) -> Any:
        """Bytes of an object, as a buffer.

        Raises:
            RemoteError: The request failed for good, or for `minutes`; names the object, the cause and the remedy.
        """
        return self._call(self._range(name, start, length))

    def ranges(
        self, name: str, starts: Sequence[int], lengths: Sequence[int], connections: int = 8
    ) -> Iterator[Any]:
        """Yields the bytes of several ranges of an object in their order, `connections` requests at once."""
        for first in range(0, len(starts), connections):
            part = slice(first, first + connections)
            jobs = [self._range(name, *job) for job in zip(starts[part], lengths[part], strict=True)]
            yield from self._call(_gather(jobs))

    def sha256(self, name: str) -> str | None:
        """The sha256 of an object that `put` wrote; None for one of another program."""
        import obstore

        async def attempt() -> Any:
            return await obstore.get_async(self._open(), name, options={"head": True})

        return self._call(self._persist(name, attempt)).attributes.get(_SHA256)

    def put(self, name: str, content: bytes | Path, there: Mapping[str, Entry] | None = None) -> bool:
        """Writes an object, with its sha256 as metadata, unless it is there with the same size and sha256.

        A large file is sent in parts; the object exists only when all of them have arrived.

        Args:
            name: Of the object.
            content: Its bytes, or a local file.
            there: What `list` returned before; None writes in any case.

        Returns:
            Whether it was written.
        """
        import obstore

        if self.url.startswith("http"):
            raise ValueError(
                f"{self.url}: nothing can be written over HTTP: write to a local folder, then copy it"
            )
        if isinstance(content, Path):
            size, sha256 = content.stat().st_size, sha256_of(content)
        else:
            size, sha256 = len(content), hashlib.sha256(content).hexdigest()
        found = (there or {}).get(name)
        with suppress(MissingError):  # it has been removed since
            if found and found.size == size and self.sha256(name) == sha256:
                return False

        async def attempt() -> Any:
            client = _client(self.url, writing=True)
            return await obstore.put_async(client, name, content, attributes={_SHA256: sha256})

        self._call(self._persist(name, attempt), answers=False)
        return True

    def delete(self, name: str) -> None:
        """Removes an object."""
        import obstore

        async def attempt() -> Any:
            return await obstore.delete_async(self._open(), name)

        self._call(self._persist(name, attempt))

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While the block runs, requests fail at once."""
        self._interrupted, self._failing_since = True, None
        try:
            for task in list(self._running):
                _event_loop().call_soon_threadsafe(task.cancel)
            yield
        finally:
            self._interrupted = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url, self._minutes, self._reached)

    def _open(self) -> Any:
        with self._lock:
            if self._client is None:
                try:
                    self._client = _client(self.url)
                except RemoteError:
                    raise
                except Exception as error:  # of many kinds: settings in the environment that do not fit
                    raise RemoteError(f"{self.url} cannot be opened: {retry.cause(error)}") from None
            return self._client

    async def _range(self, name: str, start: int, length: int) -> Any:
        async def attempt() -> Any:
            return await self._get(name, (start, start + length))

        return await self._persist(name, attempt, _GRACE + length / _SLOWEST)

    async def _get(self, name: str, span: tuple[int, int] | None, most: int = 1 << 62) -> Any:
        import obstore

        options: Any = {"range": span} if span else {}
        if etag := self._etags.get(name):
            options["if_match"] = etag
        result = await obstore.get_async(self._open(), name, options=options)
        if (size := result.meta["size"]) > most and not span:
            raise RemoteError(
                f"{self.url}/{name} has {size:,} bytes, {most:,} at most are read: check the URL"
            )
        data = await result.bytes_async()
        if span and len(data) != span[1] - span[0]:
            raise RemoteError(
                f"{self.url}/{name} has {result.meta['size']:,} bytes, and bytes {span[0]:,} to {span[1]:,} are asked "
                "for: it is not the object that the manifest describes: upload it again"
            )
        if self._etags.setdefault(name, found := _strong(result.meta["e_tag"])) not in (None, found):
            raise RemoteError(f"{self.url}/{name}: {': '.join(retry.CHANGED)}")  # If-Match was ignored
        return data

    def _call(self, work: Coroutine[Any, Any, Result], answers: bool = True) -> Result:
        """Runs it in the event loop, and waits.

        Args:
            work: The requests.
            answers: Whether the server should answer within seconds; it does not while a large object is sent.

        Raises:
            InterruptedError: The run got a signal, and the server does not answer, or training has not begun.
        """
        if self._interrupted:
            work.close()
            raise RemoteError(f"{self.url}: interrupted")

        async def tracked() -> Result:
            task = asyncio.current_task()
            assert task
            self._running.add(task)
            try:
                return await work
            finally:
                self._running.discard(task)

        began, future = time.monotonic(), asyncio.run_coroutine_threadsafe(tracked(), _event_loop())
        try:
            stop.check()
            while not wait([future], timeout=0.5).done:
                if self._interrupted:  # before the task was among the running ones
                    future.cancel()
                stop.check()
                since = self._failing_since or (max(began, self._answered) if answers else math.inf)
                if stop.asked() and time.monotonic() - since > _STUCK:
                    raise InterruptedError(
                        f"{self.url} does not answer: the run stops without waiting for it"
                    )
            return future.result()
        except InterruptedError:
            future.cancel()
            raise
        except CancelledError:
            raise RemoteError(f"{self.url}: interrupted") from None

    async def _persist(
        self, name: str, attempt: Callable[[], Awaitable[Result]], limit: float | None = None
    ) -> Result:
        """Repeats an attempt until it succeeds, fails for good, or has failed for `minutes`."""
        place = f"{self.url}/{name}" if name else self.url
        began, failures = time.monotonic(), 0
        while True:
            try:
                result = await (self._hedged(place, attempt, limit) if limit else attempt())
                self._reached, self._answered, self._failing_since = True, time.monotonic(), None
                return result
            except RemoteError:
                raise
            except Exception as error:
                if final := retry.final_cause(error):
                    kind = MissingError if isinstance(error, FileNotFoundError) else RemoteError
                    raise kind(f"{place}: {final[0]}: {final[1]}") from None
                words = retry.cause(error)
            failures += 1
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            seconds = now - began
            lasted = now - min(began, self._failing_since)  # not again from 0 for the next request
            if lasted > 60 * self._minutes:
                raise OutageError(
                    f"{place}: {words}, for {self._minutes:g} minutes ({failures} times): check the network and the "
                    "server, or raise data.remote_minutes"
                )
            if seconds > _FIRST and words in retry.UNREACHABLE and not self._reached and stop.asked() is None:
                raise OutageError(
                    f"{place}: {words}, for {seconds:.0f} s: check the URL, the network and the server"
                )
            if seconds > _NOTE_AFTER:
                self._note(f"{place}: {words}; tried {failures} times in {seconds:.0f} s")
            await asyncio.sleep(retry.pause(failures - 1))

    async def _hedged(self, place: str, attempt: Callable[[], Awaitable[Result]], limit: float) -> Result:
        """The result of the attempt, or of a second one that begins when the first takes unusually long."""
        began = time.monotonic()
        usual = _HEDGE * median(self._seconds) if len(self._seconds) >= 8 else _LONGEST_HEDGE
        patience = min(max(usual, _SHORTEST_HEDGE), _LONGEST_HEDGE)
        tasks = {asyncio.ensure_future(attempt())}
        slow = f"{place}: slow: no answer in {_SLOW:g} s, nor to a second request"
        note = asyncio.get_running_loop().call_later(_SLOW, self._note, slow)
        try:
            done, waiting = await asyncio.wait(tasks, timeout=patience)
            if not done:
                tasks.add(asyncio.ensure_future(attempt()))
                waiting = set(tasks)
            while True:
                for task in done:
                    error = task.exception()
                    if error is None:
                        self._seconds.append(time.monotonic() - began)
                        return task.result()
                    if not waiting or retry.final_cause(error):
                        raise error
                left = limit - (time.monotonic() - began)
                done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise TimeoutError(f"no answer in {limit:.0f} s")
        finally:
            note.cancel()
            for task in tasks:
                task.cancel()

    def _note(self, text: str) -> None:
        """A line on stderr, at most one in 30 s."""
        if (now := time.monotonic()) - self._last_note >= _NOTE_EVERY:
            self._last_note = now
            say(f"warning: {text}", file=sys.stderr)


async def _gather(jobs: list[Coroutine[Any, Any, Result]]) -> list[Result]:
    return await asyncio.gather(*jobs)


def _strong(etag: str | None) -> str | None:
    """The ETag, in quotes, if If-Match can be used with it; Azure's lists leave the quotes out."""
    return None if etag is None or etag.startswith("W/") else f'"{etag.strip(chr(34))}"'


def _client(url: str, writing: bool = False) -> Any:
    """obstore's client; credentials, region and endpoint come from the environment.

    Only writing relies on its own retries, which send a large object's missing parts again.
    """
    from obstore import store

    variables = [name for name in _ENDPOINTS.get(url.split(":")[0], ()) if name in os.environ]
    for name in variables:
        value = os.environ[name]
        if not re.match(r"https?://[^/\s]", value):  # obstore's threads would panic at each request
            given = "***" if "@" in value else value
            raise RemoteError(f"{name}={given} must begin with http:// or https://, or must not be set")
    endpoint = next((os.environ[name] for name in variables), url)
    options: dict[str, Any] = {
        "client_options": {"connect_timeout": _CONNECT, "allow_http": endpoint.startswith("http://")},
        "retry_config": {"max_retries": 0},
    }
    options["client_options"]["read_timeout"] = "60s" if writing else _STALL
    if writing:
        del options["retry_config"]
    if url.startswith("http"):
        return store.HTTPStore.from_url(url, **options)
    if url.startswith("s3://") and _uses_profile():
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = Boto3CredentialProvider()
    return store.from_url(url, **options)


def _uses_profile() -> bool:
    """Whether AWS's credentials are in a file, which obstore reads through boto3."""
    if os.environ.keys() & {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE"}:
        return False
    files = [os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), "~/.aws/config"]
    if "AWS_PROFILE" not in os.environ and not any(Path(file).expanduser().exists() for file in files):
        return False
    try:
        import boto3  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            "AWS_PROFILE or ~/.aws holds credentials, which are read with the library boto3: pip install boto3, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    return True


_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process id
_loops_lock = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """This process's event loop, in a thread that ends with the process."""
    with _loops_lock:
        if os.getpid() in _loops:
            return _loops[os.getpid()]
        if _loops:
            raise RemoteError(
                "remote data cannot be read in a process that was forked after the first read: start workers by spawn"
            )
        loop = _loops[os.getpid()] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="remote", daemon=True).start()
        atexit.register(_settle, loop)
        return loop


def _settle(loop: asyncio.AbstractEventLoop) -> None:
    """Lets obstore's threads finish: one that waits for Python's lock while Python exits aborts the process."""
    for task in asyncio.all_tasks(loop):
        loop.call_soon_threadsafe(task.cancel)
    time.sleep(_SETTLE)

"""Remote data sets: what a URL may be, the cache's promises, and the same samples as from a local disk."""

import asyncio
import errno
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from obstore.exceptions import NotSupportedError
from PIL import Image
from range_server import RangeServer

from byolt.configs import derived, schema
from byolt.configs.schema import DataConfig
from byolt.files import stop
from byolt.files.machine import find_device
from byolt.files.storage import retry, store
from byolt.files.storage.retry import RemoteError
from byolt.pipelines.convert.make import make
from byolt.pipelines.convert.plan import ConversionOptions
from byolt.pipelines.formats.index import SAMPLE
from byolt.pipelines.manifest import BLOCK, MANIFEST, SAMPLES
from byolt.pipelines.order import check_batch_size
from byolt.pipelines.remote import dataset, urls
from byolt.pipelines.remote.cache import Cache
from byolt.pipelines.remote.source import RemoteSource, extents
from byolt.pipelines.sources import Source, TarSource, open_source, open_split

SECRET = "planted-secret-4711"


# ── URLs ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "folder", "names", "fields"),
    [
        ("s3://bucket/train", "s3://bucket/train", [], {}),
        ("gs://bucket/a/train/", "gs://bucket/a/train", [], {}),
        ("az://container", "az://container", [], {}),
        ("https://h:81/d/s-{08..10}.tar", "https://h:81/d", ["s-08.tar", "s-09.tar", "s-10.tar"], {}),
        ("s3://b/a.beton,s3://b/{c,d}.beton", "s3://b", ["a.beton", "c.beton", "d.beton"], {}),
        ("s3://b/a.beton?image=i&label=l", "s3://b", ["a.beton"], {"image": "i", "label": "l"}),
    ],
)
def test_urls(text: str, folder: str, names: list[str], fields: dict[str, str]) -> None:
    found = urls.parse(text)
    assert (found.folder, found.names, found.fields) == (folder, names, fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"s3://user:{SECRET}@bucket/train", "holds a user name or a password: remove it"),
        (f"https://{SECRET}@host/train", "holds a user name or a password"),
        (f"https://host/a.tar?X-Amz-Signature={SECRET}", "a query after the question mark"),
        (f"https://host/a.beton?token={SECRET}", "a query after the question mark"),
        ("s3://bucket/*.tar", r"no wildcards: name the folder, or use braces \{00\.\.09\}"),
        ("https://host/a/x.tar,https://host/b/x.tar", "files of one folder"),
        ("s3://", "name one folder"),
    ],
)
def test_refused_urls(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_source(text)
    assert SECRET not in str(caught.value)


def test_print_config_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    config = schema.load("quickstart", [f"data.path=s3://user:{SECRET}@bucket/train"])
    said = derived.describe(config, 1, lambda *_: range(5000), check_batch_size, find_device("cpu"))
    assert SECRET not in said and said.count("s3://***@bucket/train") == 2
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/train") as caught:
        derived.describe(config, 1, open_source, check_batch_size, find_device("cpu"))
    assert SECRET not in str(caught.value)


def test_without_obstore_a_url_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[remote\]'"):
        open_source("s3://bucket/train")


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_which_errors_are_final() -> None:
    for status in (400, 401, 403, 404, 412, 416):
        assert retry.final_cause(OSError(f"GET ... status: {status},")), status
    assert retry.final_cause(NotSupportedError("HTTP: Range request not supported"))
    assert retry.final_cause(OSError("Failed to parse value for CONTENT_RANGE header"))
    for text in ("status: 503", "status: 429", "status: 500", "ConnectionReset", "dns error", ""):
        assert retry.final_cause(OSError(text)) is None, text


def test_causes_do_not_repeat_what_the_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retry.cause(OSError(f"status: 503, body: {SECRET}")) == "HTTP 503"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert retry.cause(KeyError(f"odd {SECRET} http://h/a?sig=1")) == "KeyError: 'odd *** http://h/a?***'"


def test_pauses_grow_to_two_seconds() -> None:
    assert 0.025 <= retry.pause(0) <= 0.05
    assert 1 <= retry.pause(100) <= 2


def test_a_hanging_request_is_doubled_and_a_slow_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "_LONGEST_HEDGE", 0.05)
    monkeypatch.setattr(store, "_SLOW", 0.1)
    begun: list[int] = []

    async def attempt(hanging: int) -> int:
        begun.append(len(begun))
        await asyncio.sleep(60 if len(begun) <= hanging else 0)
        return begun[-1]

    client = store.Store("http://host/train")
    assert asyncio.run(client._hedged("place", lambda: attempt(1), 10)) == 1
    assert not capsys.readouterr().err
    begun.clear()
    with pytest.raises(TimeoutError):
        asyncio.run(client._hedged("place", lambda: attempt(2), 0.2))
    assert begun == [0, 1]
    assert capsys.readouterr().err == "warning: place: slow: no answer in 0.1 s, nor to a second request\n"


# ── extents ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_extents_end_at_samples_and_hold_each_sample_once() -> None:
    generator = np.random.default_rng(0)
    samples = np.zeros(1000, SAMPLE)
    samples["shard"] = np.arange(1000) // 300
    samples["length"] = generator.integers(1, 3000, 1000)
    for shard in range(4):
        part = samples["shard"] == shard
        samples["offset"][part] = np.cumsum(samples["length"][part] + 512) - samples["length"][part]
    found = extents(samples, 10_000)
    mine = found[np.searchsorted(found["first"], np.arange(1000), "right") - 1]
    last = np.append(found["first"][1:], 1000) - 1
    assert (found["first"] // BLOCK == last // BLOCK).all()  # blocks of different lanes share no extent
    ends = samples["offset"] + samples["length"]
    assert (mine["shard"] == samples["shard"]).all()
    assert (mine["start"] <= samples["offset"]).all() and (mine["stop"] >= ends).all()
    assert (found["stop"] - found["start"] < 10_000 + 3000).all()
    assert {*found["stop"].tolist()} <= {*ends.tolist()}
    same = found["shard"][1:] == found["shard"][:-1]
    assert (found["start"][1:][same] >= found["stop"][:-1][same]).all()  # no byte is fetched twice


# ── cache ───────────────────────────────────────────────────────────────────────────────────────────────────


def _put(cache: Cache, key: str, size: int) -> bool:
    return cache.fill(key, size, lambda file: os.pwrite(file, b"x" * size, 0))


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != ".usage")


def test_cache_stays_below_its_limit_and_drops_the_oldest(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    cache.pin("set")
    assert _put(cache, "set/manifest.json", 200)
    for number in range(30):
        assert _put(cache, f"set/extents/a/{number}", 100)
        os.utime(tmp_path / f"set/extents/a/{number}", (number, number))
        assert _size(tmp_path) <= 1000
    assert cache.read("set/extents/a/29", 3, 97) == b"xxx"
    assert cache.read("set/extents/a/0", 3, 0) is None
    assert cache.read("set/manifest.json", 200, 0)  # pinned
    assert not _put(cache, "set/extents/a/large", 900)  # beside what is pinned
    assert not _put(cache, "set/huge", 2000)
    assert _size(tmp_path) <= 1000


def test_unpinned_sets_make_room(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/.pin").touch()  # by a process that has ended
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(bytes(5000))  # a user's own
    (tmp_path / "mine/.x.byolt-tmp").touch()
    cache = Cache(tmp_path, 1000)
    assert len([*(tmp_path / "mine").iterdir()]) == 2
    assert _put(cache, "old/shard-0.tar", 900)
    assert cache.room("new") == 1000
    assert _put(cache, "new/shard-0.tar", 900)
    assert not (tmp_path / "old/shard-0.tar").exists()
    cache.pin("new")
    assert cache.room("newer") == 100
    assert cache.room("new") == 1000
    assert len([*(tmp_path / "mine").iterdir()]) == 2


def test_what_a_killed_process_leaves_is_counted_and_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "set/extents"
    folder.mkdir(parents=True)
    (tmp_path / "set/.pin").touch()
    (folder / ".a.byolt-tmp").write_bytes(b"par")
    (folder / ".b.byolt-tmp").write_bytes(b"partial")
    cache = Cache(tmp_path, 1000)
    assert not [*folder.iterdir()]
    (folder / ".a.byolt-tmp").write_bytes(b"partial")
    assert _put(cache, "set/extents/a", 10)
    assert cache.read("set/extents/a", 10, 0) == b"x" * 10


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)

    def fail(descriptor: int) -> None:
        os.pwrite(descriptor, b"half", 0)
        raise RemoteError("gone")

    with pytest.raises(RemoteError):
        cache.fill("set/a", 10, fail)
    assert _size(tmp_path) == 0 and (tmp_path / ".usage").read_text().split() == ["0"]


@pytest.mark.parametrize("place", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_no_error(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 1000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if place == "posix_fallocate":
            patch.setattr(os, place, full)
        assert not cache.fill("set/a", 10, full)
    assert _size(tmp_path) == 0
    assert _put(cache, "set/a", 10)


def test_a_file_wanted_by_several_is_fetched_once(tmp_path: Path) -> None:
    caches, fetched = [Cache(tmp_path, 1000) for _ in range(8)], []

    def slow(descriptor: int) -> None:
        time.sleep(0.05)
        fetched.append(os.pwrite(descriptor, b"x" * 10, 0))

    threads = [threading.Thread(target=cache.fill, args=("set/a", 10, slow)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [10]


def test_waiting_for_another_process_can_be_ended(tmp_path: Path) -> None:
    stop, fetching = threading.Event(), threading.Event()
    slow = lambda descriptor: fetching.set() or stop.wait(10)  # noqa: E731
    thread = threading.Thread(target=Cache(tmp_path, 1000).fill, args=("set/a", 10, slow))
    thread.start()
    fetching.wait()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(InterruptedError):
        Cache(tmp_path, 1000).fill("set/a", 10, slow, stop)
    thread.join()


# ── data sets over HTTP ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """140 images of 9 kB in two shards, in the folder "train" of a server's root."""
    root = tmp_path_factory.mktemp("served")
    generator = np.random.default_rng(0)
    for label in "ab":
        (root / "images" / label).mkdir(parents=True)
        for number in range(70):
            pixels = generator.integers(0, 256, (64, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{number}.jpg", quality=90)
    make(
        ConversionOptions(src=root / "images", dst=root / "train", shard_size=1, workers=1, decode=False),
        print,
    )
    return root


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(dataset, "PIECE", 1 << 15)
    monkeypatch.setattr(retry, "pause", lambda failures: 0.01)
    with RangeServer(shards) as running:
        yield running


def _settings(cache: Path, **others: object) -> DataConfig:
    return DataConfig.model_validate({"path": "-", "cache": str(cache), "order": "block", **others})


def _assert_same(found: Source, local: Source) -> None:
    assert found.fingerprint == local.fingerprint and found.classes == local.classes
    assert np.array_equal(np.array(found.checksums), np.array(local.checksums))
    assert (found.labels == local.labels).all() and (found.heights == local.heights).all()
    assert [found.read(i) for i in range(len(local))] == [local.read(i) for i in range(len(local))]
    assert found.describe(7) == local.describe(7)


def test_same_samples_as_from_a_local_disk(server: RangeServer, shards: Path, tmp_path: Path) -> None:
    local = open_source(shards / "train")
    source = open_source(f"{server.url}/train", _settings(tmp_path))
    assert isinstance(source, RemoteSource)
    _assert_same(source, local)
    fetched = server.counts["GET"]
    _assert_same(pickle.loads(pickle.dumps(source)), local)  # from the cache
    assert server.counts["GET"] == fetched + 1  # the manifest
    names = f"{server.url}/train/shard-{{000000..000001}}.tar"
    staged = open_source(names, _settings(tmp_path, order="full"))
    assert isinstance(staged, TarSource)
    _assert_same(staged, local)
    with pytest.raises(ValueError, match=r"names 1 tars, and manifest\.json has 2 \(shard-000001\.tar\)"):
        open_source(f"{server.url}/train/shard-000000.tar", _settings(tmp_path))
    remedy = (
        r"http[^ ]*/images/manifest\.json does not exist: check the URL; .*/images/shard-\{0+\.\.0+99\}\.tar'"
    )
    with pytest.raises(ValueError, match=rf"^data path {remedy} --manifest FOLDER$"):
        open_source(f"{server.url}/images", _settings(tmp_path))


def test_a_cache_that_cannot_be_written_is_named(server: RangeServer) -> None:
    with pytest.raises(
        ValueError, match=r"data\.cache=/proc/byolt cannot be written: .*: name another folder"
    ):
        open_source(f"{server.url}/train", _settings(Path("/proc/byolt")))


def test_a_cache_without_room_is_named_with_both_sizes(server: RangeServer, tmp_path: Path) -> None:
    said = r"^data\.cache=.* has no room for manifest\.json: [\d,]+ bytes are needed, 100 available: raise data\."
    with pytest.raises(ValueError, match=said):
        open_split("data.path", f"{server.url}/train", _settings(tmp_path, cache_gb=1e-7))


def test_print_config_uses_the_cache_of_the_settings(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
    config = schema.load(
        "quickstart",
        [f"data.path={server.url}/train", f"data.cache={tmp_path / 'mine'}", "train.batch_size=64"],
    )
    said = derived.describe(config, 1, open_source, check_batch_size, find_device("cpu"))
    assert "# images: 140" in said
    assert [*(tmp_path / "mine").rglob("manifest.json")] and not (tmp_path / "default").exists()
    assert not [*(tmp_path / "mine").rglob("*.tar")]  # nothing is staged


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_shows_the_progress_of_staging(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    data = dataset.RemoteData(urls.parse(f"{server.url}/train"), _settings(tmp_path))
    (data.folder / "shard-000000.tar").touch()  # one is missing
    monkeypatch.setattr(data, "_stage_shard", lambda *_: None)
    shown: list[bool] = []

    class Recorded(dataset.Meter):
        def __init__(self, *args: Any, enabled: bool, **others: Any) -> None:
            shown.append(enabled)
            super().__init__(*args, enabled=False, **others)

    monkeypatch.setattr(dataset, "Meter", Recorded)
    data.stage()
    assert shown == [rank == "0"]


def test_a_server_without_ranges_is_refused_at_once(shards: Path, tmp_path: Path) -> None:
    class Plain(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Plain, directory=str(shards))) as plain:
        threading.Thread(target=plain.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{plain.server_address[1]}/train"
        with pytest.raises(
            ValueError, match="does not answer range requests: use another server, or copy the"
        ):
            open_source(url, _settings(tmp_path, order="full")).read(0)
        plain.shutdown()


def test_an_outage_is_waited_for_once(server: RangeServer) -> None:
    client = store.Store(f"{server.url}/train", minutes=0.3 / 60)
    client.range("manifest.json", 0, 10)
    server.down = True
    for least, most in ((0.3, 5.0), (0.0, 0.25)):
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"the connection was reset, for 0\.005 minutes"):
            client.range("manifest.json", 0, 10)
        assert least <= time.monotonic() - began < most


def test_a_signal_ends_the_waiting_for_a_server(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_STUCK", 0.1)
    monkeypatch.setattr(stop, "_signal", 15)
    monkeypatch.setattr(stop, "_training", True)
    client = store.Store(f"{server.url}/train")
    assert len(client.range("manifest.json", 0, 10)) == 10  # which answers
    server.down = True
    with pytest.raises(InterruptedError, match="does not answer: the run stops"):
        client.range("manifest.json", 0, 10)


@pytest.mark.parametrize("in_run", [False, True])
def test_a_server_that_was_never_reached_is_soon_an_error(
    monkeypatch: pytest.MonkeyPatch, in_run: bool
) -> None:
    monkeypatch.setattr(store, "_FIRST", 0.02)
    monkeypatch.setattr(stop, "_signal", 0 if in_run else None)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # does not listen
        url = f"http://127.0.0.1:{held.getsockname()[1]}/train"
        said = r"refused, for 0\.0025 minutes" if in_run else r"refused, for 0 s: check the URL"
        with pytest.raises(RemoteError, match=said):
            store.Store(url, minutes=0.15 / 60).get("manifest.json")


@pytest.mark.slow
def test_staging_without_room_is_refused(server: RangeServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.order=full copies its 0\.0 GB first.*data\.order=block"):
        open_source(f"{server.url}/train", _settings(tmp_path, order="full", cache_gb=0.001))


@pytest.mark.slow
def test_planned_samples_are_fetched_once_and_ahead(
    server: RangeServer, shards: Path, tmp_path: Path
) -> None:
    source = open_source(f"{server.url}/train", _settings(tmp_path))
    assert isinstance(source, RemoteSource)
    everything = np.arange(len(source))
    source.plan(everything)
    source.plan(everything)
    deadline = time.monotonic() + 20
    while source._planned and time.monotonic() < deadline:
        time.sleep(0.01)
    fetched = server.counts["GET"]
    assert fetched <= 3 + len(source._extents)
    server.down = True
    _assert_same(source, open_source(shards / "train"))


def test_reads_and_plans_share_the_connections(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"{server.url}/train", _settings(tmp_path, connections=2))
    assert isinstance(source, RemoteSource)
    fetch, running, most = source._store.range, [], []

    def counted(*request: Any) -> Any:
        running.append(request)
        most.append(len(running))
        time.sleep(0.01)
        try:
            return fetch(*request)
        finally:
            running.pop()

    monkeypatch.setattr(source._store, "range", counted)
    source.plan(np.arange(len(source)))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(source.read, reversed(range(len(source)))))
    assert max(most) == 2


@pytest.mark.slow
def test_a_cache_below_the_window_is_slow_not_wrong(
    server: RangeServer, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(f"{server.url}/train", _settings(tmp_path, cache_gb=1e-4))
    assert isinstance(source, RemoteSource)
    assert source.share_ahead(16384) == 0
    assert "parts of shards are fetched several times" in capsys.readouterr().err
    _assert_same(source, open_source(shards / "train"))
    assert _size(tmp_path) <= 1e5


@pytest.mark.slow
def test_damage_in_the_cache_is_repaired_and_at_the_server_counts_as_corrupt(
    server: RangeServer, shards: Path, tmp_path: Path
) -> None:
    local = open_source(shards / "train")
    source = open_source(f"{server.url}/train", _settings(tmp_path))
    assert isinstance(source, RemoteSource)
    assert source.read(0) == local.read(0)
    (kept,) = (tmp_path / source._file(int(source._extent_of(0)))).parent.iterdir()
    kept.write_bytes(bytes(kept.stat().st_size))
    assert source.read(0) == local.read(0)
    shard = shards / "train/shard-000000.tar"
    whole = shard.read_bytes()
    try:
        at = int(source._samples[0]["offset"]) + 50
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        again = open_source(f"{server.url}/train", _settings(tmp_path / "other"))
        with pytest.raises(ValueError, match="not those that were indexed"):
            again.read(0)
        assert again.read(1) == local.read(1)
        with pytest.raises(ValueError, match="does not have the sha256"):
            open_source(f"{server.url}/train", _settings(tmp_path / "third", order="full"))
        assert not [*(tmp_path / "third").rglob("shard-000000.tar")]  # another process would trust it
    finally:
        shard.write_bytes(whole)


@pytest.mark.parametrize("status", ["403", "404"])
def test_a_refusal_ends_at_once_in_one_short_line(server: RangeServer, tmp_path: Path, status: str) -> None:
    source = open_source(f"{server.url}/train", _settings(tmp_path))
    server.fault = lambda number, name: status
    with pytest.raises(RemoteError, match=rf"/train/shard-00000\d\.tar.*\(HTTP {status}\): check") as caught:
        source.read(0)
    assert len(str(caught.value)) < 250
    with pytest.raises(ValueError, match=r"^data path http[^ ]*/train/manifest\.json[: ](?!.*data path)"):
        open_source(f"{server.url}/train", _settings(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("knows", "words"), [(True, r" \(HTTP 412\)"), (False, ": restore the object")])
def test_a_changed_object_is_refused(
    server: RangeServer, shards: Path, tmp_path: Path, knows: bool, words: str
) -> None:
    server.knows_if_match = knows
    source = open_source(f"{server.url}/train", _settings(tmp_path))
    source.read(0)
    os.utime(shards / "train/shard-000000.tar", (1, 1 + knows))
    with pytest.raises(RemoteError, match="changed while the run was reading it" + words):
        [source.read(i) for i in range(len(source))]


def test_a_data_set_that_is_replaced_while_it_is_opened_is_refused(
    server: RangeServer, shards: Path, tmp_path: Path
) -> None:
    server.folder = root = tmp_path / "served"
    shutil.copytree(shards / "train", root / "train")
    changed = np.load(root / "train" / SAMPLES)
    changed["label"] ^= 1

    def replace(number: int, name: str) -> str:
        if name.endswith(MANIFEST):  # has just been asked for
            np.save(root / "train" / SAMPLES, changed)
        return ""

    server.fault = replace
    with pytest.raises(ValueError, match=r"^data path '.*samples\.npy: does not have the sha256"):
        open_source(f"{server.url}/train", _settings(tmp_path / "cache"))
    assert not [*(tmp_path / "cache").rglob(SAMPLES)]


def test_credentials_are_not_sent_on_to_another_server(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except for the token of a session, which signs nothing without its secret key."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, SECRET)
    with RangeServer(tmp_path) as other:
        (tmp_path / "train").mkdir()
        (tmp_path / "train/manifest.json").write_text("{}")
        server.redirect = f"{other.url}/train/manifest.json"
        assert store.Store("s3://bucket/train").get("manifest.json") == b"{}"
        assert "authorization" in server.headers and "host" in other.headers
        assert "authorization" not in other.headers and SECRET not in str(other.headers)


FAULTS: dict[str, Callable[[int, str], str]] = {
    "5 % 503": lambda number, name: "503" if number % 20 == 3 else "",
    "10 % cut short": lambda number, name: "truncate" if number % 10 == 3 else "",
    "2 % resets": lambda number, name: "reset" if number % 50 == 3 else "",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_faults_change_no_sample(server: RangeServer, shards: Path, tmp_path: Path, kind: str) -> None:
    server.fault = FAULTS[kind]
    source = open_source(f"{server.url}/train", _settings(tmp_path, remote_minutes=0.3))
    _assert_same(source, open_source(shards / "train"))
    assert sum(server.counts[fault] for fault in ("503", "truncate", "reset")) >= 1


@pytest.mark.slow
def test_a_forked_process_is_refused_not_left_hanging(server: RangeServer, tmp_path: Path) -> None:
    source = open_source(f"{server.url}/train", _settings(tmp_path))
    child = os.fork()
    if not child:
        try:
            source.read(0)
        except RemoteError as error:
            os._exit(42 if "forked after the first read: start workers by spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_a_process_that_ends_right_after_a_request_is_not_aborted(server: RangeServer) -> None:
    """obstore's thread, slowed down here, still delivers the answer when the main thread ends."""
    code = f"""
import asyncio, time
from byolt.files.storage.store import Store
class Slow(asyncio.SelectorEventLoop):
    def call_soon_threadsafe(self, *given, **options):
        handle = super().call_soon_threadsafe(*given, **options)
        time.sleep(0.05)
        return handle
asyncio.new_event_loop = Slow
print(len(Store("{server.url}/train").get("manifest.json")))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and int(ended.stdout) > 100, (ended.returncode, ended.stderr)

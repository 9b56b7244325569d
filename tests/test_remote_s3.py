"""The commands on a bucket: moto's server speaks S3 and Google's interface on loopback, Azurite Azure's."""

import base64
import hmac
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from PIL import Image
from range_server import gcs_bucket, s3_bucket
from whole_runs import ROOT

from byolt.configs.schema import DataConfig
from byolt.files import failpoint
from byolt.files.atomic import sha256_of
from byolt.files.storage import retry
from byolt.files.storage.retry import MissingError, RemoteError
from byolt.files.storage.store import Store
from byolt.pipelines.manifest import MANIFEST
from byolt.pipelines.remote.source import RemoteSource
from byolt.pipelines.sources import TarSource, open_source
from byolt.tools.make_shards import main as make_shards
from byolt.tools.verify_shards import main as verify_shards

pytestmark = pytest.mark.slow
SECRET = "planted-secret-4711"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket; the environment leads obstore there."""
    with s3_bucket(SECRET) as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield "s3://bucket"


@contextmanager
def azure_container(secret: str) -> Iterator[dict[str, str]]:
    """Starts Azurite with an empty container named "bucket"."""
    if not (program := shutil.which("azurite-blob")):
        pytest.skip("azurite-blob is not installed (npm install azurite)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key, url = base64.b64encode(secret.encode()).decode(), f"http://127.0.0.1:{port}/account"
    command = [
        program,
        "--inMemoryPersistence",
        "--skipApiVersionCheck",
        "--disableTelemetry",
        "--blobPort",
        str(port),
    ]
    with subprocess.Popen(command, env={**os.environ, "AZURITE_ACCOUNTS": f"account:{key}"}) as server:
        try:
            _make_container(url, secret)
            yield {
                "AZURE_STORAGE_ENDPOINT": url,
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_ACCOUNT_KEY": key,
            }
        finally:
            server.terminate()


def _make_container(url: str, secret: str) -> None:
    """A signed request, because obstore makes no containers; repeated until the server has started."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "PUT" + "\n" * 12 + "".join(f"{key}:{value}\n" for key, value in headers.items())
    signed += "/account/account/bucket\nrestype:container"
    signature = base64.b64encode(hmac.digest(secret.encode(), signed.encode(), "sha256")).decode()
    headers |= {"Authorization": f"SharedKey account:{signature}", "Content-Length": "0"}
    request = urllib.request.Request(f"{url}/bucket?restype=container", method="PUT", headers=headers)
    for _ in range(100):
        with suppress(URLError):
            urllib.request.urlopen(request)
            return
        time.sleep(0.1)
    raise AssertionError("Azurite does not answer")


@pytest.mark.parametrize(
    ("server", "url", "key", "refusal"),
    [
        (s3_bucket, "s3://bucket/s3/folder", "", ""),
        (gcs_bucket, "gs://bucket/gs/folder", "GOOGLE_BEARER_TOKEN", "not accepted \\(HTTP 401\\)"),
        (azure_container, "az://bucket/az/folder", "AZURE_STORAGE_ACCOUNT_KEY", "denied \\(HTTP 403\\)"),
    ],
    ids=["s3", "gs", "az"],
)
def test_objects_of_each_kind_of_store(
    server: Any, url: str, key: str, refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large"
    large.write_bytes(np.random.default_rng(0).bytes(11_000_000))  # is sent in parts
    with server(SECRET) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = Store(url, 0.1)
        assert store.list() == {}
        assert store.put("small", b"hello world") and store.put("large", large) and store.put("none", b"")
        there = store.list() or {}
        assert {name: entry.size for name, entry in there.items()} == {
            "large": 11_000_000,
            "none": 0,
            "small": 11,
        }
        assert store.sha256("large") == sha256_of(large)
        assert not store.put("large", large, there) and store.put("small", b"HELLO WORLD", there)
        with pytest.raises(RemoteError, match=r"folder/small: changed while .* \(HTTP 412\)"):
            store.range("small", 0, 5)
        store.list()
        assert bytes(store.range("small", 6, 5)) == b"WORLD" and store.get("none") == b""
        parts = store.ranges("large", [0, 6_000_000], [100, 5_000_000])
        assert [bytes(part) for part in parts] == [large.read_bytes()[:100], large.read_bytes()[6_000_000:]]
        store.delete("none")
        with pytest.raises(MissingError, match=r"folder/none: does not exist \(HTTP 404\): check the URL"):
            store.get("none")
        assert store.put("none", b"", there)  # it was there when the folder was listed
        if key:
            monkeypatch.setenv(key, base64.b64encode(b"another-secret").decode())
            with pytest.raises(RemoteError, match=refusal) as caught:
                Store(url, 0.1).list()
            assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label in "ab":
        (folder / label).mkdir()
        for number in range(60):
            pixels = generator.integers(0, 256, (64, 80, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_made_verified_read_and_indexed_at_a_url(
    bucket: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, options = f"{bucket}/made/train", ["--shard-size", "1", "--workers", "1"]
    assert make_shards([str(images), url, *options]) == 0
    assert make_shards([str(images), str(tmp_path / "local"), *options]) == 0
    said = capsys.readouterr()
    assert f"{url}: 120 samples in 2 shards, 2 classes" in said.out
    uploaded = [line for line in said.err.splitlines() if "uploaded" in line]
    assert uploaded[-1].endswith(f"{url}/manifest.json")
    assert not [*(tmp_path / "home").glob("byolt-make/*")]
    assert make_shards([str(images), url, *options]) == 0  # nothing to do
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{url}: already done\n", "")
    assert make_shards([str(images), url, *options, "--seed", "1"]) == 2
    assert f"DST {url} holds a finished data set: seed was 0, now 1: name" in capsys.readouterr().err
    assert not [*(tmp_path / "home").glob("byolt-make/*")]
    assert make_shards([str(images), "s3://absent/train"]) == 1
    assert (
        capsys.readouterr().err
        == "make_shards: s3://absent/train: does not exist (HTTP 404): check the URL\n"
    )

    local = open_source(tmp_path / "local")
    for order, kind in (("block", RemoteSource), ("full", TarSource)):
        found = open_source(url, DataConfig.model_validate({"path": "-", "order": order}))
        assert isinstance(found, kind)
        assert found.fingerprint == local.fingerprint
        assert [found.read(i) for i in range(120)] == [local.read(i) for i in range(120)]

    assert verify_shards([url, "--workers", "1"]) == 0
    shard = (tmp_path / "local/shard-000000.tar").read_bytes()
    Store(url).put("shard-000000.tar", shard[:-1000] + bytes([shard[-1000] ^ 1]) + shard[-999:])
    assert verify_shards([url, "--workers", "1"]) == 1
    assert f"{url}/shard-000000.tar: sha256 is" in capsys.readouterr().err
    Store(url).put("shard-000000.tar", shard)

    for name in ("shard-000000.tar", "shard-000001.tar"):
        Store(f"{bucket}/tars").put(name, tmp_path / "local" / name)
    with pytest.raises(ValueError, match=r"has no manifest\.json: check .*--index s3://bucket/tars"):
        open_source(f"{bucket}/tars")
    assert make_shards(["--index", f"{bucket}/tars", "--workers", "2"]) == 0
    assert "120 samples in 2 shards, 120 labeled" in capsys.readouterr().out
    assert [open_source(f"{bucket}/tars").read(i) for i in range(5)] == [local.read(i) for i in range(5)]
    assert make_shards(["--index", f"{bucket}/tars"]) == 2
    left = [p for p in (tmp_path / "home").rglob("*.tar") if p.is_file() and "extents" not in p.parts]
    assert len(left) == 2  # staged above


def test_killed_upload_continues(
    bucket: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only what was not there is sent again; the manifest is sent last."""
    url, options = f"{bucket}/killed/train", ["--shard-size", "1", "--workers", "1"]
    command = [sys.executable, str(ROOT / "tools/make_shards.py"), str(images), url, *options]
    killed = subprocess.run(command, env={**os.environ, "BYOLT_FAIL": "upload:1:SIGKILL"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(Store(url).list() or {}) == ["shard-000000.tar"]

    written: list[str] = []
    serve = DomainDispatcherApplication.__call__

    def counting(self: Any, environ: Any, respond: Any) -> Any:
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            written.append(environ["PATH_INFO"].rpartition("/")[2])
        return serve(self, environ, respond)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", counting)
    assert make_shards([str(images), url, *options]) == 0
    assert sorted(written[:-1]) == ["quarantine.jsonl", "samples.npy", "shard-000001.tar"]
    assert written[-1] == "manifest.json"
    assert f"{url}/shard-000000.tar is there already" in capsys.readouterr().err
    assert verify_shards([url, "--workers", "1"]) == 0

    changed = bytearray(content := Store(url).get("shard-000000.tar"))
    changed[1000] ^= 1
    for name, data in (("shard-000000.tar", bytes(changed)), ("shard-000001.tar", content)):
        Store(f"{bucket}/changed").put(name, data)  # of the same size, and of another one
    written.clear()
    assert make_shards([str(images), f"{bucket}/changed", *options]) == 0
    assert {"shard-000000.tar", "shard-000001.tar"} < {*written} and len(written) == 5
    assert verify_shards([f"{bucket}/changed", "--workers", "1"]) == 0

    urllib.request.urlopen(
        urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/bucket/others/a.tar", b"x", method="PUT")
    )
    assert make_shards([str(images), f"{bucket}/others", *options]) == 2
    assert "already holds a.tar of another program: name another folder" in capsys.readouterr().err

    url = f"{bucket}/meanwhile"
    finish = {
        ("upload", 1): lambda: Store(url).put(MANIFEST, b"{}")
    }  # another process, after our first shard
    monkeypatch.setattr(failpoint, "reach", lambda *place: finish.get(place, bool)())
    assert make_shards([str(images), url, *options]) == 2
    assert f"DST {url}: another process has finished a data set there: start again" in capsys.readouterr().err
    assert make_shards([str(images), url, *options]) == 2  # the shards are whole in the local folder
    assert {*(Store(url).list() or {})} == {"shard-000000.tar", MANIFEST} and Store(url).get(
        MANIFEST
    ) == b"{}"


def test_named_betons_are_staged(bucket: str, images: Path, tmp_path: Path) -> None:
    options = ["--format", "beton", "--workers", "1"]
    assert make_shards([str(images), str(tmp_path / "betons"), *options]) == 0
    beton = tmp_path / "betons/shard-000000.beton"
    Store(f"{bucket}/ffcv").put("train.beton", beton)
    local = open_source(beton)
    for path in (f"{bucket}/ffcv/train.beton", f"{bucket}/ffcv/train.beton?image=image&label=label"):
        found = open_source(path)
        assert found.fingerprint == local.fingerprint
        assert [found.read(i) for i in range(120)] == [local.read(i) for i in range(120)]
    assert verify_shards([f"{bucket}/ffcv/train.beton", "--workers", "1"]) == 0
    assert make_shards([str(images), f"{bucket}/raw", *options, "--raw-fraction", ".5"]) == 0
    raw = open_source(f"{bucket}/raw")
    assert isinstance(raw, RemoteSource)
    assert make_shards([str(images), str(tmp_path / "raw"), *options, "--raw-fraction", ".5"]) == 0
    again = open_source(tmp_path / "raw")
    assert raw.fingerprint == again.fingerprint
    assert [raw.read(i) for i in range(120)] == [again.read(i) for i in range(120)]


def test_a_changed_object_and_refusals_are_short(
    bucket: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/changing"
    assert make_shards([str(images), url, "--shard-size", "1", "--workers", "1"]) == 0
    settings = DataConfig.model_validate({"path": "-", "order": "block", "remote_minutes": 0.01})
    source = open_source(url, settings)
    Store(url).put("shard-000001.tar", b"x" * 10)
    with pytest.raises(RemoteError, match=r"changing/shard-000001.tar: changed while .* \(HTTP 412\)"):
        [source.read(i) for i in range(120)]
    with pytest.raises(ValueError, match=r"shard-000001.tar has 10 bytes, manifest.json states"):
        open_source(url, settings)
    monkeypatch.setattr(retry, "pause", lambda failures: 0.05)
    for endpoint, said in (
        ("http://127.0.0.1:9", "the connection is refused, for 0.01 minutes"),
        ("http://no-such-host.invalid", "cannot be resolved, for 0.01 minutes"),
        ("localhost:9", "AWS_ENDPOINT_URL=localhost:9 must begin with http:// or https://"),
        (f"me:{SECRET}@localhost:9", r"AWS_ENDPOINT_URL=\*\*\* must begin"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(ValueError, match=said) as caught:
            open_source(url, settings)
        assert len(str(caught.value).splitlines()) <= 3 and SECRET not in str(caught.value)

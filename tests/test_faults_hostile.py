"""Untrusted files execute nothing: pickles in the place of each file that is opened, and hostile names in a report."""

import ast
import dataclasses
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as to_safetensors
from whole_runs import ROOT, Run, write_images

from byolt.configs import schema
from byolt.files.lock import Lock
from byolt.files.rows import read_rows
from byolt.model.run import checkpoint
from byolt.model.run.trained import load_trained
from byolt.pipelines.convert.plan import WORK
from byolt.pipelines.manifest import Manifest
from byolt.pipelines.sources import open_source
from byolt.tools import report
from byolt.tools.evaluate import main as evaluate
from byolt.tools.make_shards import main as make_shards
from byolt.tools.verify_shards import main as verify_shards

pytestmark = pytest.mark.faults
PRODUCT = [
    path
    for folder in ("configs", "files", "model", "pipelines", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "train.py"]


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (self.folder,)


def _pickles(folder: Path) -> dict[str, bytes]:
    """The payload in the containers of pickles that libraries read."""
    payload = Payload(folder)
    containers = {"pickle": pickle.dumps(payload), "old pickle": pickle.dumps(payload, 0)}
    for name, new in (("torch zip", True), ("old torch", False)):
        file = io.BytesIO()
        torch.save({"step": 1, "model": payload}, file, _use_new_zipfile_serialization=new)
        containers[name] = file.getvalue()
    file = io.BytesIO()
    np.save(file, np.array([payload], object), allow_pickle=True)
    containers["npy"] = file.getvalue()
    file = io.BytesIO()
    np.savez(file, samples=np.array([payload], object))
    containers["npz"] = file.getvalue()
    containers["yaml"] = f"!!python/object/apply:os.mkdir ['{folder}']\n".encode()
    return containers


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "torch zip", "old torch", "npy", "npz", "yaml"])
def test_payloads_execute_where_they_are_allowed_to(kind: str, tmp_path: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    import yaml

    file = io.BytesIO(_pickles(tmp_path / "executed")[kind])
    if kind == "yaml":
        yaml.unsafe_load(file)
    elif "torch" in kind:
        torch.load(file, weights_only=False)
    elif kind == "npz":
        list(np.load(file, allow_pickle=True).values())
    else:
        np.load(file, allow_pickle=True)  # of a bare pickle too
    assert (tmp_path / "executed").is_dir()


def _sealed(data: bytes) -> bytes:
    """The body of a checkpoint behind the header of a whole one."""
    return checkpoint._MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def _encoder_with(config: bytes) -> bytes:
    metadata = {"backbone": "resnet8", "stem": "cifar", "steps": "1", "config": config.decode()}
    return to_safetensors({"conv1.weight": torch.zeros(1)}, metadata)


def _dataset(folder: Path) -> Path:
    """A data set of four images."""
    write_images(folder / "images", 4)
    assert make_shards([str(folder / "images"), str(folder / "shards"), "--workers", "1"]) == 0
    return folder / "shards"


def _samples_npy(data: bytes, folder: Path) -> None:
    shards = _dataset(folder)
    (shards / "samples.npy").write_bytes(data)
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest["sha256"]
    for sha256 in (manifest["samples_sha256"], hashlib.sha256(data).hexdigest()):
        (shards / "manifest.json").write_text(json.dumps(manifest | {"samples_sha256": sha256}))
        with pytest.raises(ValueError, match=r"samples\.npy"):
            open_source(shards)
        assert verify_shards([str(shards), "--workers", "1"]) == 2


def _manifest(data: bytes, folder: Path) -> None:
    shards = _dataset(folder)
    (shards / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        open_source(shards)


def _shard(data: bytes, folder: Path) -> None:
    shards = _dataset(folder)
    (shards / "shard-000000.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000000\.tar"):
        open_source(shards)
    assert verify_shards([str(shards), "--workers", "1"]) == 1


def _members(data: bytes, folder: Path) -> None:
    """As WebDataset's own decoder would unpickle .pyd and .pickle, and numpy load .npy."""
    folder.mkdir()
    image = next(write_images(folder / "images", 1).rglob("*.jpg")).read_bytes()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for ending, content in [("jpg", image)] + [
            (e, data) for e in ("pyd", "pkl", "pickle", "npy", "pth", "json")
        ]:
            info = tarfile.TarInfo(f"0.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a/0.jpg", data)
        archive.writestr("a/1.jpg", image)
    for name in ("a.tar", "a.zip"):
        assert make_shards([str(folder / name), str(folder / f"{name} read"), "--workers", "1"]) == 0
    assert make_shards([str(folder), "--index", "--workers", "1"]) == 0
    assert len(open_source(folder)) == 1


def _label(data: bytes, folder: Path) -> None:
    """A .cls, and a list of labels."""
    folder.mkdir()
    image = next(write_images(folder / "images", 1).rglob("*.jpg")).read_bytes()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for ending, content in (("jpg", image), ("cls", data)):
            info = tarfile.TarInfo(f"0.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "labels.csv").write_bytes(data)
    make_shards([str(folder / "a.tar"), str(folder / "one"), "--workers", "1"])
    options = ("--labels", str(folder / "labels.csv"), "--workers", "1")
    make_shards([str(folder / "images"), str(folder / "two"), *options])


def _unfinished(data: bytes, folder: Path) -> None:
    """The notes of a conversion that a full disk ended."""
    images = write_images(folder / "images", 4)
    convert = partial(make_shards, [str(images), str(folder / "dst"), "--workers", "1"])
    work = folder / "dst" / WORK
    for name, code in (("shard-000000.json", 0), ("settings.json", 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BYOLT_FAIL", "rename manifest.json:0:ENOSPC")
            assert convert() == 1
        (work / name).write_bytes(data)
        assert convert() == code
        shutil.rmtree(folder / "dst")


def _image(data: bytes, folder: Path) -> None:
    write_images(folder, 4)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(data)
    run = Run(folder, folder)
    process = run("data.max_corrupt=9")
    assert process.wait() in (1, 2) and "Traceback" not in process.text


def _config(data: bytes, folder: Path) -> None:
    folder.mkdir()
    (folder / "c.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        schema.load(folder / "c.yaml")
    text = data.decode(errors="replace").strip()
    for override in (f"train.epochs={text}", f"run.out={text}"):
        try:
            schema.load(ROOT / "configs" / "quickstart.yaml", [override])
        except ValueError:
            continue
    with pytest.raises(ValueError, match=r"not a valid YAML mapping|missing"):
        schema.from_yaml(text)


def _beside(data: bytes, folder: Path) -> None:
    """Each file that a run leaves in its folder, as a resumed run, the report and evaluate find it."""
    run = Run(folder.parent, write_images(folder.parent / "images"))
    if not (folder.parent / "run").exists():
        assert run("train.stop_at_step=2").wait() == 0
    names = [path.name for path in run.out.iterdir() if path.is_file()]
    assert {"metrics.jsonl", "starts.jsonl", "run.lock", "encoder.safetensors", "views.png"} <= {*names}
    for name in names:
        (run.out / name).write_bytes(data)
    for name in ("corrupt.jsonl", "evaluate-knn.json", "evaluate-knn.png"):
        (run.out / name).write_bytes(data)
    report.main([str(run.out)])
    read_rows(run.out / "metrics.jsonl")
    with Lock(run.out / "run.lock", "x") as lock:
        lock.take()
    assert evaluate([str(run.out / "encoder.safetensors"), "--protocol", "knn"]) == 2
    process = run("--resume", "auto", "train.stop_at_step=2")
    assert process.wait() in (0, 2) and "Traceback" not in process.text


def _refused_checkpoint(data: bytes, folder: Path) -> None:
    folder.mkdir()
    for content in (data, _sealed(data)):
        path = folder / "checkpoint-000000001.pt"
        path.write_bytes(content)
        for load in (checkpoint.load, load_trained):
            with pytest.raises(checkpoint.CheckpointError):
                load(path)
        assert checkpoint.load_newest(folder)[0] is None


def _refused_encoder(data: bytes, folder: Path) -> None:
    folder.mkdir()
    path = folder / "encoder.safetensors"
    contents = [data]
    if data.startswith(b"!!"):
        contents.append(_encoder_with(data))
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError):
            load_trained(path)


def _beton(data: bytes, folder: Path) -> None:
    folder.mkdir()
    (folder / "a.beton").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.beton"):
        open_source(folder / "a.beton")
    assert verify_shards([str(folder / "a.beton"), "--workers", "1"]) == 2


OPENED = {
    "checkpoint": _refused_checkpoint,
    "encoder": _refused_encoder,
    "files of a run": _beside,
    "manifest": _manifest,
    "samples": _samples_npy,
    "shard": _shard,
    "beton": _beton,
    "members of archives": _members,
    "labels": _label,
    "notes of make_shards": _unfinished,
    "images": _image,
    "config": _config,
}


@pytest.mark.parametrize("file", OPENED)
def test_no_file_that_is_opened_executes(file: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for name, data in _pickles(marker).items():
        if file == "files of a run" and name.startswith("old"):  # takes seconds
            continue
        OPENED[file](data, tmp_path / name.replace(" ", "_"))
        assert not marker.exists(), name


def _calls(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted name and constant keyword arguments of each call, and "import NAME" of each import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((f"import {alias.name}", {}) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"import {node.module}", {}
        elif isinstance(node, ast.Call):
            constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), constants  # type: ignore[misc]


def test_no_module_can_unpickle_a_file() -> None:
    """Whichever file is added next."""
    asked = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
    unsafe = {f"import {name}" for name in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")}
    unsafe |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
    found = set()
    for path in PRODUCT:
        for name, constants in _calls(path):
            assert name not in unsafe, f"{path}: {name}"
            if name in asked:
                found.add(name)
                key, value = asked[name]
                assert constants.get(key) is value, f"{path}: {name} without {key}={value}"
    assert found == asked.keys()


# ── the report in a browser ─────────────────────────────────────────────────────────────────────────────────

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths that it is asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()


class Shown(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attributes}

    def handle_data(self, data: str) -> None:
        self.text += data


def _browse(page: Path, folder: Path) -> Shown:
    """The page as it is in Chromium once it has loaded."""
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*command, page.absolute().as_uri()], capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
    return Shown(done.stdout)


def _hostile(address: str) -> list[str]:
    """Names that run a script, or fetch something, where a page does not escape them."""
    run = "document.documentElement.setAttribute('data-ran', 1)"
    return [
        f"<script>{run}</script>",
        f"</pre></style></title><script src='{address}/script'></script>",
        f'"><img src={address}/img onerror="{run}">',
        f"' onload='{run}' style='background:url({address}/css)",
        f"<svg onload=\"{run}\"><style>@import '{address}/import';</style>",
        f"<iframe srcdoc=\"<script>parent.{run}</script>\" src='javascript:parent.{run}'></iframe>",
        f"<base href='{address}/'><link rel=stylesheet href='{address}/link'><a href='javascript:{run}'>",
        f"<meta http-equiv=refresh content='0;url={address}/refresh'>",
        "{{ 98765 * 43211 }} {% raw %} ${98765 * 43211} {# #}",
        "\u202egpj.exe\u202c \u2066\u200f \x1b[31m \x07 &lt;b&gt; &#60;i&#62; \ud800 \udcff",
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_no_name_in_a_report_runs_or_fetches_anything(
    tmp_path: Path, listener: tuple[str, list[str]]
) -> None:
    address, asked = listener
    names = _hostile(address)
    control = tmp_path / "control.html"
    control.write_text(f"<html><body>{''.join(names[:6])}</body></html>", errors="replace")
    shown = _browse(control, tmp_path / "control")
    # The names do what they claim where they are not escaped.
    assert ("data-ran", "1") in shown.attributes and {"/script", "/img"} <= {*asked}
    asked.clear()

    file_names = [name.replace("/", "\u2044").replace("\ud800", "")[:200] for name in names]
    images = write_images(tmp_path / "images")
    shards = _shards_with_classes(images, tmp_path / file_names[0], names)
    run = Run(tmp_path, images)
    run.out = tmp_path / file_names[2] / file_names[1]
    paths = (f"run.out={run.out}", f"data.path={shards}", f"eval.path={shards}", "eval.k=2")
    process = run("train.stop_at_step=2", *paths)
    assert process.wait() == 0, process.text
    corrupt = [{"id": i, "where": name, "reason": name} for i, name in enumerate(names)]
    (run.out / "corrupt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corrupt))
    start = json.loads((run.out / "starts.jsonl").read_text().splitlines()[0])
    for key in ("command", "hardware", "backend", "time", "precision", "ranks"):
        start[key] = " ".join(names)
    start["versions"] = {name: name for name in names}
    start["rounding"] = start["config"] = {name: {name: name} for name in names}
    start["changed"] = names
    metrics = {"step": 2, "epoch": 0.5, "loss": 1.0, **dict.fromkeys(names, 1.0)}
    for file, row in (("starts.jsonl", start), ("starts.jsonl", start), ("metrics.jsonl", metrics)):
        with (run.out / file).open("a") as rows:
            rows.write(json.dumps(row) + "\n")
    (run.out / f"checkpoint-000000009{file_names[4]}.pt").write_bytes(b"")
    row = {"name": "".join(names), "top1": 1.0, "images": 1}
    result = {
        "protocol": names[0],
        "test": {"path": names[1]},
        "untrained": False,
        "step": 2,
        "results": [row],
    }
    (run.out / f"evaluate-{file_names[1]}.json").write_text(json.dumps(result))
    (run.out / f"evaluate-{file_names[1]}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + names[0].encode())
    (run.out / f"evaluate-{file_names[4]}.json").write_text(json.dumps(result | {"step": names[2]}))
    other = shutil.copytree(run.out, tmp_path / file_names[5])
    pages = {"a run": [run.out], "two runs": [run.out, other], "a run without an encoder": [run.out]}
    for kind, runs in pages.items():
        if "without" in kind:  # the hostile config in starts.jsonl is then the only one
            for path in [*run.out.glob("checkpoint-*"), run.out / "encoder.safetensors"]:
                path.write_bytes(b"")
        page = tmp_path / f"{kind}.html"
        assert report.main([*map(str, runs), "--out", str(page)]) == 0
        html = page.read_text()
        assert html.count("&lt;script&gt;document") >= 2 and "Content-Security-Policy" in html
        shown = _browse(page, tmp_path / f"profile of {kind}")
        assert asked == []
        assert "{{ 98765 * 43211 }}" in shown.text and str(98765 * 43211) not in shown.text
        assert not shown.tags & {"script", "iframe", "svg", "base", "link", "a", "object", "form"}
        for name, value in shown.attributes:
            assert not name.startswith(("on", "data-")), name
            assert name not in ("src", "href") or value.startswith("data:image/png;base64,")
            assert "url(" not in value or name == "alt"


def _shards_with_classes(images: Path, folder: Path, names: list[str]) -> Path:
    """Shards whose classes have these names."""
    assert make_shards([str(images), str(folder), "--workers", "1"]) == 0
    manifest = Manifest.load(folder)
    samples = np.array(manifest.samples)
    samples["label"] = np.arange(len(samples)) % len(names)
    dataclasses.replace(manifest, classes=names, samples=samples).save(folder)
    return folder

"""Images that are overwritten in place, by others of equal length: refused on resume, or at the latest when read."""

import io
import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from test_beton import mixed, write_beton
from test_index import write_tar
from test_loader import ids, make_config, take

from byolt.model.distributed import World
from byolt.model.run.resume import begin
from byolt.pipelines.formats import beton
from byolt.pipelines.formats.beton import BetonSource
from byolt.pipelines.formats.beton_index import index_path, write_index
from byolt.pipelines.formats.encoded import spots
from byolt.pipelines.manifest import MANIFEST
from byolt.pipelines.sources import Source, open_source
from byolt.tools.make_shards import main as make_shards
from byolt.tools.verify_shards import main as verify

KINDS = ["folder", "tar", "betons", "bare .beton", "indexed .beton"]
READ_AT_OPEN = {"folder", "bare .beton"}  # all images enter the fingerprint whenever the data set is opened
REASON = "its bytes are not those that were indexed (crc32)"


def overwrite(file: Path, image: bytes) -> None:
    """Changes a bit in the middle of an image in the file, whose times stay."""
    before, at = file.stat(), file.read_bytes().index(image) + len(image) // 2
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(bytes([image[len(image) // 2] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of 20 x 30 px, as a folder and as shards of both kinds."""
    root, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    for i in range(16):
        path = root / "folder" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    for name, form in (("tar", "webdataset"), ("betons", "beton")):
        made = [str(root / "folder"), str(root / name), "--format", form]
        assert make_shards([*made, "--workers", "1"]) == 0
    return root


@pytest.fixture(params=KINDS)
def data(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> tuple[str, Path]:
    """Each kind of data set, and what to open."""
    kind = request.param
    if not kind.endswith(" .beton"):
        return kind, shutil.copytree(whole / kind, tmp_path / "data")
    file = shutil.copy(whole / "betons/shard-000000.beton", tmp_path / "a.beton")
    assert kind == "bare .beton" or verify([str(file), "--index", "--workers", "1"]) == 0
    return kind, file


def file_of(path: Path, source: Source, i: int) -> Path:
    """The file that holds image `i`."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return next(file for file in files if source.read(i) in file.read_bytes())


def test_an_overwritten_image_is_refused(data: tuple[str, Path]) -> None:
    kind, path = data
    source = open_source(path)
    fingerprint, before = source.fingerprint, [source.read(i) for i in range(16)]
    overwrite(file_of(path, source, 7), before[7])
    again = open_source(path)
    assert (again.fingerprint != fingerprint) == (kind in READ_AT_OPEN)
    for opened in [source] if kind in READ_AT_OPEN else [source, again]:
        for i in range(16):
            if i != 7:
                assert opened.read(i) == before[i]
                continue
            with pytest.raises(ValueError, match=re.escape(REASON)):
                opened.read(i)


@pytest.mark.parametrize("resident", ["never", pytest.param("always", marks=pytest.mark.slow)])
def test_the_loader_replaces_and_lists_it(resident: str, data: tuple[str, Path], tmp_path: Path) -> None:
    path, log = data[1], tmp_path / "corrupt.jsonl"
    source = open_source(path)
    assert source.fingerprint
    overwrite(file_of(path, source, 7), source.read(7))
    backend = "auto" if resident == "always" else "torch"
    config = make_config(data={"backend": backend, "resident": resident}, train={"batch_size": 16})
    [batch] = ids(take(config, 1, source, corrupt_log=log))  # type: ignore[arg-type]
    assert 7 not in batch and batch.count(8) == 2
    [row] = map(json.loads, log.read_text().splitlines())
    assert (row["id"], row["file"], row["reason"]) == (7, "a/8.jpg", REASON)


def test_a_large_beton_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed image is noticed at opening if it is sampled. An index gives the fingerprint that a small file has."""
    monkeypatch.setattr(beton, "WHOLE", 1000)
    monkeypatch.setattr(beton, "SAMPLED", 12)
    file = write_beton(tmp_path / "a.beton", mixed(24, 20, 31))
    written, fingerprint = file.read_bytes(), BetonSource([file]).fingerprint
    noticed = []
    for i in range(24):
        overwrite(file, BetonSource([file]).region(i))
        noticed.append(BetonSource([file]).fingerprint != fingerprint)
        file.write_bytes(written)
    assert sum(noticed) == 12 and len(set(np.diff(np.flatnonzero(noticed)))) > 1  # irregular
    assert verify([str(file), "--index", "--workers", "1"]) == 0
    indexed = BetonSource([file])
    assert indexed.checksums is not None and len(indexed.checksums) == 24
    assert indexed.fingerprint != fingerprint == indexed.former_fingerprints[0]
    monkeypatch.setattr(beton, "WHOLE", 1 << 30)
    index_path(file).unlink()
    assert BetonSource([file]).fingerprint == indexed.fingerprint


def test_an_index_of_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_beton(tmp_path / "a.beton", mixed(6))
    assert verify([str(file), "--index", "--workers", "1"]) == 0
    assert f"{file}.index: the checksum of each image" in capsys.readouterr().out
    index = index_path(file).read_bytes()
    for damaged in (
        index[:-1],
        index[:-1] + bytes([index[-1] ^ 1]),
        b"",
        index.replace(b"index 1", b"index 2"),
    ):
        index_path(file).write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"a\.beton\.index is damaged, or .* --index .*a\.beton, or remove"
        ):
            open_source(file)
    index_path(file).write_bytes(index)
    write_beton(file, mixed(7))
    with pytest.raises(ValueError, match=r"a\.beton was written again after it"):
        open_source(file)
    assert verify([str(file), "--index", "--workers", "1"]) == 0  # renews it
    assert len(open_source(file)) == 7


@pytest.mark.parametrize("kind", ["tar", "betons", "indexed .beton", "index: a length"])
def test_a_shard_of_the_same_size_with_other_images_is_refused(
    kind: str, whole: Path, tmp_path: Path
) -> None:
    """Where the sizes of files and images are those of the manifest, or of the index, only bytes tell them apart."""
    path = shutil.copytree(whole / ("tar" if kind == "tar" else "betons"), tmp_path / "data")
    [shard] = path.glob("shard-*")
    pattern = rf"^shard {shard} holds other images than manifest\.json states.*copy it again, or remake"
    if kind.startswith("i"):
        (path / MANIFEST).unlink()
        path = shard
        assert verify([str(path), "--index", "--workers", "1"]) == 0
        pattern = rf"^{shard}\.index is damaged, or .* run tools/verify_shards\.py --index {shard}, or remove"
    images = [open_source(path).read(i) for i in range(16)]
    if kind == "index: a length":
        checksums = np.array(open_source(path).checksums)
        write_index(shard, checksums + (np.arange(16) == 7).astype(np.uint64) * np.uint64(1 << 32))
    else:
        for image in images[1:]:
            overwrite(shard, image)
        assert len(open_source(path)) == 16  # one is left: damage
        overwrite(shard, images[0])
    with pytest.raises(ValueError, match=pattern):
        open_source(path)


def test_a_tar_without_an_image_is_opened(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    write_tar(tmp_path / "a.tar", [("readme.txt", b"x")])
    write_tar(tmp_path / "b.tar", [("1.jpg", image.getvalue())])
    assert make_shards(["--index", str(tmp_path), "--workers", "1"]) == 0
    assert open_source(tmp_path).read(0) == image.getvalue()
    assert [spots(3, count) for count in (0, 1, 2, 5)] == [[], [3], [3, 4], [3, 4, 5, 6]]


def test_only_whole_betons_without_manifest_are_indexed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_beton(tmp_path / "a.beton", mixed(6))
    assert verify([str(file), "--index", "--workers", "1"]) == 0
    image = BetonSource([file]).region(1)
    data = file.read_bytes()
    file.write_bytes(data.replace(image[20:], bytes(len(image) - 20)))
    assert verify([str(file), "--index", "--workers", "1"]) == 1
    assert not index_path(file).exists()
    with pytest.raises(SystemExit):
        verify([str(file), "--index", "--no-decode"])


def test_a_fingerprint_of_an_earlier_release_is_accepted_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "a/1.png")
    source, config = open_source(tmp_path), make_config()
    world = World(0, 0, 1, torch.device("cpu"), "none")
    state = {"data": source.fingerprint, "config": config.model_dump(mode="json"), "rounding": {}, "step": 3}

    def resumed(**changed: str) -> str:
        found = Path("x.pt"), state | {"knn_untrained": None, "init_from": None} | changed
        with (
            patch("byolt.model.run.resume.find_checkpoint", return_value=found),
            patch("byolt.model.run.resume.restore"),
        ):
            return begin("auto", config, source, [], None, None, world, {}).origin  # type: ignore[arg-type]

    assert resumed() == "resumed from x.pt"
    assert "does not cover every image" in resumed(data=source.former_fingerprints[0])
    with pytest.raises(ValueError, match=r"data\.fingerprint: 0 in the checkpoint"):
        resumed(data="0")

"""Damage inside the image data of a JPEG, whose header and end are sound: no mode trains on it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from test_loader import ids, make_config, take

from byolt.pipelines import sources
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.formats.proof import prove_jpeg
from byolt.pipelines.sources import ParallelReader, Source, TarSource, open_source
from byolt.tools.make_shards import main as make_shards

N, BAD = 16, 7


def jpeg(seed: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def damaged(data: bytes, fill: Callable[[int], bytes]) -> bytes:
    """The middle third of the image data replaced; the end marker stays."""
    start = data.index(b"\xff\xda") + 12  # the first scan
    third = (len(data) - 2 - start) // 3
    return data[: start + third] + fill(third) + data[start + 2 * third :]


def noise(length: int) -> bytes:
    return np.random.default_rng(0).integers(0, 255, length, np.uint8).tobytes()  # no byte is 255: no marker


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "noise": lambda data: damaged(data, noise),
    "zeros": lambda data: damaged(data, bytes),
    "cut, with an end marker": lambda data: data[: 2 * len(data) // 3] + b"\xff\xd9",
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_the_proof_finds_what_pil_decodes(options: dict, kind: str) -> None:
    whole = jpeg(0, **options)
    bad = DAMAGE[kind](whole)
    assert prove_jpeg(whole, inspect(whole)) and decode(bad).shape == (90, 90, 3)
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        prove_jpeg(bad, inspect(bad))


def make(kind: str, folder: Path, damage: Callable[[bytes], bytes]) -> Source:
    """A data set in which one image was damaged before anything indexed it."""
    for i in range(N):
        path = folder / "images" / "ab"[i // 8] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(jpeg(i)) if i == BAD else jpeg(i))
    if kind == "folder":
        return open_source(folder / "images")
    made = [str(folder / "images"), str(folder / "made"), "--no-decode", "--workers", "1"]
    assert make_shards([*made, "--format", "webdataset" if kind == "tar" else "beton"]) == 0
    if kind == "bare .beton":
        return open_source(folder / "made/shard-000000.beton")
    return open_source(folder / "made")


@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        pytest.param("tar", marks=pytest.mark.slow),
        pytest.param("bare .beton", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "mode",
    ["torch", pytest.param("dali", marks=pytest.mark.slow), pytest.param("resident", marks=pytest.mark.slow)],
)
def test_no_mode_trains_on_it(mode: str, kind: str, tmp_path: Path) -> None:
    if mode == "dali":
        pytest.importorskip("nvidia.dali")
    source, log = make(kind, tmp_path, DAMAGE["noise"]), tmp_path / "corrupt.jsonl"
    keep = {"backend": "auto", "resident": "always"}
    data = keep if mode == "resident" else {"backend": mode, "resident": "never"}
    config = make_config(data=data, train={"batch_size": N})
    with patch.object(sources, "prove_jpeg", wraps=prove_jpeg) as proof:
        [batch] = ids(take(config, 1, source, corrupt_log=log))  # type: ignore[arg-type]
    assert proof.called == (mode == "dali")  # the others prove while they decode
    [row] = map(json.loads, log.read_text().splitlines())
    assert "Corrupt JPEG data" in row["reason"]
    assert row["id"] not in batch and len(set(batch)) == N - 1


def test_an_image_is_proven_once_and_a_converted_one_never(tmp_path: Path) -> None:
    source = make("folder", tmp_path, DAMAGE["zeros"])
    with patch.object(sources, "prove_jpeg", wraps=prove_jpeg) as proof:
        reader = ParallelReader(source, 1)
        for _ in range(2):
            found = list(reader(range(N)))
            assert [isinstance(data, bytes) for data in found] == [i != BAD for i in range(N)]
        assert proof.call_count == N + 1  # the damaged one each time
    made = tmp_path / "proven"
    assert make_shards([str(tmp_path / "images"), str(made), "--workers", "1"]) == 0
    shards = open_source(made)
    assert isinstance(shards, TarSource) and len(shards) == N - 1
    with patch.object(sources, "prove_jpeg") as proof:
        assert len(list(ParallelReader(shards, 1)(range(N - 1)))) == N - 1
        assert not proof.called

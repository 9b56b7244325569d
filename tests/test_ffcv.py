"""With ffcv itself: its Loader reads what we write, and we read what it writes, in every mode and to the pixel.

Run where tools/install_ffcv.sh has put it (CI does); skipped elsewhere.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byolt.pipelines.formats.beton import BetonSource
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.manifest import Manifest
from byolt.pipelines.sources import open_source
from byolt.tools.make_shards import main as make_shards
from byolt.tools.verify_shards import main as verify

pytestmark = pytest.mark.ffcv
SIDE = 40  # ffcv's plainest decoder wants images of one size


def photo(i: int, height: int = SIDE, width: int = SIDE) -> Image.Image:
    noise = np.random.default_rng(i).integers(0, 256, (4, 3, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 JPEGs in 3 classes: color and gray, of each chroma subsampling, progressive or not, rotated by EXIF."""
    root = tmp_path_factory.mktemp("images")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(30):
        path = root / f"c{i % 3}/{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = photo(i).convert("L") if i % 7 == 3 else photo(i)
        options = {"exif": exif} if i % 5 == 0 else {}
        image.save(path, quality=60 + i, subsampling=i % 3, progressive=bool(i % 2), **options)
    return root


def images_of_ffcv(path: Path, os_cache: bool) -> dict[str, tuple[np.ndarray, int]]:
    """Pixels and label by key, as ffcv's Loader reads a file."""
    from ffcv.fields import JSONField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.bytes import BytesDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "key": [BytesDecoder()]}
    loader = Loader(
        str(path),
        batch_size=7,
        num_workers=1,
        order=OrderOption.RANDOM if os_cache else OrderOption.QUASI_RANDOM,
        os_cache=os_cache,
        drop_last=False,
        pipelines=pipelines,
    )
    found = {}
    for images, labels, keys in loader:
        for image, label, key in zip(images, labels, keys, strict=True):
            found[JSONField.unpack(key)["key"]] = np.array(image), int(label[0])
    return found


def dali_pixels(encoded: list[bytes]) -> list[np.ndarray]:
    """With the flags under which DALI decodes as ffcv does: the fast transform, sizes as stored."""
    dali = pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")

    @dali.pipeline_def(batch_size=len(encoded), num_threads=1, device_id=None)
    def graph() -> object:
        images = dali.fn.external_source(lambda: [np.frombuffer(data, np.uint8) for data in encoded])
        return dali.fn.decoders.image(images, adjust_orientation=False, use_fast_idct=True)

    pipeline = graph()
    pipeline.build()
    (images,) = pipeline.run()
    return [np.array(images[i]) for i in range(len(encoded))]


# all of the file mapped, or pages read as they are needed
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_ours_and_dali_gives_the_same_pixels(os_cache: bool, folder: Path, tmp_path: Path) -> None:
    arguments = ["--format", "beton", "--raw-fraction", "0.4", "--workers", "1"]
    assert make_shards([str(folder), str(tmp_path / "dst"), *arguments]) == 0
    path = tmp_path / "dst/shard-000000.beton"
    theirs, ours = images_of_ffcv(path, os_cache), open_source(path)
    assert isinstance(ours, BetonSource)
    assert 5 <= ours.raw.sum() <= 20
    assert len(theirs) == len(ours) == 30
    pixels = dali_pixels([ours.read(i) for i in range(30)])
    for i in range(30):
        note = json.loads(ours.note(i))
        image, label = theirs[note["key"]]
        assert label == ours.labels[i] == int(note["file"][1])
        assert np.array_equal(image, pixels[i]), note
        if ours.raw[i]:
            with Image.open(folder / note["file"]) as original:
                assert np.array_equal(image, np.asarray(original.convert("RGB")))


MODES = {
    "jpg": {"write_mode": "jpg", "jpeg_quality": 80},
    "raw": {"write_mode": "raw"},
    "proportion": {"write_mode": "proportion", "compress_probability": 0.5},
    "smart": {"write_mode": "smart", "smart_threshold": 3 * 30 * 41},
}


class Rows:
    """A file that ffcv wrote: image, float, JSON, bytes, label."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[np.ndarray, float, dict, np.ndarray, int]:
        note = {"key": f"{i:04d}", "text": "é" * i}
        return np.array(photo(i, 30, 30 + i)), i / 3, note, np.full(i + 1, 7, np.uint8), i - 1


@pytest.mark.parametrize("mode", MODES)
def test_we_read_what_ffcv_wrote(mode: str, tmp_path: Path) -> None:
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(**MODES[mode])
    fields = {"img": image, "f": FloatField(), "key": JSONField(), "b": BytesField(), "cls": IntField()}
    path = tmp_path / "a.beton"
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(Rows(), chunksize=5)
    source = open_source(f"{path}?image=img&label=cls")
    assert isinstance(source, BetonSource)
    assert source.labels.tolist() == list(range(-1, 23))
    raw = {"jpg": 0, "raw": 24, "smart": 12}.get(mode)
    assert source.raw.sum() == raw if raw is not None else 0 < source.raw.sum() < 24
    for i, (pixels, _, note, _, _) in enumerate(Rows()[i] for i in range(24)):
        found = decode(source.read(i)).numpy()
        assert json.loads(source.note(i)) == note
        assert found.shape == pixels.shape == (source.heights[i], source.widths[i], 3)
        difference = np.abs(found.astype(int) - pixels)
        assert difference.max() == 0 if source.raw[i] else difference.mean() < 6
    assert verify([str(path), "--workers", "1"]) == 0
    assert make_shards([str(path), str(tmp_path / "tars"), "--workers", "1"]) == 0
    tars = open_source(tmp_path / "tars")
    assert tars.labels.tolist() == source.labels.tolist()
    assert [tars.read(i) == source.read(i) for i in range(24)] == (~source.raw).tolist()


def test_engine_ffcv_writes_the_same_samples(folder: Path, tmp_path: Path) -> None:
    arguments = ["--format", "beton", "--workers", "1", "--max-size", "20", "--raw-fraction", "0.5"]
    (folder / "c0/bad.jpg").write_text("no image")
    for engine in ("own", "ffcv"):
        dst = str(tmp_path / engine)
        assert make_shards([str(folder), dst, *arguments, "--engine", engine]) == 0
        assert verify([dst, "--workers", "1"]) == 0
        assert "bad.jpg" in (tmp_path / engine / "quarantine.jsonl").read_text()
    ours, theirs = (BetonSource([tmp_path / engine / "shard-000000.beton"]) for engine in ("own", "ffcv"))
    assert len(ours) == len(theirs) == 30
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert set(theirs.heights) == set(theirs.widths) == {20}
    assert 0 < theirs.raw.sum() < 30
    assert [ours.note(i) for i in range(30)] == [theirs.note(i) for i in range(30)]
    for i in range(30):  # Lanczos and area resizing, JPEG twice: alike, not the same
        one, other = (decode(source.read(i)).float() for source in (ours, theirs))
        assert (one - other).abs().mean() < 12
    assert Manifest.load(tmp_path / "ffcv").classes == ["c0", "c1", "c2"]
    again = str(tmp_path / "again")
    assert make_shards([str(folder), again, *arguments, "--engine", "ffcv"]) == 0
    name = "shard-000000.beton"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ffcv" / name).read_bytes()


def test_real_photographs_decode_alike(shared_data: Path) -> None:
    """ffcv's decoder, called as its Loader does, and DALI's, on every photograph."""
    from ffcv.libffcv import ctypes_imdecode

    files = sorted((shared_data / "imagenet-sample").iterdir())
    encoded = [path.read_bytes() for path in files]
    headers = [inspect(data) for data in encoded]
    usable = [i for i, header in enumerate(headers) if header.format == "jpeg" and header.channels != 4]
    assert len(usable) > 200
    ours = dali_pixels([encoded[i] for i in usable])
    for i, pixels in zip(usable, ours, strict=True):
        height, width = headers[i].height, headers[i].width
        source, image = np.frombuffer(encoded[i], np.uint8), np.empty((height, width, 3), np.uint8)
        code = ctypes_imdecode(
            source.ctypes.data, source.size, height, width, image.ctypes.data, 0, 0, height, width, 1, 1, 0, 0
        )
        assert code == 0, files[i]
        assert np.array_equal(image, pixels), files[i]

""".beton files: ffcv's own file is read to the pixel, damage is refused by name, a million samples open at once."""

import io
import lzma
import os
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from byolt.configs.schema import AugmentConfig, Config, ViewConfig
from byolt.pipelines.backends import make_backend
from byolt.pipelines.formats.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE,
    IMAGE_TYPE,
    INT_TYPE,
    TYPES,
    BetonSource,
)
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.loader import Batch, Loader
from byolt.pipelines.sources import Source, open_source
from byolt.pipelines.views import draw

CPU = torch.device("cpu")
PAGE = 1 << 21
JSON_TYPE = 5


class Sample(NamedTuple):
    """One image for `write_beton`: mode 0 with a JPEG's bytes, or mode 1 with pixels."""

    mode: int
    height: int
    width: int
    data: bytes
    label: int = -1


def write_beton(
    path: Path, samples: Sequence[Sample], types: Sequence[int] = (2, 1), shuffle_table: bool = False
) -> Path:
    """A file as the format's description says. JSON fields hold an empty region; a second image field holds one
    black pixel, a second int field 99.
    """
    record = np.dtype([(f"f{k}", TYPES[kind][1]) for k, kind in enumerate(types)], align=True)
    metadata, table = np.zeros(len(samples), record), []
    fields = np.zeros(len(types), FIELD)
    fields["type"], fields["name"] = types, [f"field{k}" for k in range(len(types))]
    start = HEADER.itemsize + fields.nbytes + metadata.nbytes
    pointer = first_page = -(-start // PAGE) * PAGE
    data = bytearray()
    for i, sample in enumerate(samples):
        if pointer % PAGE + len(sample.data) + 3 > PAGE:
            data += bytes(-pointer % PAGE)
            pointer = first_page + len(data)
        for k, kind in enumerate(types):
            if kind in types[:k] and kind == IMAGE_TYPE:
                metadata[i][f"f{k}"] = 1, 1, 1, pointer + len(sample.data)
                table.append((i, pointer + len(sample.data), 3))
            elif kind == IMAGE_TYPE:
                metadata[i][f"f{k}"] = sample.mode, sample.width, sample.height, pointer
                table.append((i, pointer, len(sample.data)))
            elif kind == INT_TYPE:
                metadata[i][f"f{k}"] = 99 if kind in types[:k] else sample.label
            elif kind == JSON_TYPE:
                metadata[i][f"f{k}"] = pointer, 0
                table.append((i, pointer, 0))
        data += sample.data + bytes(3 * (types.count(IMAGE_TYPE) - 1))
        pointer = first_page + len(data)
    data += bytes(-pointer % PAGE)
    rows = np.array(table, ALLOCATION)
    if shuffle_table:
        rows = np.random.default_rng(0).permutation(rows)
    header = np.array((2, len(types), PAGE, len(samples), first_page + len(data)), HEADER)
    with path.open("wb") as file:
        for part in (header, fields, metadata, bytes(first_page - start), data, rows):
            file.write(part)
    return path


def jpeg(height: int, width: int, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixels(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mixed(count: int, height: int = 0, width: int = 0) -> list[Sample]:
    """JPEG and raw in turn, of different sizes where none is given."""
    samples = []
    for i in range(count):
        h, w = height or 20 + i, width or 31 - i % 9
        data = jpeg(h, w, i) if i % 2 else pixels(h, w, i).tobytes()
        samples.append(Sample(1 - i % 2, h, w, data, i % 3))
    return samples


@pytest.fixture
def beton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 samples, read 5 at a time."""
    monkeypatch.setattr("byolt.pipelines.formats.beton._PIECE", 5)
    return write_beton(tmp_path / "a.beton", mixed(12))


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> BetonSource:
    """Written by ffcv 1.0.2; its samples are made as tests/fixtures' origin describes."""
    path = tmp_path_factory.mktemp("golden") / "golden.beton"
    path.write_bytes(lzma.decompress((fixtures / "ffcv_1.0.2.beton.xz").read_bytes()))
    return BetonSource([path])


def golden_image(i: int) -> np.ndarray:
    rng = np.random.default_rng(i)
    h, w = rng.integers(20, 60), rng.integers(20, 60)
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, np.full((h, w), i * 20)], 2).astype(np.uint8)


def test_the_file_that_ffcv_wrote(golden: BetonSource) -> None:
    """JPEG and raw, labels, sizes and pixels; raw ones exactly."""
    assert len(golden) == 12
    assert golden.labels.tolist() == [i % 3 for i in range(12)]
    formats = []
    for i in range(12):
        data, expected = golden.read(i), golden_image(i)
        header = inspect(data)
        assert (header.height, header.width) == (golden.heights[i], golden.widths[i]) == expected.shape[:2]
        formats.append(header.format)
        difference = np.abs(decode(data).numpy().astype(int) - expected)
        assert difference.max() == 0 if header.format == "ppm" else difference.mean() < 4
    assert formats.count("jpeg") == 3
    assert formats.count("ppm") == 9


def test_dali_decodes_the_file_that_ffcv_wrote(golden: BetonSource) -> None:
    dali = pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    encoded = [golden.read(i) for i in range(12)]

    @dali.pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def graph() -> object:
        images = dali.fn.external_source(lambda: [np.frombuffer(data, np.uint8) for data in encoded])
        return dali.fn.decoders.image(images, adjust_orientation=False)

    pipeline = graph()
    pipeline.build()
    (images,) = pipeline.run()
    for i in range(12):
        assert np.array_equal(np.array(images[i]), decode(encoded[i]).numpy()), i


def test_raw_and_jpeg_in_one_batch_are_the_same_pixels_in_both_back_ends(tmp_path: Path) -> None:
    """A crop of the whole image at its own size is the decoder alone."""
    dali_backend = pytest.importorskip("byolt.pipelines.dali_backend", reason="NVIDIA DALI is not installed")
    samples = mixed(96, 40, 40)
    source = BetonSource([write_beton(tmp_path / "a.beton", samples)])
    encoded = [source.read(i) for i in range(96)]
    none = ViewConfig(flip=0, jitter=0, gray=0, blur=0, solarize=0)
    augment = AugmentConfig(size=40, mean=(0, 0, 0), std=(1, 1, 1), view1=none, view2=none)
    params = draw(none, 0, 0, np.arange(96), 0, source.heights, source.widths)
    params.top[:], params.left[:], params.height[:], params.width[:] = 0, 0, 40, 40
    view, _ = dali_backend.DaliBackend(augment, CPU, torch.float32, threads=1)(encoded, params, params)
    ours = (view * 255).permute(0, 2, 3, 1)
    expected = torch.stack([decode(data) for data in encoded])
    assert (ours - expected).abs().max() < 1e-3
    assert torch.equal(ours.round().to(torch.uint8), expected)
    for i in range(0, 96, 2):
        assert expected[i].numpy().tobytes() == samples[i].data


def test_bytes_are_those_written(beton: Path) -> None:
    source = open_source(beton)
    assert isinstance(source, BetonSource)
    assert source.classes is None
    for i, sample in enumerate(mixed(12)):
        assert source.read(i).endswith(sample.data)
        assert source.read(i) == sample.data or sample.mode == 1
        assert (source.heights[i], source.widths[i], source.labels[i]) == (sample.height, sample.width, i % 3)
        assert decode(source.read(i)).shape == (sample.height, sample.width, 3)
    assert source.labels.dtype == source.heights.dtype == source.widths.dtype == np.int64
    assert source.describe(-1) == source.describe(11)
    for outside in (12, -13):
        with pytest.raises(IndexError):
            source.describe(outside)


@pytest.mark.parametrize(
    "types", [(2,), (1, 2), (2, 1, 5), (5, 2, 0, 1), (0, 1, 2, 1, 2), (6, 4, 3, 2), (5, 5, 1, 2)]
)
def test_fields_are_found_by_type(types: tuple[int, ...], tmp_path: Path) -> None:
    """With gaps; empty regions that share the image's pointer; unordered rows; pages that end early."""
    samples = mixed(9) + [Sample(1, 700, 800, bytes([k]) * 1_680_000, 7) for k in range(2)]
    source = BetonSource([write_beton(tmp_path / "a.beton", samples, types, shuffle_table=True)])
    assert source.labels.tolist() == ([s.label for s in samples] if INT_TYPE in types else [-1] * 11)
    assert [source.read(i)[-len(s.data) :] for i, s in enumerate(samples)] == [s.data for s in samples]


def test_fields_are_found_by_name(tmp_path: Path) -> None:
    """The second image of a sample is one black pixel, its second number 99."""
    path = write_beton(tmp_path / "a.beton", mixed(9), (2, 1, 5, 1, 2))
    black = b"P6\n1 1\n255\n\0\0\0"
    for query, is_black, is_99 in [
        ("", False, False),
        ("?image=field0&label=field1", False, False),
        ("?image=field4", True, False),
        ("?label=field3", False, True),
        ("?label=field3&image=field4", True, True),
    ]:
        for text in (f"{path}{query}", f"{path},{path}{query}"):
            source = open_source(text)
            again = pickle.loads(pickle.dumps(source))
            for found in (source, again):
                assert (found.read(1) == black, set(found.labels) == {99}) == (is_black, is_99), text
                assert len(found) == 9 * (1 + text.count(","))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "?image=photo",
            r"a\.beton has no RGB image field named 'photo', only 'field0' \(RGB image\), 'field1' \(int\): name "
            "another field",
        ),
        ("?label=field0", r"no int field named 'field0', only 'field0' \(RGB image\), 'field1' \(int\)"),
        ("?labels=field1", "after the question mark write image=FIELD, label=FIELD, or both joined by &"),
        ("?image=", "after the question mark"),
        ("?image", "after the question mark"),
        ("?", "after the question mark"),
    ],
)
def test_field_that_is_not_there_is_refused_by_name(query: str, message: str, beton: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(f"{beton}{query}")


def test_file_whose_name_looks_like_a_query(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "a.beton?image=x.beton", mixed(2))
    assert len(open_source(path)) == 2


def test_note_is_the_first_json_field(golden: BetonSource, beton: Path) -> None:
    assert [golden.note(i) for i in (0, 4)] == [b'{"key": "00000"}', b'{"key": "00004"}']
    assert golden.unread_fields() == [f"{golden.paths[0]}: f", f"{golden.paths[0]}: b"]
    assert BetonSource([beton]).note(3) == b""
    path = write_beton(beton.with_name("b.beton"), mixed(3), types=(2, 1, 5))
    record = HEADER.itemsize + 3 * FIELD.itemsize + 40
    for values in ((PAGE, 1 << 40), (0, 9), (PAGE, PAGE + 1)):
        data = bytearray(path.read_bytes())
        struct.pack_into("<QQ", data, record + 24, *values)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"b\.beton sample 1: its JSON is outside the data"):
            BetonSource([path]).note(1)


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    samples = mixed(12)
    whole = BetonSource([write_beton(tmp_path / "whole.beton", samples)])
    names = [
        str(write_beton(tmp_path / f"part{k}.beton", samples[rows], shuffle_table=True))
        for k, rows in enumerate((slice(0, 5), slice(5, 6), slice(6, 12)))
    ]
    parts = open_source(", ".join(names))
    assert len(parts) == 12
    assert [parts.read(i) for i in range(12)] == [whole.read(i) for i in range(12)]
    assert parts.labels.tolist() == whole.labels.tolist()
    assert parts.heights.tolist() == whole.heights.tolist()
    assert parts.fingerprint == whole.fingerprint
    assert [parts.describe(i) for i in (4, 5, 6, 11)] == [
        f"{names[0]} sample 4",
        f"{names[1]} sample 0",
        f"{names[2]} sample 0",
        f"{names[2]} sample 5",
    ]
    assert open_source(",".join(reversed(names))).fingerprint != whole.fingerprint


def test_a_file_whose_name_has_a_comma(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "a,b.beton", mixed(2))
    assert open_source(path).describe(1) == f"{path} sample 1"


def test_fingerprint_follows_every_column_and_some_pixels(tmp_path: Path) -> None:
    def fingerprint(samples: list[Sample], at: int, **changes: object) -> str:
        changed = [*samples[:at], samples[at]._replace(**changes), *samples[at + 1 :]]
        return BetonSource([write_beton(tmp_path / "a.beton", changed)]).fingerprint

    few, many = mixed(6), mixed(200, 20, 31)  # of the 200, number 2 is not among those whose bytes are read
    black = bytes(3 * 20 * 31)
    assert fingerprint(few, 2) == fingerprint(few, 2) != fingerprint(few, 2, data=bytes(len(few[2].data)))
    variants = [
        fingerprint(many, 2),
        fingerprint(many, 3, data=jpeg(20, 31, 77)),
        fingerprint(many, 2, label=9),
        fingerprint(many, 2, height=31, width=20),
        fingerprint(many, 2, height=10, width=62),
        fingerprint(many, 2, mode=0),
        fingerprint(many, 2, mode=0, height=1),
        fingerprint(many, 2, mode=0, data=black[1:]),
    ]
    assert len(set(variants)) == len(variants)


def test_threads_forks_and_pickles_read_the_same(beton: Path) -> None:
    source = BetonSource([beton])
    expected = [source.read(i) for i in range(12)] * 20
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.read, list(range(12)) * 20)) == expected
    child = os.fork()
    if not child:
        os._exit(0 if [source.read(i) for i in range(12)] * 20 == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_descriptors_are_closed(beton: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        source = BetonSource([beton, beton])
        assert len(os.listdir("/proc/self/fd")) == before + 2
        del source
        assert len(os.listdir("/proc/self/fd")) == before


def test_file_cut_while_open_is_an_error_that_says_where(beton: Path) -> None:
    source = BetonSource([beton])
    os.truncate(beton, PAGE + 100)
    with pytest.raises(OSError, match=rf"{beton} sample 11: read 0 of \d+ bytes: the file was cut"):
        source.read(11)


METADATA = HEADER.itemsize + 2 * FIELD.itemsize  # of a file with image and label: 24 bytes a record
FIRST_POINTER = METADATA + 5
TABLE = 2 * PAGE  # of the fixture's file: header in one page, data in one


def poke(layout: str, offset: int, *values: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(layout, data, offset, *values)


def cut(length: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        del data[length:]

    return change


DAMAGE: list[tuple[str, Callable[[bytearray], None], str]] = [
    (
        "version 1",
        poke("<H", 0, 1),
        r"a\.beton is not a \.beton of version 2, but states version 1: write it with ffcv",
    ),
    ("version 3", poke("<H", 0, 3), "states version 3"),
    ("no samples", poke("<Q", 8, 0), "has no samples"),
    ("no table", poke("<Q", 16, 0), "has no allocation table: its writer was stopped before the end"),
    ("empty table", cut(TABLE), "has no allocation table"),
    ("table in header", poke("<Q", 16, METADATA + 12 * 24 - 1), "its allocation table is inside the header"),
    ("more samples than file", poke("<Q", 8, 1 << 62), "its allocation table is inside the header"),
    ("more samples than written", poke("<Q", 8, 13), "sample 12: its image has no pixels"),
    ("cut in the header", cut(20), r"cut short inside the header \(20 bytes\)"),
    ("cut in the fields", cut(METADATA - 1), r"cut short inside the header \(2,105 bytes\)"),
    (
        "cut in the metadata",
        cut(METADATA + 50),
        "is cut short: it has 2,156 bytes, its .* begins at 4,194,304",
    ),
    ("cut in the data", cut(PAGE + 5000), "is cut short: it has 2,102,152 bytes"),
    ("cut in the table", cut(TABLE + 12 * 24 - 1), "is cut short: .* rows of 24: copy the file again"),
    ("a row cut", cut(TABLE + 11 * 24), "sample 11: its image has no bytes in the allocation table"),
    ("custom field", poke("<B", 24, 255), "field 'field0' has the custom type 255"),
    ("unknown field", poke("<B", 24 + FIELD.itemsize, 7), "field 'field1' has the custom type 7"),
    ("no image field", poke("<B", 24, 5), r"no RGB image field, only 'field0' \(json\), 'field1' \(int\)"),
    ("no fields", poke("<H", 2, 0), "no RGB image field, only none at all"),
    ("unknown mode", poke("<B", METADATA + 24, 2), r"a\.beton sample 1: its image is neither JPEG nor raw"),
    ("no width", poke("<H", METADATA + 1, 0), "sample 0: its image has no pixels"),
    ("no height", poke("<H", METADATA + 3, 0), "sample 0: its image has no pixels"),
    ("pointer 0", poke("<Q", FIRST_POINTER, 0), "sample 0: its image is inside the header"),
    (
        "pointer into metadata",
        poke("<Q", FIRST_POINTER + 24, METADATA + 12 * 24 - 1),
        "sample 1: its image is inside the header",
    ),
    ("pointer to the table", poke("<Q", FIRST_POINTER, TABLE), "sample 0: its image is beyond the data"),
    ("pointer beyond", poke("<Q", FIRST_POINTER, 1 << 63), "sample 0: its image is beyond the data"),
    ("pointer astray", poke("<Q", FIRST_POINTER, PAGE + 1), "sample 0: its image has no bytes"),
    ("size 0", poke("<Q", TABLE + 40, 0), "sample 1: its image has no bytes"),
    (
        "size beyond",
        poke("<Q", TABLE + 40, PAGE),
        "sample 1: its image extends into the next, or beyond the data",
    ),
    (
        "size 2^64 - 1",
        poke("<Q", TABLE + 40, (1 << 64) - 1),
        "sample 1: its image extends into the next, or beyond the data",
    ),
    (
        "size 2^63",
        poke("<Q", TABLE + 40, 1 << 63),
        "sample 1: its image extends into the next, or beyond the data",
    ),
    ("size into the next", poke("<Q", TABLE + 40, 5000), "sample 1: its image extends into the next"),
    (
        "raw too short",
        poke("<Q", TABLE + 16, 1859),
        "sample 0: its raw image does not have 3 x height x width bytes",
    ),
    (
        "raw too narrow",
        poke("<H", METADATA + 1, 30),
        "sample 0: its raw image does not have 3 x height x width",
    ),
    (
        "raw too wide",
        poke("<H", METADATA + 1, 32),
        "sample 0: its raw image does not have 3 x height x width",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damage_is_refused_by_name(damage: Callable[[bytearray], None], message: str, beton: Path) -> None:
    data = bytearray(beton.read_bytes())
    assert len(data) == TABLE + 12 * 24
    damage(data)
    beton.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        BetonSource([beton])
    assert str(beton) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (poke("<Q", FIRST_POINTER + 7 * 24, 0), r"b\.beton sample 7: its image is inside the header"),
        (poke("<Q", TABLE + 7 * 24 + 16, 0), r"b\.beton sample 7: its image has no bytes"),
        (poke("<Q", TABLE + 7 * 24 + 16, 9000), r"b\.beton sample 7: its image extends into the next"),
        (poke("<H", METADATA + 6 * 24 + 1, 30), r"b\.beton sample 6: its raw image does not have"),
    ],
)
def test_the_damaged_one_of_several_files_is_named(
    damage: Callable[[bytearray], None], message: str, beton: Path, tmp_path: Path
) -> None:
    damaged = bytearray(beton.read_bytes())
    damage(damaged)
    (tmp_path / "b.beton").write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        BetonSource([beton, tmp_path / "b.beton"])


def test_any_cut_is_refused(beton: Path) -> None:
    """Never accepted, never a crash: at every boundary and at a few hundred places between."""
    size = beton.stat().st_size
    places = {0, 1, 23, 24, METADATA, PAGE, TABLE, *np.linspace(0, size - 1, 300).astype(int).tolist()}
    for length in sorted(places | set(range(TABLE, size)), reverse=True):
        os.truncate(beton, length)
        with pytest.raises(ValueError, match=r"a\.beton"):
            BetonSource([beton])


def test_samples_may_share_an_image(beton: Path) -> None:
    data = bytearray(beton.read_bytes())
    data[METADATA + 48 : METADATA + 48 + 13] = data[METADATA : METADATA + 13]
    beton.write_bytes(data)
    source = BetonSource([beton])
    assert source.read(2) == source.read(0) != source.read(4)


def write_million(path: Path, count: int) -> None:
    """Header, metadata and table of `count` images of 1,000 bytes in a file of holes; pointers in random order."""
    record = np.dtype([("f0", IMAGE), ("f1", "<i8"), ("f2", TYPES[JSON_TYPE][1])], align=True)
    metadata = np.zeros(count, record)
    fields = np.zeros(3, FIELD)
    fields["type"] = 2, INT_TYPE, JSON_TYPE
    start = -(-(HEADER.itemsize + fields.nbytes + metadata.nbytes) // PAGE) * PAGE
    pointers = start + 1000 * np.random.default_rng(0).permutation(count)
    metadata["f0"]["width"], metadata["f0"]["height"], metadata["f0"]["pointer"] = 500, 375, pointers
    metadata["f1"] = np.arange(count) % 1000
    table = np.zeros(2 * count, ALLOCATION)
    table["pointer"], table["size"] = np.repeat(pointers, 2), np.tile([980, 20], count)
    table["pointer"][1::2] += 980
    with path.open("wb") as file:
        file.write(np.array((2, 3, PAGE, count, start + 1000 * count), HEADER))
        file.write(fields)
        file.write(metadata)
        file.truncate(start + 1000 * count)
        file.seek(start + 1000 * count)
        file.write(table)


@pytest.mark.slow
def test_a_million_samples_open_in_64_mb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("byolt.pipelines.formats.beton.WHOLE", 0)  # to read all images takes seconds
    write_million(tmp_path / "a.beton", 1_000_000)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        source = BetonSource([tmp_path / "a.beton"])
        seconds.append(time.perf_counter() - start)
    assert len(source) == 1_000_000
    assert (source.labels[123_456], source.heights[0], source.widths[999_999]) == (456, 375, 500)
    assert len(source.read(777_777)) == 980
    tracemalloc.start()
    again = BetonSource([tmp_path / "a.beton"])
    held, peak = (bytes_ / 1e6 for bytes_ in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    with capsys.disabled():
        print(f"\n1,000,000 samples: open in {min(seconds):.2f} s, {held:.0f} MB held, {peak:.0f} MB at most")
    assert again.fingerprint == source.fingerprint
    assert peak < 64


def loader_config(backend: str) -> Config:
    return Config.model_validate(
        {
            "run": {"out": "unused", "seed": 5},
            "data": {"path": "unused", "backend": backend, "threads": 1},
            "augment": {
                "size": 16,
                "view1": {"blur": 1.0, "solarize": 0.0},
                "view2": {"blur": 0.1, "solarize": 0.2},
            },
            "model": {},
            "optimizer": {"base_lr": 0.1, "weight_decay": 0, "base_tau": 0.9, "warmup_epochs": 0},
            "train": {"epochs": 1, "batch_size": 8},
        }
    )


def take(source: Source, backend: str, first: int, last: int) -> list[Batch]:
    config = loader_config(backend)
    made, _ = make_backend(config, CPU, torch.float32)
    with Loader(config, source, made, first_step=first) as loader:
        batches = iter(loader)
        return [next(batches)[0] for _ in range(first, last)]


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_folder_and_beton_of_the_same_images_give_the_same_batches(backend: str, tmp_path: Path) -> None:
    """The folder holds JPEGs and, for what the .beton holds raw, PNGs; also in two files; also from step 4 on."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    samples = sorted(mixed(24), key=lambda sample: sample.label)
    for i, sample in enumerate(samples):
        path = tmp_path / f"images/{sample.label}/{i:02d}.{'png' if sample.mode else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if sample.mode:
            Image.frombytes("RGB", (sample.width, sample.height), sample.data).save(path)
        else:
            path.write_bytes(sample.data)
    first = write_beton(tmp_path / "a.beton", samples[:7])
    second = write_beton(tmp_path / "b.beton", samples[7:], types=(5, 1, 2))
    whole = write_beton(tmp_path / "whole.beton", samples)
    expected = take(open_source(tmp_path / "images"), backend, 0, 6)
    runs = (
        (take(open_source(whole), backend, 0, 6), expected),
        (take(open_source(f"{first},{second}"), backend, 0, 6), expected),
        (take(open_source(whole), backend, 4, 6), expected[4:]),
    )
    assert not torch.equal(expected[0].view1, expected[3].view1)
    for ours, theirs in runs:
        for a, b in zip(ours, theirs, strict=True):
            for name in Batch._fields:
                assert torch.equal(getattr(a, name), getattr(b, name)), name

"""Fuzzes the readers of tars, .beton files and manifests: a damaged file is read or refused, and nothing else happens.

    python tests/fuzz.py --inputs 1000000 [--seed 0] [--json RESULT]

Whole files are damaged at random: bits, bytes, numbers at the edges of their range, cuts, copies of parts. Half of the
time the checksums over the damaged part are corrected, so that the code behind them is reached. A reader must raise
ValueError or OSError, or read every sample; anything else stops the run and leaves the input in `fuzz-failure`.
"""

import argparse
import hashlib
import io
import json
import random
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from byolt.files.atomic import sha256_of
from byolt.pipelines.formats.beton import ALLOCATION, FIELD, HEADER, IMAGE, BetonSource
from byolt.pipelines.formats.index import index_tar
from byolt.pipelines.manifest import MANIFEST, SAMPLES, Manifest, Shard
from byolt.pipelines.sources import TarSource

EDGES = [0, 1, 2, 7, 127, 128, 255, 511, 512, 513, 2**15, 2**16 - 1]
EDGES += [2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
SLOW = 5.0  # seconds for one input: a hang on any machine


def jpeg(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, height, width)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_of(members: list[tuple[str, bytes]], form: int, *links: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        for link in links:
            out.addfile(link)
    return buffer.getvalue()


def damage(rng: random.Random, data: bytes) -> bytes:
    """One to four random faults."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            length = rng.choice((1, 2, 4, 8))
            out[at : at + length] = (rng.choice(EDGES) % 256**length).to_bytes(
                length, rng.choice(("little", "big"))
            )
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.choice((1, 8, 512, 1024))]
        elif kind == 5:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.choice((1, 8, 512, 1024))]
        else:
            length = rng.randrange(1, 24)
            out[at : at + length] = rng.choice((b"\0", b"\xff", b"7", b" ", b"9")) * length
    return bytes(out)


class Tars:
    """`index_tar` on ustar, GNU and PAX tars."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "a.tar"
        self._seeds = []
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            names = ["0", "a/1", "b/2" if form == tarfile.USTAR_FORMAT else "n" * 120 + "/2"]
            members = []
            for i, name in enumerate(names):
                members += [(f"{name}.jpg", jpeg(i + 1, 9)), (f"{name}.cls", b"%d" % i)]
            link = tarfile.TarInfo("l.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
            self._seeds.append(tar_of(members, form, link)[: -8 * 512])

    def __call__(self, rng: random.Random) -> None:
        data = bytearray(damage(rng, rng.choice(self._seeds)))
        if rng.random() < 0.5:
            for at in range(0, len(data) - 511, 512):  # every block that was a header is one again
                if data[at + 257 : at + 262] == b"ustar":
                    data[at + 148 : at + 156] = b" " * 8
                    data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 512]) & 0o777777)
        self._path.write_bytes(data)
        index_tar(self._path)

    def inputs(self) -> list[Path]:
        return [self._path]


class Betons:
    """`BetonSource` on files with JPEG and raw images."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "a.beton"
        images = [jpeg(5, 6), bytes(4 * 3 * 3), jpeg(7, 8)]
        record = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)
        start = HEADER.itemsize + 2 * FIELD.itemsize
        data = b"".join(images)
        first = start + 3 * record.itemsize
        pointers = first + np.cumsum([0, *map(len, images)])[:3]
        records, table = np.zeros(3, record), np.zeros(3, ALLOCATION)
        for i, (height, width) in enumerate(((5, 6), (4, 3), (7, 8))):
            records[i] = ((i == 1, width, height, pointers[i]), i)
            table[i] = (i, pointers[i], len(images[i]))
        fields = np.zeros(2, FIELD)
        fields["type"], fields["name"] = [2, 1], [b"image", b"label"]
        header = np.zeros(1, HEADER)
        header[0] = (2, 2, 4096, 3, first + len(data))
        self._seed = header.tobytes() + fields.tobytes() + records.tobytes() + data + table.tobytes()
        self._path.write_bytes(self._seed)
        assert len(BetonSource([self._path]).read(2)) == len(images[2])
        # The names and arguments of the fields are most of the file and mean nothing: damage rarely hits them.
        self._start = start

    def __call__(self, rng: random.Random) -> None:
        seed, start = self._seed, self._start
        if rng.random() < 0.7:
            data = seed[:start] + damage(rng, seed[start:])
        elif rng.random() < 0.5:
            data = damage(rng, seed[: HEADER.itemsize]) + seed[HEADER.itemsize :]
        else:
            data = damage(rng, seed)
        self._path.write_bytes(data)
        source = BetonSource([self._path])
        for i in range(len(source)):
            source.read(i)

    def inputs(self) -> list[Path]:
        return [self._path]


class Manifests:
    """`TarSource` on a folder whose manifest.json or samples.npy is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / "a.tar"
        path.write_bytes(tar_of([(f"{i}.jpg", jpeg(i + 1, 9)) for i in range(4)], tarfile.PAX_FORMAT))
        shard = Shard("a.tar", path.stat().st_size, sha256_of(path), 4)
        Manifest([shard], index_tar(path).records, ["x", "y"]).save(folder)
        content = json.loads((folder / MANIFEST).read_text())
        del content["sha256"]  # which would refuse every other damage first
        self._manifest, self._samples = json.dumps(content).encode(), (folder / SAMPLES).read_bytes()
        self._body = len(self._samples) - 4 * 32

    def __call__(self, rng: random.Random) -> None:
        manifest, samples = self._manifest, self._samples
        kind = rng.random()
        if kind < 0.3:
            manifest = damage(rng, manifest)
        elif kind < 0.6:
            content = json.loads(manifest)
            _edit(rng, content)
            manifest = json.dumps(content).encode()
        elif kind < 0.9:
            samples = samples[: self._body] + damage(rng, samples[self._body :])
        else:
            samples = damage(rng, samples)
        if kind >= 0.6 and rng.random() < 0.7:
            content = json.loads(manifest)
            content["samples_sha256"] = hashlib.sha256(samples[self._body :]).hexdigest()
            manifest = json.dumps(content).encode()
        (self._folder / MANIFEST).write_bytes(manifest)
        # A new file: the old one may still be mapped.
        (self._folder / "new").write_bytes(samples)
        (self._folder / "new").replace(self._folder / SAMPLES)
        source = TarSource(self._folder)
        for i in range(len(source)):
            source.read(i)

    def inputs(self) -> list[Path]:
        return [self._folder / MANIFEST, self._folder / SAMPLES]


def _edit(rng: random.Random, value: object) -> None:
    """Puts something odd somewhere into nested JSON."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))  # type: ignore[arg-type]
    if not keys:
        return
    key = rng.choice(keys)
    inner = value[key]  # type: ignore[index]
    if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
        _edit(rng, inner)
    elif rng.random() < 0.2:
        del value[key]  # type: ignore[attr-defined]
    else:
        odd = [None, True, -1, 0.5, float("nan"), "", "../x", "\0", "\ud800", [], {}, [[]], *EDGES, 10**30]
        value[key] = rng.choice(odd)  # type: ignore[index]


TARGETS: dict[str, tuple[Callable[[Path], Tars | Betons | Manifests], float]] = {
    "tar": (Tars, 0.5),
    "beton": (Betons, 0.25),
    "manifest": (Manifests, 0.25),
}  # and their shares of the inputs


def run(name: str, inputs: int, seed: int) -> Counter[str]:
    """Feeds one reader; counts the outcomes: "read", or the class of the error.

    Raises:
        AssertionError: the reader raised another error, or took seconds; names the error and the input's copy.
    """
    outcomes: Counter[str] = Counter()
    rng = random.Random(f"{name} {seed}")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        target = TARGETS[name][0](Path(folder))
        for number in range(inputs):
            start = time.perf_counter()
            failure = ""
            try:
                target(rng)
                outcomes["read"] += 1
            except (ValueError, OSError) as error:
                outcomes[type(error).__name__] += 1
            except BaseException:
                failure = traceback.format_exc()
            if time.perf_counter() - start > SLOW:
                failure = f"took {time.perf_counter() - start:.1f} s"
            if failure:
                kept = Path("fuzz-failure")
                kept.mkdir(exist_ok=True)
                for path in target.inputs():
                    (kept / path.name).write_bytes(path.read_bytes())
                raise AssertionError(
                    f"{name}, seed {seed}, input {number}, kept in {kept.resolve()}: {failure}"
                )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the counts there")
    args = parser.parse_args()
    result: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "inputs": args.inputs,
        "seed": args.seed,
    }
    start = time.perf_counter()
    for name, (_, share) in TARGETS.items():
        result[name] = dict(run(name, round(args.inputs * share), args.seed))
        print(name, result[name], flush=True)
    result["seconds"] = round(time.perf_counter() - start)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

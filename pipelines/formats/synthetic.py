"""Synthetic images as a source: throughput without a disk."""

import hashlib
import io

import numpy as np
from PIL import Image

from byolt.pipelines.formats.encoded import MAX_SIDE

_POOL = 64  # distinct images
_CLASSES = 10


class SyntheticSource:
    """A small pool of JPEGs of smooth noise, repeated; label = i mod 10; see `sources.Source`."""

    def __init__(self, num_samples: int, height: int, width: int) -> None:
        for name, value in (("NUM", num_samples), ("H", height), ("W", width)):
            if not 0 < value < 1 << 31:
                raise ValueError(f"synthetic:NUM:HxW: {name}={value} must be 1 to {(1 << 31) - 1:,}")
        if max(height, width) > MAX_SIDE:
            raise ValueError(
                f"synthetic:NUM:HxW: {height}x{width} must be at most {MAX_SIDE}x{MAX_SIDE}, the largest JPEG"
            )
        self._length = num_samples
        self._pool = [_noise_jpeg(seed, height, width) for seed in range(min(_POOL, num_samples))]
        self.labels = np.arange(num_samples, dtype=np.int64) % _CLASSES
        self.heights = np.full(num_samples, height, np.int64)
        self.widths = np.full(num_samples, width, np.int64)
        self.classes: list[str] | None = [f"class{label}" for label in range(_CLASSES)]
        identity = f"synthetic:{num_samples}:{height}x{width}:{_CLASSES}"
        self.checksums, self.proven = None, True  # nothing can change them
        self.former_fingerprints: list[str] = []
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return self._length

    def read(self, i: int) -> bytes:
        return self._pool[range(self._length)[i] % len(self._pool)]

    def describe(self, i: int) -> str:
        return f"synthetic image {i % len(self._pool)} (sample {i})"


def _noise_jpeg(seed: int, height: int, width: int) -> bytes:
    """A JPEG of noise, enlarged fourfold: about 1.5 bits a pixel at quality 90, like photographs."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, ((height + 3) // 4, (width + 3) // 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

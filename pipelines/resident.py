"""A back end for small images, which decodes the data set once at the start and keeps the pixels in memory.

50,000 images of 32 px are 154 MB. A GPU that makes the views keeps the pixels, and Python touches no single sample.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from byolt.configs.schema import AugmentConfig, DataConfig
from byolt.files import stop
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.encoded import MAX_PIXELS
from byolt.pipelines.kernels.inputs import Pixels
from byolt.pipelines.kernels.memory import Memory
from byolt.pipelines.sources import Source, read_sound
from byolt.pipelines.views import ViewParams

SMALL = 96  # pixels; larger images are better cropped while they are decoded, and rarely fit
LIMIT = 4 << 30  # bytes
_RESIDENTS: WeakKeyDictionary[Source, "Resident"] = WeakKeyDictionary()


def is_wanted(data: DataConfig, source: Source) -> bool:
    """Whether data.resident asks for it; auto: no side is longer than SMALL, and the pixels fit into LIMIT."""
    if data.resident != "auto":
        return data.resident == "always"
    longest = max(source.heights.max(), source.widths.max())
    return bool(longest <= SMALL and 3 * (source.heights * source.widths).sum() <= LIMIT)


def useful_threads(pixels: float) -> int:
    """How many threads decode images of so many pixels each faster than fewer do; 1 or more.

    Each image holds Python's interpreter lock for about 14 us, whatever its size. `Resident` of JPEG shards with two
    threads against one, timed on two idle cores: 32 px 0.8 times as fast, 64 px 1.2, 96 px 1.55, 160 px 1.6.
    """
    return max(1, int(pixels / 2048))


class Resident:
    """Makes both views of samples of a data set whose decoded pixels are in memory.

    Attributes:
        broken: Reason by sample id, of images that do not decode or differ in size from the index.
    """

    def __init__(
        self,
        source: Source,
        augment: AugmentConfig,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Decodes the whole data set; images of more than `max_pixels` are broken.

        The device keeps the pixels and makes the views (float32, float16 or bfloat16); the threads decode now and make
        views later.

        Raises:
            ValueError: No image decodes, or the pixels do not fit into memory.
        """
        self._augment, self._device, self._dtype = augment, device, dtype
        self._pool = ThreadPoolExecutor(threads)
        self._memory = Memory()
        self._max_pixels = max_pixels
        self.broken: dict[int, str] = {}
        heights, widths = source.heights.astype(np.int64), source.widths.astype(np.int64)
        sizes = heights * widths * 3
        self._starts = np.cumsum(sizes) - sizes
        self._pixels = self._allocate(int(sizes.sum()), torch.device("cpu"))
        self._boxes = np.stack([np.zeros_like(sizes), np.zeros_like(sizes), heights, widths], 1)
        parts = [range(i, min(i + 256, len(source))) for i in range(0, len(source), 256)]
        with ThreadPoolExecutor(min(threads, useful_threads(sizes.sum() / 3 / max(1, len(sizes))))) as pool:
            for _ in pool.map(lambda part: self._load(source, part), parts):
                pass
        sound = np.setdiff1d(np.arange(len(source)), list(self.broken))
        if not len(sound):
            raise ValueError(f"none of the {len(source)} images decodes; the first: {self.broken[0]}")
        self._instead = sound[np.searchsorted(sound, np.arange(len(source))) % len(sound)]
        if device.type == "cuda":
            self._pixels = self._allocate(len(self._pixels), device).copy_(self._pixels)
        _RESIDENTS[source] = self

    @staticmethod
    def of(source: Source) -> "Resident | None":
        """The decoded images of a data set if they are in memory."""
        return _RESIDENTS.get(source)

    def _allocate(self, size: int, device: torch.device) -> Tensor:
        try:
            return torch.zeros(size, dtype=torch.uint8, device=device)
        except RuntimeError:  # includes torch.OutOfMemoryError; the CPU raises no narrower one
            gigabytes = f"{size / 1e9:.1f} GB of decoded images do not fit into the memory of {device}"
            raise ValueError(f"{gigabytes}: set data.resident=never") from None

    def _load(self, source: Source, numbers: Iterable[int]) -> None:
        pixels = self._pixels.numpy()
        for number in numbers:
            stop.check()
            try:
                image = decode(read_sound(source, number, self._max_pixels), not source.proven).numpy()
            except ValueError as error:
                self.broken[number] = str(error)
            else:
                start = self._starts[number]
                pixels[start : start + image.size] = image.reshape(-1)

    def decoded(self, ids: Sequence[int]) -> list[Tensor | None]:
        """The images (H, W, 3) uint8 of samples, views of the kept pixels; None for a broken one."""
        images: list[Tensor | None] = []
        for number in ids:
            shape, start = (*self._boxes[number, 2:].tolist(), 3), self._starts[number]
            pixels = self._pixels[start : start + math.prod(shape)].view(shape)
            images.append(None if number in self.broken else pixels)
        return images

    def find(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The ids (N,) with each broken image replaced by the next valid one, twice: an id also finds the pixels."""
        sound = self._instead[ids]
        return sound, sound

    def __call__(
        self, ids: npt.NDArray[np.int64], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]:
        """Makes both views of the samples `ids` (N,); otherwise as `backends.Backend`."""
        make = self._on_gpu if self._device.type == "cuda" else self._on_cpu
        pixels = Pixels(self._pixels.data_ptr() + self._starts[ids], self._boxes[ids])
        shape = len(ids), self._augment.size, self._augment.size, 3
        first, second = make(pixels, (params1, params2), shape)
        return first.permute(0, 3, 1, 2), second.permute(0, 3, 1, 2)

    def _on_gpu(self, pixels: Pixels, params: Sequence[ViewParams], shape: tuple[int, ...]) -> list[Tensor]:
        from byolt.pipelines.kernels.gpu import make_views  # triton comes with torch for CUDA only

        views = [torch.empty(shape, dtype=self._dtype, device=self._device) for _ in params]
        make_views(pixels, params, self._augment, views)
        return views

    def _on_cpu(self, pixels: Pixels, params: Sequence[ViewParams], shape: tuple[int, ...]) -> list[Tensor]:
        from byolt.pipelines.kernels.cpu import make_views

        views = [self._memory.take(shape) for _ in params]
        make_views(pixels, params, self._augment, views, self._pool)
        return [torch.from_numpy(view).to(self._dtype) for view in views]

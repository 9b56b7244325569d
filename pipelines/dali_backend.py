"""DALI decodes; compiled kernels make the views, on the CPU and on the GPU, from the same numbers.

    CPU   encoded ─► decode what the two windows cover ─► pipelines/kernels/cpu.py (numba) ─► view 1, view 2
    GPU   encoded ─► decode (nvJPEG where it can) ─► pipelines/kernels/gpu.py ─► view 1, view 2

An image is decoded once. Every number comes in from outside (`pipelines.views` draws them): nothing here is random.

On the CPU the pixels are those of pipelines/torch_backend.py to 1e-5 (tests/test_backends.py). DALI decodes in its
threads and hands over addresses, the kernels run in a pool of as many threads without the GIL. They are not operators
in the graph (DALI's numba_function), because those are compiled anew, for a second or more, whenever a graph is built.

On the GPU the kernels compute the same: tests/test_triton_kernels.py holds them to the same definition in Triton's
interpreter. What differs is how nvJPEG rounds (not yet measured; it is told to upsample chroma as libjpeg-turbo does).
What nvJPEG does not decode (PNG, say) DALI decodes on the CPU and uploads; no other pixel visits the host, and the host
does not wait for the views. This path **has not yet run on a GPU**: its graph is built and checked, its kernels are
interpreted and compiled in the tests.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from byolt.configs.schema import AugmentConfig
from byolt.pipelines.formats.decode import UndecodableError, decode
from byolt.pipelines.formats.encoded import inspect, ppm_pixels
from byolt.pipelines.kernels.memory import Memory
from byolt.pipelines.kernels.recipe import Pixels
from byolt.pipelines.views import ViewParams

TOGETHER = 64  # images that are decoded before their views are made: what fits in the cache is not read twice


class DaliBackend:
    """Decodes and augments one batch with DALI; same interface and same parameters as TorchBackend."""

    def __init__(
        self, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        """
        Args:
            augment: profile and size of the views, mean and std.
            device: where the views are made and delivered, "cpu" or "cuda"; there nvJPEG decodes.
            dtype: float32, float16 or bfloat16. The CPU's kernels make float32, which is then converted.
            threads: CPU threads that decode and, on the CPU, augment.
        """
        on_gpu = device.type == "cuda"
        if on_gpu:
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            self._decoding = torch.cuda.Stream(device)
        self._augment, self._device, self._dtype, self._threads = augment, device, dtype, threads
        self._pipeline: Pipeline | None = None
        self._batch_size = 0
        # Makes views on the CPU; None: the caller's thread does.
        self.pool = ThreadPoolExecutor(threads) if threads > 1 and not on_gpu else None
        self._decoded: Any = None
        self._raw: list[npt.NDArray[np.uint8]] = []
        self._memory = Memory()
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()

    def __call__(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]:
        """Makes both views of every image.

        Args:
            encoded: N encoded images that passed `pipelines.encoded.inspect`: on empty samples and such as are no
                image DALI's CPU decoder can end the process (SIGSEGV) instead of raising.
            params1: N drawn views.
            params2: N drawn views.

        Returns:
            Two (N, 3, size, size) tensors, normalised, in channels_last memory, on the device; on a GPU they are there
            when the current stream has come so far.

        Raises:
            UndecodableError: names the images of the batch that do not decode, on the CPU also those that are smaller
                than a window says. The backend stays usable.
            RuntimeError: DALI fails on every one of several images, whose bytes are sound.
            ValueError: on the GPU, or of raw pixels: a window reaches beyond its image.
        """
        make = self._on_gpu if self._device.type == "cuda" else self._on_cpu
        try:
            views = make(encoded, params1, params2)
        except RuntimeError:
            self._pipeline = None  # a pipeline that raised cannot be used again
            reasons = _undecodable(encoded) or self._refused_alone(encoded, params1, params2)
            if not reasons or len(reasons) == len(encoded) > 1:
                raise  # whatever is wrong, it is not one of the images
            raise UndecodableError(reasons) from None
        first, second = (view.to(self._dtype).permute(0, 3, 1, 2) for view in views)
        return first, second

    def _refused_alone(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> dict[int, str]:
        """The images that DALI does not decode though PIL does (a PNG with a wrong checksum, say), one by one."""
        make = self._on_gpu if self._device.type == "cuda" else self._on_cpu
        reasons = {}
        for i in range(len(encoded)):
            row = slice(i, i + 1)
            try:
                make(encoded[row], params1[row], params2[row])
            except RuntimeError as error:
                self._pipeline = None
                reasons[i] = f"DALI does not decode it: {' '.join(str(error).split())[:300]}"
        return reasons

    def _on_gpu(self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams) -> list[Tensor]:
        """Three streams in turn: DALI's own decode, `_decoding` waits for them, the current one for that.

        DALI binds the outputs of `run` to the stream it is given, which is one of our own because the current one may
        be the default stream, whose handle is null. When DALI takes back the memory of outputs that nobody refers to
        any more is its own affair, so they are referred to until an event says that the views' kernels have run.
        """
        from byolt.pipelines.kernels.gpu import make_views  # triton comes with torch for CUDA only

        while self._in_use and self._in_use[0][0].query():
            self._in_use.popleft()
        with torch.cuda.device(self._device):
            (decoded,) = self._run(encoded, {}, self._decoding)
            current = torch.cuda.current_stream()
            current.wait_stream(self._decoding)
            sizes = np.array([shape[:2] for shape in decoded.shape()], np.int64)
            addresses = np.array([decoded[i].data_ptr() for i in range(len(sizes))], np.int64)
            pixels = Pixels(addresses, np.concatenate([np.zeros_like(sizes), sizes], 1))
            shape = len(encoded), self._augment.size, self._augment.size, 3
            views = [torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(2)]
            make_views(pixels, (params1, params2), self._augment, views)
            self._in_use.append((current.record_event(), decoded))
        return views

    def _on_cpu(self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams) -> list[Tensor]:
        from byolt.pipelines.kernels.cpu import make_views  # the GPU can do without numba

        shape = len(encoded), self._augment.size, self._augment.size, 3
        views = [self._memory.take(shape) for _ in range(2)]
        for start in range(0, len(encoded), TOGETHER):
            rows = slice(start, start + TOGETHER)
            params = params1[rows], params2[rows]
            pixels = self.decode(encoded[rows], *params)
            make_views(pixels, params, self._augment, [view[rows] for view in views], self.pool)
        return [torch.from_numpy(view) for view in views]

    def decode(self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams) -> Pixels:
        """On the CPU: what the windows cover of at most TOGETHER images, in DALI's memory until the next call.

        Raw pixels are used where they lie: DALI would copy them twice, 0.5 ms an image of 0.6 MB.
        """
        box = _union(params1, params2)
        address = np.empty(len(box), np.int64)
        is_raw = np.array([data[:2] == b"P6" for data in encoded])
        compressed, raw = np.nonzero(~is_raw)[0].tolist(), np.nonzero(is_raw)[0].tolist()
        if compressed:
            start, shape = (box[compressed, side].astype(np.int32) for side in (slice(0, 2), slice(2, 4)))
            inputs = {"start": start, "shape": shape}
            (self._decoded,) = self._run([encoded[i] for i in compressed], inputs)
            address[compressed] = [self._decoded[k].data_ptr() for k in range(len(compressed))]
        self._raw = []  # keeps the bytes where they are
        for i in raw:
            header = inspect(encoded[i])
            self._raw.append(np.frombuffer(ppm_pixels(encoded[i], header), np.uint8))
            box[i] = 0, 0, header.height, header.width
            address[i] = self._raw[-1].ctypes.data
        return Pixels(address, box)

    def _run(
        self, encoded: Sequence[bytes], inputs: dict[str, Any], stream: torch.cuda.Stream | None = None
    ) -> Any:
        if self._pipeline is None or len(encoded) > self._batch_size:
            self._batch_size = len(encoded)
            self._pipeline = build(self._device, self._batch_size, self._threads)
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        for name, value in inputs.items():
            self._pipeline.feed_input(name, value)
        return self._pipeline.run(stream)


def build(device: torch.device, batch_size: int, threads: int) -> Pipeline:
    """The compiled graph, which delivers decoded images: whole ones on the GPU, windows on the CPU.

    On the GPU output memory is freed when nothing refers to it (exec_dynamic); on the CPU it is used again by the next
    run, when the kernels are done with it.
    """
    on_gpu = device.type == "cuda"
    graph = _graph(
        on="gpu" if on_gpu else "cpu",
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        exec_dynamic=on_gpu,
        prefetch_queue_depth=1,  # the loader's own thread runs ahead of the training step
    )
    graph.build()
    return graph


@pipeline_def
def _graph(on: str) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # The manifest's sizes, and the windows drawn from them, ignore EXIF.
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if on == "gpu":
        # The JPEG engine rounds a little differently than the decoder in CUDA. By default it gets the first 65 % of a
        # batch, so that an image's pixels depended on its place; 1.0 gives it every image that it can decode. Which is
        # faster is not yet measured.
        options |= {"device": "mixed", "hw_decoder_load": 1.0, "jpeg_fancy_upsampling": True}
        return fn.decoders.image(encoded, **options)
    start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **options)


def _union(params1: ViewParams, params2: ViewParams) -> npt.NDArray[np.int64]:
    """(N, 4): top, left, height, width of the smallest part of each image that holds both its windows."""
    top, left = np.minimum(params1.top, params2.top), np.minimum(params1.left, params2.left)
    bottom = np.maximum(params1.top + params1.height, params2.top + params2.height)
    right = np.maximum(params1.left + params1.width, params2.left + params2.width)
    return np.stack([top, left, bottom - top, right - left], 1).astype(np.int64)


def _undecodable(encoded: Sequence[bytes]) -> dict[int, str]:
    reasons = {}
    for i, data in enumerate(encoded):
        try:
            decode(data)
        except ValueError as error:
            reasons[i] = str(error)
    return reasons

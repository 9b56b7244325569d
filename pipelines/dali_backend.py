"""DALI decodes; compiled kernels make the views, on the CPU and on the GPU, from the same numbers.

    CPU   encoded ─► decode what the two windows cover ─► pipelines/kernels/cpu.py (numba) ─► view 1, view 2
    GPU   encoded ─► decode (nvJPEG where it can) ─► pipelines/kernels/gpu.py ─► view 1, view 2

An image is decoded once for both views. Nothing here is random: `views` samples the parameters.

On the CPU DALI decodes in its threads and returns addresses, and the kernels run in a pool of as many threads, without
the GIL. They are not operators in the graph (DALI's numba_function), which would be compiled anew, for a second or
more, whenever a graph is built. The pixels equal those of torch_backend.py to 1e-5 (tests/test_dali_backend.py).

On the GPU DALI uploads the bytes, nvJPEG decodes them, and Triton kernels make the views; the host does not wait.
Images that nvJPEG does not decode, PNG for one, are decoded on the CPU and uploaded. On one H200 (2026-11-26) the gpu
tests pass, nvJPEG is within one level of libjpeg on 100 ImageNet JPEGs, and decoding runs at 8,291 images/s.
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
from byolt.pipelines.kernels.inputs import Pixels
from byolt.pipelines.kernels.memory import Memory
from byolt.pipelines.views import ViewParams

TOGETHER = 64  # images decoded before their views are made: few enough that the pixels stay in the cache


class DaliBackend:
    """Decodes and augments one batch; the interface is that of TorchBackend."""

    def __init__(
        self,
        augment: AugmentConfig,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        hw_decoder_load: float = 1.0,
    ) -> None:
        """The views are float32, float16 or bfloat16; the CPU's kernels make float32, which is then converted.

        `hw_decoder_load` is the fraction of a batch, 0 to 1, that the GPU's JPEG engine decodes. Below 1.0 an image's
        pixels may depend on its place in the batch, by at most one level.
        """
        on_gpu = device.type == "cuda"
        if on_gpu:
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            self._decoding = torch.cuda.Stream(device)
        self._augment, self._device, self._dtype, self._threads = augment, device, dtype, threads
        self._hw_decoder_load = hw_decoder_load
        self._pipeline: Pipeline | None = None
        self._batch_size = 0
        self._make = self._on_gpu if on_gpu else self._on_cpu
        # runs the CPU's kernels
        self.pool = ThreadPoolExecutor(threads) if threads > 1 and not on_gpu else None
        self._decoded: Any = None
        self._raw: list[npt.NDArray[np.uint8]] = []
        self._memory = Memory()
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()

    def __call__(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]:
        """See `backends.Backend`.

        Raises:
            UndecodableError: on the CPU also for images that a window exceeds.
            RuntimeError: DALI fails on every one of several images, although PIL decodes them.
            ValueError: on the GPU, or of raw pixels: a window exceeds its image.
        """
        try:
            views = self._make(encoded, params1, params2)
        except RuntimeError:
            self._pipeline = None  # a pipeline that raised cannot be used again
            reasons = _undecodable(encoded) or self._refused_alone(encoded, params1, params2)
            if not reasons or len(reasons) == len(encoded) > 1:
                raise  # the cause is not one of the images
            raise UndecodableError(reasons) from None
        first, second = (view.to(self._dtype).permute(0, 3, 1, 2) for view in views)
        return first, second

    def _refused_alone(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> dict[int, str]:
        """The images that PIL decodes but DALI does not (a PNG with a wrong checksum), found one by one."""
        reasons = {}
        for i in range(len(encoded)):
            row = slice(i, i + 1)
            try:
                self._make(encoded[row], params1[row], params2[row])
            except RuntimeError as error:
                self._pipeline = None
                reasons[i] = f"DALI does not decode it: {' '.join(str(error).split())[:300]}"
        return reasons

    def _on_gpu(self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams) -> list[Tensor]:
        """Decodes on DALI's streams, for which `_decoding` waits, for which the current stream waits.

        DALI binds the outputs of `run` to a given stream. That is not the current one, which may be the default stream,
        whose handle is null. DALI may reuse the memory of unreferenced outputs at any time, so they are referenced
        until an event shows that the views' kernels have run.
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
        from byolt.pipelines.kernels.cpu import make_views  # not needed on a GPU

        shape = len(encoded), self._augment.size, self._augment.size, 3
        views = [self._memory.take(shape) for _ in range(2)]
        for start in range(0, len(encoded), TOGETHER):
            rows = slice(start, start + TOGETHER)
            params = params1[rows], params2[rows]
            pixels = self.decode(encoded[rows], *params)
            make_views(pixels, params, self._augment, [view[rows] for view in views], self.pool)
        return [torch.from_numpy(view) for view in views]

    def decode(self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams) -> Pixels:
        """Decodes the part of each image that the windows cover, on the CPU; valid until the next call.

        Raw pixels are used in place: DALI would copy them twice, 0.5 ms an image of 0.6 MB.
        """
        box = _union(params1, params2)
        address = np.empty(len(box), np.int64)
        raw = [i for i, data in enumerate(encoded) if data[:2] == b"P6"]
        compressed = np.setdiff1d(np.arange(len(encoded)), raw).tolist()
        if compressed:
            part = box[compressed].astype(np.int32)
            inputs = {"start": part[:, :2].copy(), "shape": part[:, 2:].copy()}
            (self._decoded,) = self._run([encoded[i] for i in compressed], inputs)
            address[compressed] = [self._decoded[k].data_ptr() for k in range(len(compressed))]
        self._raw = []  # keeps the bytes alive
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
            self._pipeline = build(self._device, self._batch_size, self._threads, self._hw_decoder_load)
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        for name, value in inputs.items():
            self._pipeline.feed_input(name, value)
        return self._pipeline.run(stream)


def build(device: torch.device, batch_size: int, threads: int, hw_decoder_load: float) -> Pipeline:
    """The compiled graph, which decodes: whole images on the GPU, windows on the CPU.

    On the GPU an output's memory is freed when nothing refers to it (exec_dynamic); on the CPU the next run reuses it,
    after the kernels have finished.
    """
    on_gpu = device.type == "cuda"
    graph = _graph(
        on="gpu" if on_gpu else "cpu",
        hw_decoder_load=hw_decoder_load,
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        exec_dynamic=on_gpu,
        prefetch_queue_depth=1,  # the loader's own thread runs ahead of the training step
    )
    graph.build()
    return graph


@pipeline_def
def _graph(on: str, hw_decoder_load: float) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # The manifest's sizes, and so the windows, ignore EXIF.
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if on == "gpu":
        # The JPEG engine may round differently than the decoder in CUDA. It gets the first part of a batch, so pixels
        # may depend on an image's place unless it gets all that it can decode.
        options |= {"device": "mixed", "hw_decoder_load": hw_decoder_load, "jpeg_fancy_upsampling": True}
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

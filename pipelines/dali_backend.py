"""DALI decodes; on the CPU compiled kernels make the views, on the GPU DALI's own operators do.

    CPU   encoded ─► decode what the two windows cover ─► pipelines/kernels.py: the whole view, exact ─► view 1, view 2
    GPU   encoded ─► decode ─► window → bicubic → flip ─► colour ─► blur? ─► solarize? ─► normalise ─► view 1, view 2

An image is decoded once. Every number comes in from outside (`pipelines.views` draws them): nothing here is random.

On the CPU the pixels are those of pipelines/torch_backend.py to 1e-5 (tests/test_backends.py). DALI decodes in its
threads and hands over addresses, the kernels run in a pool of as many threads without the GIL. They are not operators
in the graph (DALI's numba_function), because those are compiled anew, for a second or more, whenever a graph is built.

On the GPU they are **not exact yet**. Colour is one affine map per image, out = A x + B mean(x) + c, composed in
`color_affine` from the drawn operations in their drawn order: exact for brightness, contrast and grey, while saturation
and hue become their linear counterparts about the luma, and clipping happens once at the end. The cubic resize repeats
the window's edge pixel instead of dropping taps, and the blur drops taps beyond 3 sigma.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from configs.schema import AugmentConfig
from pipelines.encoded import inspect
from pipelines.kernels import Pixels, make_views
from pipelines.memory import Memory
from pipelines.torch_backend import GRAY_WEIGHTS, UndecodableError, decode
from pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams

_DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}
TOGETHER = 64  # images that are decoded before their views are made: what fits in the cache is not read twice
_PER_VIEW = ("start", "end", "matrix", "mean_matrix", "offset", "blur", "sigma", "window", "solarize")


class DaliBackend:
    """Decodes and augments one batch with DALI; same interface and same parameters as TorchBackend."""

    def __init__(
        self, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        """
        Args:
            augment: size of the views, mean and std.
            device: "cuda": decoding by nvJPEG and all the rest on that GPU; "cpu": everything on the CPU.
            dtype: float32, float16 or bfloat16. The kernels make float32 and DALI has no bfloat16: what is missing
                is converted at the end, on the device.
            threads: CPU threads that decode and, on the CPU, augment.
        """
        self._augment, self._device, self._dtype, self._threads = augment, device, dtype, threads
        self._pipeline: Pipeline | None = None
        self._batch_size = 0
        self.pool = (
            ThreadPoolExecutor(threads) if threads > 1 else None
        )  # makes views; None: the caller's thread
        self._decoded: Any = None
        self._raw: list[npt.NDArray[np.uint8]] = []
        self._memory = Memory()

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
            Two (N, 3, size, size) tensors, normalised, in channels_last memory, on the device.

        Raises:
            UndecodableError: names the images of the batch that do not decode. The backend stays usable.
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
        inputs: dict[str, Any] = {}
        for view, params in (("1", params1), ("2", params2)):
            for name, value in _arguments(params, self._augment).items():
                inputs[name + view] = value
        return [torch.from_dlpack(output.as_tensor()) for output in self._run(encoded, inputs)]

    def _on_cpu(self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams) -> list[Tensor]:
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
        self._raw = [np.frombuffer(encoded[i], np.uint8) for i in raw]  # keeps the bytes where they are
        for i, data in zip(raw, self._raw, strict=True):
            header = inspect(encoded[i])
            box[i] = 0, 0, header.height, header.width
            address[i] = data[-3 * header.height * header.width :].ctypes.data
        return Pixels(address, box)

    def _run(self, encoded: Sequence[bytes], inputs: dict[str, Any]) -> Any:
        if self._pipeline is None or len(encoded) > self._batch_size:
            self._batch_size = len(encoded)
            self._pipeline = build(self._augment, self._device, self._dtype, self._batch_size, self._threads)
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        for name, value in inputs.items():
            self._pipeline.feed_input(name, value)
        return self._pipeline.run()


def build(
    augment: AugmentConfig, device: torch.device, dtype: torch.dtype, batch_size: int, threads: int
) -> Pipeline:
    """The compiled graph: views on the GPU, decoded windows on the CPU.

    On the GPU output memory is freed with the tensors that show it (exec_dynamic); on the CPU it is used again by the
    next run, when the kernels are done with it.
    """
    on_gpu = device.type == "cuda"
    graph = _graph(
        augment=augment,
        on="gpu" if on_gpu else "cpu",
        dtype=_DTYPES.get(dtype, types.FLOAT),
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        exec_dynamic=on_gpu,
        prefetch_queue_depth=1,  # the loader's own thread runs ahead of the training step
    )
    graph.build()
    return graph


@pipeline_def(enable_conditionals=True)
def _graph(augment: AugmentConfig, on: str, dtype: Any) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # The manifest's sizes, and the windows drawn from them, ignore EXIF.
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if on == "cpu":
        start, shape = (
            fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape")
        )
        return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **options)
    image = fn.decoders.image(encoded, device="mixed", **options)
    return _view(image, "1", augment, dtype), _view(image, "2", augment, dtype)


def _union(params1: ViewParams, params2: ViewParams) -> npt.NDArray[np.int64]:
    """(N, 4): top, left, height, width of the smallest part of each image that holds both its windows."""
    top, left = np.minimum(params1.top, params2.top), np.minimum(params1.left, params2.left)
    bottom = np.maximum(params1.top + params1.height, params2.top + params2.height)
    right = np.maximum(params1.left + params1.width, params2.left + params2.width)
    return np.stack([top, left, bottom - top, right - left], 1).astype(np.int64)


def _view(image: Any, index: str, augment: AugmentConfig, dtype: Any) -> Any:
    def argument(name: str, ndim: int, dtype: Any = types.FLOAT) -> Any:
        return fn.external_source(name=name + index, dtype=dtype, ndim=ndim)

    size, radius = augment.size, augment.blur_taps // 2
    x = fn.resize(
        image,
        size=[size, size],
        roi_start=argument("start", 1),  # a window whose end lies before its start comes out flipped
        roi_end=argument("end", 1),
        interp_type=types.INTERP_CUBIC,
        antialias=False,
        dtype=types.FLOAT,
    )
    x = math.clamp(x / 255.0, 0.0, 1.0)
    mean = fn.reductions.mean(x, axes=(0, 1), keep_dims=True)
    x = fn.coord_transform(x, M=argument("matrix", 2), T=argument("offset", 1))
    x = math.clamp(x + fn.coord_transform(mean, M=argument("mean_matrix", 2)), 0.0, 1.0)
    if argument("blur", 0, types.BOOL):
        padded = fn.slice(
            x,
            (-radius, -radius),
            (size + 2 * radius, size + 2 * radius),
            axes=(0, 1),
            out_of_bounds_policy="pad",  # zeros, as the reference; gaussian_blur alone would mirror the image
        )
        blurred = fn.gaussian_blur(
            padded, sigma=argument("sigma", 0), window_size=argument("window", 0, types.INT32)
        )
        x = fn.slice(blurred, (radius, radius), (size, size), axes=(0, 1))
    if argument("solarize", 0, types.BOOL):
        x = math.min(x, 1.0 - x)  # x where it is below 0.5, else 1 - x
    return fn.crop_mirror_normalize(
        x, dtype=dtype, output_layout="HWC", mean=list(augment.mean), std=list(augment.std)
    )


def _arguments(params: ViewParams, augment: AugmentConfig) -> dict[str, Any]:
    """The graph's inputs for one view, by name; the first axis of each is the sample."""
    left, right = params.left, params.left + params.width
    start = np.stack([params.top, np.where(params.flip, right, left)], 1)
    end = np.stack([params.top + params.height, np.where(params.flip, left, right)], 1)
    matrix, mean_matrix, offset = color_affine(params)
    # A tap beyond 3 sigma weighs less than an 8-bit level; the full window costs three times as much.
    window = np.minimum(2 * np.ceil(3 * params.sigma) + 1, augment.blur_taps)
    values = (
        start.astype(np.float32),
        end.astype(np.float32),
        matrix,
        mean_matrix,
        offset,
        params.blur,
        params.sigma,
        window.astype(np.int32),
        params.solarize,
    )
    return dict(zip(_PER_VIEW, values, strict=True))


def color_affine(
    params: ViewParams,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Each sample's colour jitter and grey as one map: out = A x + B m + c, m the image's per-channel mean.

    Args:
        params: N drawn views.

    Returns:
        A (N, 3, 3), B (N, 3, 3), c (N, 3), float32.
    """
    n = len(params)
    a, b, c = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3, 3)), np.zeros((n, 3))
    identity = np.eye(3)
    luma = np.tile(np.array(GRAY_WEIGHTS), (3, 1))
    saturation = params.saturation[:, None, None].astype(float)
    linear = {
        SATURATION: luma + saturation * (identity - luma),
        HUE: _hue_rotation(params.hue.astype(float)),
    }
    factor = params.contrast[:, None, None].astype(float)
    for place in range(4):
        which = np.where(params.jitter, params.order[:, place], 255)
        for operation, matrix in linear.items():
            rows = which == operation
            a[rows], b[rows] = matrix[rows] @ a[rows], matrix[rows] @ b[rows]
            c[rows] = np.einsum("nij,nj->ni", matrix[rows], c[rows])
        rows = which == CONTRAST  # the mean at this point is (A + B) m + c, so c cancels
        b[rows] = factor[rows] * b[rows] + (1 - factor[rows]) * (a[rows] + b[rows])
        a[rows] *= factor[rows]
        c[which == BRIGHTNESS] += params.brightness[which == BRIGHTNESS, None]
    gray = params.gray
    a[gray], b[gray], c[gray] = luma @ a[gray], luma @ b[gray], c[gray] @ luma.T
    return a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)


def _hue_rotation(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N, 3, 3): rotation about the grey axis, the linear counterpart of adding to H in HSV.

    HSV's hue is an angle about that axis, red, green and blue a third of a turn apart, so whole thirds are exact.
    """
    angle = 2 * np.pi * turns[:, None, None]
    mean = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return mean + np.cos(angle) * (np.eye(3) - mean) + np.sin(angle) * cross


def _undecodable(encoded: Sequence[bytes]) -> dict[int, str]:
    reasons = {}
    for i, data in enumerate(encoded):
        try:
            decode(data)
        except ValueError as error:
            reasons[i] = str(error)
    return reasons

"""Both views of decoded images on the CPU, compiled by numba: crop, bicubic resize, flip, color, blur, solarize.

The definitions are those of pipelines/torch_backend.py, in float32; tests/test_cpu_kernels.py checks that the two agree
to 1e-5. A view is made in three walks over its rows: a row stays in the first-level cache during every operation that
needs no other row:

    1  rows of the window ─► resized row, flipped ─► color operations that precede contrast ─► its sum
    2  contrast about the mean ─► color operations that follow it ─► gray ─► blur along the row
    3  blur along the columns ─► solarize ─► normalize ─► interleaved output

cpu_walks.py has the walks, cpu_rows.py the operations on rows that the profiles share, cpu_byol.py and
cpu_torchvision.py the other ones.

numba compiles a profile on its first call (seconds) and caches the code in __pycache__ beside this file, in the user's
cache folder if that is not writable, or in NUMBA_CACHE_DIR. The compiled code runs without the GIL.
"""

import functools
import hashlib
import inspect
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types

from byolt.configs.schema import AugmentConfig, Profile
from byolt.pipelines import views
from byolt.pipelines.kernels import cpu_byol, cpu_rows, cpu_torchvision, cpu_walks, inputs
from byolt.pipelines.kernels.cpu_rows import work_of
from byolt.pipelines.kernels.inputs import Floats, Pixels, kernel_params, normalization
from byolt.pipelines.views import ViewParams

_CHUNK = 16  # images in a thread's unit of work
_COMPILED = (cpu_rows, cpu_walks, cpu_byol, cpu_torchvision, inputs, views)  # their code and constants


@numba.extending.intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An integer as the pointer that numba.carray takes."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@functools.cache
def compiled(profile: Profile, views: int) -> Any:
    """The function that makes `views` views of each of the images start to stop.

    numba's cache watches only this file, and two processes that compile different functions of one name at the same
    time can store the code of one under the key of the other. So the name of each is unique: profile, number of views
    and a digest of the files that are compiled into it.
    """
    torchvision = profile == "torchvision"
    digest = hashlib.sha256("".join(inspect.getsource(part) for part in _COMPILED).encode()).hexdigest()

    def run(
        start: int, stop: int, pixels: Pixels, params: Any, taps: int, steps: Any, norm: Floats, outs: Any
    ) -> None:
        work = work_of(outs[0].shape[1], taps, steps, norm)
        for i in range(start, stop):
            height, width = pixels.box[i, 2], pixels.box[i, 3]
            image = numba.carray(_pointer(pixels.address[i]), (height, 3 * width), np.uint8)
            for k in range(len(outs)):
                if torchvision:
                    cpu_torchvision.make_view(image, params[k], i, taps, work, outs[k][i])
                else:
                    cpu_byol.make_view(image, params[k], i, taps, work, outs[k][i])

    run.__qualname__ = f"make_{views}_views_{profile}_{digest[:16]}"
    options = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(run)
    except RuntimeError:  # no folder for the cache is writable: each process compiles anew
        return numba.njit(**options)(run)


def make_views(
    pixels: Pixels,
    params: Sequence[ViewParams],
    augment: AugmentConfig,
    outs: Sequence[Floats],
    pool: Executor | None = None,
) -> None:
    """Makes the views of N images.

    Args:
        pixels: the decoded images; the caller keeps their memory alive.
        params: for each view the parameters of N samples, whose windows are inside the images' boxes.
        augment: profile, size, mean and std.
        outs: for each view a C-contiguous float32 (N, size, size, 3) that receives the normalized pixels.
        pool: threads that share the work; None for the caller's own.

    Raises:
        ValueError: a window is not inside its image's box. (The kernels read memory without checks.)
    """
    n, size = len(pixels.address), augment.size
    views, norm = kernel_params(pixels, params), normalization(augment)
    steps, rows = np.array([1, size]), tuple(out.reshape(n, size, 3 * size) for out in outs)

    run = compiled(augment.profile, len(outs))

    def work(start: int, stop: int) -> None:
        run(start, stop, pixels, views, augment.blur_taps, steps, norm, rows)

    if pool is None:
        work(0, n)
    else:
        starts = range(0, n, _CHUNK)
        list(pool.map(work, starts, [min(start + _CHUNK, n) for start in starts]))

"""Both views of decoded images in compiled loops: window, bicubic resize, flip, colour, blur, solarize, normalise.

The definitions are those of pipelines/torch_backend.py, in float32 throughout; tests/test_kernels.py holds the two to
1e-5 of each other. A view is made in three walks over its rows, so that a row stays in the first-level cache while
everything that needs no other row happens to it:

    1  rows of the window ─► resized row, flipped ─► colour operations drawn before contrast ─► its sum
    2  contrast about the mean ─► colour operations drawn after it ─► grey ─► blur along the row
    3  blur along the columns ─► solarize ─► normalise ─► interleaved output

cpu_rows.py has the walks and what the profiles share, cpu_byol.py and cpu_torchvision.py what they differ in.

numba compiles on a profile's first call (seconds) and keeps the code in __pycache__ beside this file, or in the user's
cache folder where that cannot be written (NUMBA_CACHE_DIR moves it). The compiled code runs without the GIL.
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
from byolt.pipelines.kernels import cpu_byol, cpu_rows, cpu_torchvision, recipe
from byolt.pipelines.kernels.cpu_rows import work_of
from byolt.pipelines.kernels.recipe import Floats, Pixels, normalisation, write
from byolt.pipelines.views import ViewParams

_CHUNK = 16  # images that a thread takes at a time
# Whose code or constants are compiled.
_PARTS = (cpu_rows, cpu_byol, cpu_torchvision, recipe, views)


@numba.extending.intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """An integer as the pointer that numba.carray takes."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@functools.cache
def compiled(profile: Profile, views: int) -> Any:
    """The function that makes so many views of images start to stop.

    numba's cache watches this file alone, and two processes that compile different functions under one name at the same
    time can leave the code of the one under the key of the other. So each has a name of its own: profile, number of
    views, and a digest of the files whose code goes into it.
    """
    torchvision = profile == "torchvision"
    digest = hashlib.sha256("".join(inspect.getsource(part) for part in _PARTS).encode()).hexdigest()

    def run(
        start: int, stop: int, pixels: Pixels, recipes: Any, taps: int, steps: Any, norm: Floats, outs: Any
    ) -> None:
        work = work_of(outs[0].shape[1], taps, steps, norm)
        for i in range(start, stop):
            height, width = pixels.box[i, 2], pixels.box[i, 3]
            image = numba.carray(_pointer(pixels.address[i]), (height, 3 * width), np.uint8)
            for k in range(len(outs)):
                if torchvision:
                    cpu_torchvision.make_view(image, recipes[k], i, taps, work, outs[k][i])
                else:
                    cpu_byol.make_view(image, recipes[k], i, taps, work, outs[k][i])

    run.__qualname__ = f"make_{views}_views_{profile}_{digest[:16]}"
    options = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(run)
    except RuntimeError:  # "cannot cache function: no locator available": each process compiles anew
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
        params: for each view, N drawn ones; their windows lie inside the images' boxes.
        augment: profile, size, mean and std.
        outs: for each view a C-contiguous float32 (N, size, size, 3); the normalised pixels go there.
        pool: threads to share the work; None for the caller's own.

    Raises:
        ValueError: a window is not inside its image's box. (The kernels read memory without checks.)
    """
    n, size = len(pixels.address), augment.size
    recipes, norm = write(pixels, params), normalisation(augment)
    steps, rows = np.array([1, size]), tuple(out.reshape(n, size, 3 * size) for out in outs)

    run = compiled(augment.profile, len(outs))

    def work(start: int, stop: int) -> None:
        run(start, stop, pixels, recipes, augment.blur_taps, steps, norm, rows)

    if pool is None:
        work(0, n)
    else:
        starts = range(0, n, _CHUNK)
        list(pool.map(work, starts, [min(start + _CHUNK, n) for start in starts]))

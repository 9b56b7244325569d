"""Bytes that the tensors of operations and kernels have, and how fast a device copies as many."""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from byolt.tools.benchmarks.stages import Clock


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each tensor that an operation of torch or a Triton kernel in the block reads or writes.

    A tensor counts once for each operation, even if caches make it cheaper, or the kernel reads it twice. Kernels that
    take addresses, as the fused LARS, count nothing.
    """
    sizes: list[int] = []

    def count(*touched: object) -> None:
        sizes.extend(x.numel() * x.element_size() for x in tree_leaves(touched) if isinstance(x, Tensor))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if not func.is_view and "empty" not in func.name():
                count(args, kwargs, result)
            return result

    with ExitStack() as stack:
        if importlib.util.find_spec("triton"):
            from triton.runtime.jit import JITFunction

            launch = JITFunction.run

            def run(kernel: Any, *args: Any, **options: Any) -> Any:
                count(args, options)
                return launch(kernel, *args, **options)

            stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(Mode())
        yield sizes


def copy_bandwidth(device: torch.device, size: int = 2**29) -> float:
    """Bytes per second, read and written, of copies of `size` bytes, many times a GPU's cache, within the memory."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    for repeats in (3, 20):  # the first are not counted
        clock = Clock(device)
        with clock.measure(1):
            for _ in range(repeats):
                target.copy_(source)
    return 2 * size * repeats / clock.wall

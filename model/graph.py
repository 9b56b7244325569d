"""A training step as one CUDA graph: the host launches one graph instead of thousands of kernels.

Not yet run on a GPU. On an H200 the host spent 157 ms on the launches of a ResNet-50 step; a prototype's graph ran.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.model.distributed import World
from byolt.model.optim import resolve_backend


def choose_graph(config: Config, world: World, precision: str) -> tuple[bool, str]:
    """Decides whether the step is captured in a CUDA graph (train.cuda_graph).

    Returns:
        The decision, and one sentence about it for the console; "" where nobody would expect a graph.

    Raises:
        ValueError: train.cuda_graph=true, and such a step cannot be captured.
    """
    train, backend = config.train, config.optimizer.backend
    reasons = {
        f"the device is {world.device.type}": world.device.type != "cuda",
        f"DDP's reductions over {world.size} ranks are not captured": world.size > 1,
        "fp16's gradient scaler is not captured": precision == "fp16",
        "train.compile=true makes graphs of its own": train.compile,
        f"optimizer.backend={backend} takes the learning rate from the host": (
            resolve_backend(backend, world.device) != "triton"
        ),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if train.cuda_graph is True and reason:
        raise ValueError(f"train.cuda_graph=true: {reason}; set train.cuda_graph=auto")
    if train.cuda_graph is True:
        return True, "each step is one CUDA graph, captured after a few steps"
    if train.cuda_graph is False or world.device.type != "cuda":
        return False, ""
    reason = reason or "not yet measured on a GPU; train.cuda_graph=true captures each step"
    return False, f"no CUDA graph: {reason}"


class Graph:
    """Calls a function eagerly a few times, captures it, and replays the capture from then on.

    The eager calls compile kernels, choose algorithms and create lasting tensors. Capturing runs nothing, so a call
    gives the same numbers whether it is eager or replayed.

    The function must launch the same kernels on the same memory in every call, whatever the numbers: scalars that
    change must be read from the device, and nothing may wait for the device.

    Args:
        function: of lists of tensors on the device; returns tensors in nested tuples or lists.
        before_replay: runs on the host before each replay; it brings up to date what the kernels read from the device.
        device: a CUDA device.
    """

    WARM_UP = 3  # eager calls; torch's advice

    def __init__(
        self,
        function: Callable[[list[Tensor]], Any],
        before_replay: Callable[[], object],
        device: torch.device,
    ) -> None:
        self.function, self.before_replay = function, before_replay
        self.cuda = _Cuda(device)
        self.calls = 0
        self.inputs: list[Tensor] = []
        self.outputs: Any = None

    def __call__(self, inputs: list[Tensor]) -> Any:
        """Returns the function's result; a replay's result is overwritten by the next call."""
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self.cuda.run(lambda: self.function(inputs))
        if [_form(x) for x in inputs] != [_form(x) for x in self.inputs]:
            self.inputs = [x.clone() for x in inputs]
            self.outputs = self.cuda.capture(lambda: self.function(self.inputs))
        else:
            torch._foreach_copy_(self.inputs, inputs)
        self.before_replay()
        self.cuda.replay()
        return self.outputs


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


class _Cuda:
    """Warm-up, capture and replay on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    def run(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], Any]) -> Any:
        # A capture of an earlier form frees its memory first. Other threads, as the loader's, may use CUDA meanwhile.
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self.graph.replay()

"""The processes (ranks) of a run and their collectives; the only file that imports torch.distributed."""

import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from byolt.configs.command_line import torchrun_ranks
from byolt.files import stop
from byolt.files.console import duration, say
from byolt.files.machine import too_few_gpus

T = TypeVar("T")
# torch 2.14 renames it and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its rank on its machine, the number of ranks and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str  # "nccl" on CUDA, "gloo" on CPU, "none" for a single process, which has no process group
    store: Any = field(default=None, compare=False)  # key-value store of all ranks; None for a single process

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(
    device: str = "auto", timeout: float = 600.0, deterministic: bool = False, setting: str = "train.device"
) -> World:
    """Joins the processes that torchrun or srun started, if any, and sets torch's global options.

    Rank, size and addresses come from torchrun's environment variables; `slurm.join` sets them for srun's tasks.

    Args:
        device: "cuda", "cpu", or "auto": CUDA if there is a GPU.
        timeout: seconds after which a collective raises if a rank does not join it.
        deterministic: torch uses deterministic algorithms only, and raises where it has none.
        setting: the setting or option that chose the device, for messages.

    Raises:
        ValueError: the device is unknown or missing, torchrun's variables are incomplete, or the first rank is not
            reached at their address.
        Stopped: a signal asked the run to stop; several ranks do not wait for each other then.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{setting}={device} must be auto, cpu or cuda")
    rank, local_rank, size = torchrun_ranks(os.environ)
    _set_options(deterministic)
    place = _place(device, local_rank, setting)
    if size == 1:
        return World(rank, local_rank, size, place, "none")
    backend = "nccl" if place.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    with _waiting(f"rank {rank} of {size} waits for the others at {address}, for up to {duration(timeout)}"):
        try:
            store, _, _ = next(rendezvous("env://", timeout=limit))
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"rank {rank} of {size} did not meet the others at {address}: {reason}"
            ) from None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart and keeps the dead processes' addresses, on which gloo fails or hangs.
            store = dist.PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=place if backend == "nccl" else None,
        )
    store.set(f"host {rank}", socket.gethostname())
    if rank == 0:
        _warn_of_shared_store(os.environ)
    return World(rank, local_rank, size, place, backend, store)


def _warn_of_shared_store(environment: Mapping[str, str]) -> None:
    """Warns that the ranks would wait for each other at different keys: each machine counts its own restarts."""
    several = int(environment.get("GROUP_WORLD_SIZE", "1")) > 1
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if several and restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        say(
            "warning: a restart over several machines by torchrun hangs: start it with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of each machine",
            sys.stderr,
        )


@contextmanager
def _waiting(message: str, silent: float = 10.0) -> Iterator[None]:
    """Prints the message once after `silent` seconds; a signal that has a handler ends the process at once.

    torch waits in C++, where no handler of Python runs; before the first step nothing is lost.

    Raises:
        Stopped: a signal came before.
    """
    main = threading.current_thread() is threading.main_thread()  # others may not set handlers
    numbers = stop.SIGNALS if main else ()
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    timer = threading.Timer(silent, say, (message, sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        stop.check()
        yield
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _set_options(deterministic: bool) -> None:
    """Sets torch's global options; must precede the first use of CUDA."""
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)  # imports torch's compiler, 1.2 CPU s
    if deterministic:
        # cuBLAS reads it at its start; otherwise its order of addition may vary when streams share its workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # cuDNN times its algorithms to choose one; the choice may differ between runs.
    torch.backends.cudnn.benchmark = not deterministic
    # By default, convolutions (and nothing else) round float32 to TF32's 10 bits. fp32 means fp32; bf16 is faster.
    torch.backends.cudnn.allow_tf32 = False


def _place(device: str, local_rank: int, setting: str) -> torch.device:
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 1 and "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        local_rank = 0  # srun --gpus-per-task=1 shows each task its own GPU only
    if local_rank >= gpus:
        raise ValueError(too_few_gpus(f"{setting}={device}", local_rank, gpus))
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank ended or did not join it in time."""
    if "Duplicate GPU" in str(error):  # NCCL's own check: srun's tasks without --gpus-per-task=1, for example
        return False
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def record(error: BaseException) -> None:
    """Writes the error to torchrun's error file, from which it finds and prints the first error of all ranks."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def shutdown(world: World) -> None:
    """Leaves the process group, if there is one."""
    if world.size > 1:
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Waits until every rank has called it."""
    if world.size > 1:
        dist.barrier()


def all_reduce_mean(tensor: Tensor, world: World) -> Tensor:
    """Returns the mean over ranks of a floating-point tensor on world.device, in a new tensor."""
    if world.size == 1:
        return tensor.clone()
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world.size


class OwnTime:
    """Measures the part of each step in which a rank waits for no other: from its start to its first collective.

    All ranks take equally long for a step, since each waits for the slowest. Only this part tells them apart.
    """

    def __init__(self) -> None:
        self._spans: deque[list[Any]] = deque(maxlen=100)  # start and end of steps; an open one has no end

    def start(self, device: torch.device) -> None:
        """Begins a step; does nothing for a single process."""
        if dist.is_initialized():
            self._spans.append([_now(device)])

    def stop(self, device: torch.device) -> None:
        """Called before each collective of batch norm; the first one of a step counts."""
        if self._spans and len(self._spans[-1]) == 1:
            self._spans[-1].append(_now(device))

    def per_step(self) -> float:
        """Seconds, the mean over the steps since the last call, of which the newest 100 count; waits for a GPU."""
        spans = [span for span in self._spans if len(span) == 2]
        self._spans.clear()
        if not spans:
            return 0.0
        if isinstance(spans[-1][1], torch.cuda.Event):
            spans[-1][1].synchronize()
            return sum(begin.elapsed_time(end) for begin, end in spans) / len(spans) / 1000
        return sum(end - begin for begin, end in spans) / len(spans)


own_time = OwnTime()  # of this process


def _now(device: torch.device) -> Any:
    """The time on the device: a number of seconds, or an event of a GPU's stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def host_of(rank: int, world: World) -> str:
    """The name of a rank's machine; needs a process group."""
    return world.store.get(f"host {rank}").decode()


def all_reduce_sum_(tensor: Tensor) -> None:
    """Replaces a tensor on this rank's device by its sum over all ranks; needs a process group."""
    own_time.stop(tensor.device)
    dist.all_reduce(tensor)


def gather_stacked(tensor: Tensor) -> Tensor:
    """Stacks the vectors (n,) of all ranks as (ranks, n); needs a process group; the host does not wait."""
    own_time.stop(tensor.device)
    flat = tensor.new_empty(dist.get_world_size() * len(tensor))
    _all_gather_single(flat, tensor)
    return flat.view(-1, len(tensor))


def any_rank(flag: bool, world: World) -> bool:
    """Returns True on every rank if the flag is True on one; the host waits."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def broadcast_object(value: T, world: World) -> T:
    """Returns rank 0's value, of any type that pickles, on every rank."""
    if world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def on_main(action: Callable[[], T], world: World) -> T:
    """Runs an action on rank 0 only; returns its result, or raises its exception, on every rank."""
    value: T | None = None
    failed: Exception | None = None
    if world.is_main:
        try:
            value = action()
        except Exception as error:
            failed = error
    value, failed = broadcast_object((value, failed), world)
    if failed:
        raise failed
    return cast(T, value)


def broadcast_module(module: nn.Module, world: World) -> None:
    """Overwrites parameters and buffers by those of rank 0, in one broadcast per dtype."""
    tensors = list(module.state_dict().values()) if world.size > 1 else []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def gather_rows(tensor: Tensor, world: World) -> Tensor:
    """Concatenates rows (n, ...) of all ranks, in rank order, on every rank; n may differ between ranks."""
    if world.size == 1:
        return tensor
    count = torch.tensor([len(tensor)], device=world.device)
    counts = [torch.empty_like(count) for _ in range(world.size)]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def wrap(module: nn.Module, world: World, static_graph: bool = True) -> nn.Module:
    """Wraps a module so that gradients are averaged over ranks (DDP); returns it unchanged for a single process.

    Args:
        module: the module, the same on every rank.
        world: the processes.
        static_graph: declares that the graph never changes. Must be False for `no_sync`, whose first backward under a
            static graph fails with an internal assertion in torch 2.14.
    """
    if world.size == 1:
        return module
    # torch 2.14 renames broadcast_buffers and warns of the old name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # synchronized batch norm keeps the running statistics equal
            gradient_as_bucket_view=True,
            static_graph=static_graph,
        )


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Context in which backward adds to the local gradients without averaging over ranks."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()  # type: ignore[return-value]

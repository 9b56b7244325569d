"""Processes and what they exchange: the only file that imports torch.distributed."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# torch 2.14 has renamed it, and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Where this process stands: rank of size processes, local_rank on its machine, its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str  # "nccl" on CUDA, "gloo" on CPU, "none" for a single process, which has no process group
    store: Any = field(default=None, compare=False)  # shared keys and counters; None for a single process

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(device: str = "auto", timeout: float = 600.0, deterministic: bool = False) -> World:
    """Join the processes that torchrun started, or stand alone without it; settle how torch computes.

    Rank, size and addresses come from torchrun's environment variables only.

    Args:
        device: "cuda", "cpu", or "auto": CUDA where there is a GPU.
        timeout: seconds after which a collective that a rank does not join raises.
        deterministic: only algorithms whose result is the same in every run; torch raises where it has none.

    Raises:
        ValueError: the device is unknown or missing, or torchrun's variables are incomplete.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"train.device={device} is unknown; set auto, cpu or cuda")
    present = [name for name in _TORCHRUN_VARIABLES if name in os.environ]
    started_by_torchrun = "RANK" in present or "WORLD_SIZE" in present
    if started_by_torchrun and len(present) < len(_TORCHRUN_VARIABLES):
        missing = ", ".join(name for name in _TORCHRUN_VARIABLES if name not in present)
        raise ValueError(
            f"environment variables {missing} are not set though {present[0]} is; start with torchrun"
        )
    rank, local_rank, size = (
        (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if started_by_torchrun
        else (0, 0, 1)
    )
    _settle(deterministic)
    place = _place(device, local_rank)
    if size == 1:
        return World(rank, local_rank, size, place, "none")
    backend = "nccl" if place.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    store, _, _ = next(rendezvous("env://", timeout=limit))
    # After a restart by torchrun the store still holds the dead processes' addresses: gloo would dial them
    # and fail or hang.
    store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=place if backend == "nccl" else None,
    )
    return World(rank, local_rank, size, place, backend, store)


def _settle(deterministic: bool) -> None:
    """What torch may choose when it computes; before CUDA starts. Without a GPU only the first line has an effect."""
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # Otherwise cuBLAS may add up in another order where several streams share its workspace; it reads this at its
        # start.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The fastest algorithm of a convolution is found by trying, and may be another one in the next run.
    torch.backends.cudnn.benchmark = not deterministic
    # By default convolutions, and only they, round float32 to TF32's 10 bits. fp32 means fp32; bf16 is the fast way.
    torch.backends.cudnn.allow_tf32 = False


def _place(device: str, local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ValueError(
            f"device {device}, but process {local_rank} of this machine finds {gpus} GPUs; "
            "set the device to cpu or lower torchrun's --nproc-per-node"
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed for want of another rank: it ended, or did not come in time."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def record(error: BaseException) -> None:
    """Leaves the error where torchrun looks for the first one, which it prints last; nothing without torchrun."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def shutdown(world: World) -> None:
    """Leave the process group, if there is one."""
    if world.size > 1:
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier()


def all_reduce_mean(tensor: Tensor, world: World) -> Tensor:
    """Mean over ranks of a floating-point tensor on world.device, in a new tensor."""
    if world.size == 1:
        return tensor.clone()
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world.size


def all_reduce_sum_(tensor: Tensor) -> None:
    """Replace a tensor on this rank's device by its sum over all ranks, of which there are several."""
    dist.all_reduce(tensor)


def gather_stacked(tensor: Tensor) -> Tensor:
    """Equal vectors (n,) of all ranks, of which there are several, as (ranks, n); the host does not wait."""
    flat = tensor.new_empty(dist.get_world_size() * len(tensor))
    _all_gather_single(flat, tensor)
    return flat.view(-1, len(tensor))


def any_rank(flag: bool, world: World) -> bool:
    """True on every rank if it is True on one; the host waits for the answer."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def broadcast_object(value: T, world: World) -> T:
    """Rank 0's value, of any type that pickles, on every rank."""
    if world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def on_main(action: Callable[[], T], world: World) -> T:
    """What the action, done on rank 0 only, gives there: on every rank. What it raises is raised on every rank too."""
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
    """Overwrite parameters and buffers by rank 0's."""
    if world.size > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def gather_rows(tensor: Tensor, world: World) -> Tensor:
    """Rows (n, ...) of all ranks, in the order of ranks, on every rank; n may differ between ranks."""
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
    """The module with gradients averaged over ranks (DDP); itself for a single process.

    Args:
        module: what to wrap, the same on every rank.
        world: the processes.
        static_graph: the graph never changes. DDP's `no_sync` needs False: in torch 2.14 its first backward
            under a static graph stops with an internal assertion.
    """
    if world.size == 1:
        return module
    # torch 2.14 renames broadcast_buffers; older versions know only this name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # running statistics are equal already: batch norm is synchronised
            gradient_as_bucket_view=True,
            static_graph=static_graph,
        )


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, backward adds to the local gradients without averaging over ranks."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()  # type: ignore[return-value]

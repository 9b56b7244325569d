"""Host side of the fused update: tables of addresses on the device, and the launches of lars_triton.py's kernels.

Parameters, gradients (DDP's buckets), momenta and targets stay where they are; nothing is copied into flat buffers.
Learning rate, 1 - tau and the gate are device scalars, so that a captured CUDA graph stays valid for a whole run.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from byolt.model.kernels import lars_triton as kernels
from byolt.model.kernels.layout import is_dense, like

_BLOCK = kernels.BLOCK.value
Row = tuple[int, int, int, int, int, int]  # addresses of p, g, m, t; size; row of settings


class FusedUpdate:
    """LARS and, if asked for, EMA, finite gate, gradient norm and kept buffers, in three launches.

    Args:
        optimizer: LARS; its param_groups are read at every `refresh`, its state gets the momenta.
        target: tensors that follow `online`.
        online: parameters of the optimizer, one per target. Each must have a gradient.
        buffers: contiguous tensors, of element sizes divisible by 4 bytes, that return to their kept values if a step
            is not finite.

    Raises:
        ValueError: the kernels cannot update these tensors (`unfit`).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        target: Sequence[Tensor] = (),
        online: Sequence[Tensor] = (),
        buffers: Sequence[Tensor] = (),
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        reason = unfit([*parameters, *target], buffers)
        if reason:
            raise ValueError(f"optimizer.backend=triton: {reason}; set optimizer.backend=foreach")
        self.optimizer, self.buffers = optimizer, list(buffers)
        self.target = dict(zip(online, target, strict=True))
        self.device = device = parameters[0].device
        words = [b.numel() * b.element_size() // 4 for b in self.buffers]
        self.saved = torch.empty(sum(words), dtype=torch.int32, device=device).split(words)
        self.weights, self.kept = _Table(device), _Table(device)
        # Two rows per group: of its matrices and kernels, and of its parameters with ndim <= 1.
        self.settings = torch.zeros(len(optimizer.param_groups), 2, kernels.WIDTH.value, device=device)
        self.constants: list[list[tuple[float, ...]]] = []
        # Gradients of another memory layout than their parameter's are copied; the copies live until the next refresh.
        self.copies: list[Tensor] = []
        self.captured: tuple[int | bool, ...] | None = None
        self.pace = torch.zeros((), device=device)  # 1 - tau, because float32 rounds tau itself too coarsely
        self.always = torch.ones((), dtype=torch.bool, device=device)

    def keep_buffers(self) -> None:
        """Copies the buffers in one launch; the update restores them if the step is not finite."""
        if self.buffers:
            pairs = zip(self.buffers, self.saved, strict=True)
            self.kept.fill([(b.data_ptr(), s.data_ptr(), 0, 0, s.numel(), 0) for b, s in pairs])
            kernels.keep[(self.kept.count,)](self.kept.rows, self.kept.blocks)

    def set_rates(self, lr: float | None = None, tau: float | None = None) -> None:
        """Writes rates to the device, for all updates until the next call; the host does not wait.

        Without `lr` each group keeps its own, as param_groups have it; without `tau` EMA's is unchanged.
        """
        for settings, group in zip(self.settings, self.optimizer.param_groups, strict=True):
            group["lr"] = group["lr"] if lr is None else lr
            settings[:, 0].fill_(group["lr"])
        if tau is not None:
            self.pace.fill_(1 - tau)

    @torch.no_grad()
    def refresh(self) -> None:
        """Reads where every tensor is now, and uploads what moved since the last call; the host does not wait.

        Raises:
            ValueError: a parameter with a target has no gradient.
            RuntimeError: a captured update does not fit the tensors any longer.
        """
        self._refresh_constants()
        rows: list[Row] = []
        found = 0
        self.copies = []
        for index, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = like(p.grad, p)
                if gradient is not p.grad:
                    self.copies.append(gradient)
                target = self.target.get(p)
                found += target is not None
                address = 0 if target is None else target.data_ptr()
                pointers = p.data_ptr(), gradient.data_ptr(), self._momentum(p).data_ptr(), address
                rows.append((*pointers, p.numel(), 2 * index + (p.ndim <= 1)))
        if found < len(self.target):
            raise ValueError(f"{len(self.target) - found} parameters with a target have no gradient")
        self.weights.fill(rows)
        if self.captured and (self.copies or self.captured != self.weights.form()):
            raise RuntimeError(
                "the layout of the weights or gradients changed after a CUDA graph captured their update"
            )

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.optimizer.state[p]
        old = state.get("momentum")
        state["momentum"] = torch.zeros_like(p) if old is None else like(old, p)
        return state["momentum"]

    def _refresh_constants(self) -> None:
        """Uploads every group's settings, without the learning rate, if one has changed."""
        constants: list[list[tuple[float, ...]]] = []
        for group in self.optimizer.param_groups:
            momentum, decay = group["momentum"], group["weight_decay"]
            trust = group["trust_coefficient"], float(group["trust"] == "clip")
            of_others = momentum, decay if group["decay_all"] else 0, 0, 0
            constants.append([(momentum, decay, *trust), of_others])
        if constants != self.constants:
            self.constants = constants
            _upload(np.array(constants, np.float32), self.settings[..., 1:])

    def __call__(self, finite: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One update at the rates that `set_rates` wrote.

        While a CUDA graph is captured, addresses are not refreshed: call `refresh` between capture and replay. If
        `finite` is False, a 0-dim bool on the device, nothing changes; None: whether the gradients' norm is finite.

        Returns:
            The gate, and the norm of all gradients, 0-dim float32, in new tensors.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.captured = self.weights.form()
        else:
            self.refresh()
        table, count = self.weights, self.weights.count
        sums = torch.empty(3, count, device=self.device)
        factors = torch.empty(table.length, device=self.device)
        norm = torch.empty((), device=self.device)
        gate = torch.empty_like(self.always)
        kernels.norms[(count,)](
            table.rows, table.blocks, self.settings, sums, count, table.aligned, num_warps=8
        )
        kernels.ratios[(table.length + 1,)](
            table.rows, self.settings, sums, factors, norm, gate, table.length, count, num_warps=8
        )
        gate = gate if finite is None else finite
        kernels.update[(count + self.kept.count,)](
            table.rows, table.blocks, self.settings, self.pace, factors, gate, count,
            self.kept.rows, self.kept.blocks, table.aligned, num_warps=8,
        )  # fmt: skip
        return gate, norm


class _Table:
    """A table of addresses on the device, and the blocks that the tensors are cut into.

    Attributes:
        rows: (tensors, 8) int64; lars_triton.py names the columns.
        blocks: (count, 2) int32: row and first element of each block.
        length: tensors.
        count: blocks.
        aligned: all addresses are multiples of 16 bytes, all sizes multiples of 4 elements.
    """

    def __init__(self, device: torch.device) -> None:
        self.length = self.count = 0
        self.aligned = False
        self.rows = torch.empty(0, kernels.COLUMNS.value, dtype=torch.int64, device=device)
        self.blocks = torch.empty(0, 2, dtype=torch.int32, device=device)
        self.known: list[Row] = []

    def fill(self, known: list[Row]) -> None:
        """Sets the rows. The tables' own addresses change only if a size does."""
        if known == self.known:
            return
        values = np.array(known, np.int64).reshape(-1, 6)
        sizes = values[:, 4]
        counts = -(-sizes // _BLOCK)
        first = np.cumsum(counts) - counts
        if [row[4] for row in known] != [row[4] for row in self.known]:
            self.length, self.count = len(known), int(counts.sum())
            row = np.repeat(np.arange(self.length), counts)
            start = (np.arange(self.count) - first[row]) * _BLOCK
            self.rows = self.rows.new_empty(self.length, kernels.COLUMNS.value)
            self.blocks = self.blocks.new_empty(self.count, 2)
            _upload(np.stack([row, start], 1).astype(np.int32), self.blocks)
        _upload(np.column_stack([values[:, :5], first, counts, values[:, 5]]), self.rows)
        self.aligned = not (values[:, :4] % 16).any() and not (sizes % 4).any()
        self.known = known

    def form(self) -> tuple[int | bool, ...]:
        """Returns everything of the table that is fixed in a captured launch."""
        return self.rows.data_ptr(), self.blocks.data_ptr(), self.count, self.aligned


def _upload(values: np.ndarray, out: Tensor) -> None:
    """Copies an array into a tensor on the device; the host does not wait, the pinned memory outlives the copy."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    out.copy_(host.pin_memory() if out.is_cuda else host, non_blocking=True)


def unfit(tensors: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> str | None:
    """Returns the reason why the kernels cannot update these tensors or keep these buffers; None if they can."""
    devices = set()
    for x in tensors:
        devices.add(x.device)
        if x.dtype != torch.float32:
            return f"a tensor of shape {tuple(x.shape)} is {x.dtype}, not float32"
        if not is_dense(x):
            return f"a tensor of shape {tuple(x.shape)} has gaps between its elements (strides {x.stride()})"
        if x.numel() >= 2**31:
            return f"a tensor of shape {tuple(x.shape)} has 2^31 elements or more"
    for b in buffers:
        if b.element_size() % 4 or not b.is_contiguous():
            return f"a buffer of shape {tuple(b.shape)} is {b.dtype}, or has gaps between its elements"
    return f"the tensors are on {len(devices)} devices" if len(devices) > 1 else None

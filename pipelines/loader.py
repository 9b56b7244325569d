"""Batches for the training step: ids from the order, bytes from the source, views from a back end, made ahead.

A thread of its own reads, checks, draws and augments `prefetch` micro-batches ahead of the step; on a GPU, on a stream
of its own, so that the step never queues behind the decoding of a later batch. What the step waited for is measured.
The loader has no state but the number of the next step: batch k is the same in any run.
"""

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.schema import Config
from pipelines import order
from pipelines.encoded import check, inspect
from pipelines.reading import Reader
from pipelines.resident import Resident, is_wanted
from pipelines.sources import Source
from pipelines.torch_backend import TorchBackend, UndecodableError, decode, resize_bicubic
from pipelines.views import ViewParams, draw_both


class Batch(NamedTuple):
    """One micro-batch of one rank, on its device."""

    view1: Tensor  # (n, 3, size, size), normalised, channels_last
    view2: Tensor
    label: Tensor  # (n,) int64 on the CPU; -1 where the image has no label
    id: Tensor  # (n,) int64 on the CPU: sample ids


class Backend(Protocol):
    """What decodes and augments: both views of N encoded images, as TorchBackend documents it."""

    def __call__(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]: ...


def make_resident(
    config: Config, source: Source, device: torch.device, dtype: torch.dtype
) -> tuple[Resident, str] | None:
    """The decoded data set in memory and one sentence about it; None where the images are to stay encoded.

    Args:
        config: the run; data.resident decides, and data.backend=torch keeps no images.
        source: the data set.
        device: where the views are made and delivered.
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: no image decodes, or they do not fit into the memory.
    """
    if config.data.backend == "torch" or not is_wanted(config.data, source):
        return None
    resident = Resident(source, config.augment, device, dtype, config.data.threads)
    kept = f"all {len(source)} images decoded in the {_place(device)}'s memory, and views made there"
    return resident, f"data.resident={config.data.resident}: {kept}"


def _place(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"


def make_backend(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The back end that data.backend asks for, and one sentence that says which it is and why.

    Raises:
        ValueError: data.backend is dali, and DALI is not installed.
    """
    choice, threads = config.data.backend, config.data.threads
    if choice != "torch":
        try:
            from pipelines.dali_backend import DaliBackend
        except ImportError as error:
            how = "pip install 'byolt[dali]' (torch for CUDA 12) or 'byolt[dali-cuda130]' (CUDA 13)"
            if choice == "dali":
                raise ValueError(f"data.backend=dali needs NVIDIA DALI ({error}): {how}") from None
            reason = f"data.backend=auto: torch on the CPU, because DALI is not installed; {how}"
            return TorchBackend(config.augment, device, dtype, threads), reason
        why = ", because it is installed" if choice == "auto" else ""
        reason = f"data.backend={choice}: DALI on the {_place(device)}{why}, {threads} threads"
        return DaliBackend(config.augment, device, dtype, threads), reason
    reason = f"data.backend=torch: torch on the CPU, {threads} threads"
    return TorchBackend(config.augment, device, dtype, threads), reason


class CorruptBudgetError(Exception):
    """More different images were undecodable than data.max_corrupt allows."""


class Loader:
    """Iterates over the micro-batches of one rank from a given step on, without an end.

    Step k of the run consists of `accumulation` consecutive micro-batches. It is a context manager: its thread begins
    to make batches when it is entered, and ends when it is left.

    `waited` is the time for which the step's thread found no batch in the queue. On a GPU that is not all: a batch is
    handed over as soon as its work is queued, and if the loader's stream is not done with it, the step's stream waits
    on the device, which no clock of the host sees. How much is lost altogether is the stall that tools/bench.py
    measures: loader and step together against the slower of the two alone.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        backend: Backend | Resident,
        *,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
        corrupt_log: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            config: the run.
            source: the data set.
            backend: made by `make_backend`.
            rank: this process, 0 <= rank < world_size.
            world_size: processes that share each global batch.
            first_step: the step of the run to begin with.
            corrupt_log: file to which each undecodable image is appended as a JSON line. With a `first_step` above
                0 those that this rank has listed count already and are not listed again.
            device: the GPU to which the back end delivers, for a stream of its own; else batches are made on the
                default stream.

        Raises:
            ValueError: the batch does not fit the data set or the number of ranks.
        """
        order.steps_per_epoch(len(source), config.train.batch_size)
        self._config, self._source, self._backend = config, source, backend
        self._images = config.images_per_rank(world_size)
        self._rank, self._world_size = rank, world_size
        self._corrupt_log = corrupt_log
        self._corrupt = self._listed(first_step)
        self._listed_before = len(self._corrupt)
        self._next_step = first_step
        self._reader = Reader(source, config.data.threads)
        self.waited = 0.0  # seconds the consumer has waited for the queue, in all
        on_gpu = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._queue: queue.Queue[tuple[Batch, torch.cuda.Event | None] | BaseException] = queue.Queue(
            config.data.prefetch
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)

    @property
    def corrupt_count(self) -> int:
        """Different undecodable images that this rank has met so far."""
        return len(self._corrupt)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yields one list of `accumulation` micro-batches per training step.

        Raises:
            RuntimeError: the loader was not entered: no batch would ever come.
        """
        if self._thread.ident is None:
            raise RuntimeError("a Loader makes batches only inside its with statement")
        while True:
            yield [self._take() for _ in range(self._config.train.accumulation)]

    def _take(self) -> Batch:
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        batch, ready = item
        if ready is not None:  # the stream waits, the host does not
            stream = torch.cuda.current_stream(batch.view1.device)
            stream.wait_event(ready)
            batch.view1.record_stream(stream)  # their memory was allocated on the loader's stream
            batch.view2.record_stream(stream)
        return batch

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the thread; batches made ahead are dropped."""
        self._stop.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._reader.close()

    def _produce(self) -> None:
        try:
            self._check_budget()
            if isinstance(self._backend, Resident):
                for number in sorted(self._backend.broken.keys() - self._corrupt.keys()):
                    if number % self._world_size == self._rank:  # every rank has decoded the whole data set
                        self._count_corrupt(number, self._backend.broken[number])
            with torch.cuda.stream(self._stream):  # which changes nothing where it is None
                while not self._stop.is_set():
                    for batch in self._micro_batches(self._next_step):
                        self._queue.put((batch, self._stream.record_event() if self._stream else None))
                    self._next_step += 1
        except BaseException as error:  # whatever it is, the step that waits for the batch must see it
            self._queue.put(error)

    def _micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's share of a global batch: micro-batch j of rank r is row j * ranks + r of equal rows."""
        config = self._config
        epoch, place = order.position(step, len(self._source), config.train.batch_size)
        ids = order.global_batch(
            config.run.seed, epoch, place, len(self._source), config.train.batch_size, config.data.order
        )
        rows = ids.reshape(config.train.accumulation, self._world_size, self._images)
        for micro in rows[:, self._rank]:
            yield self._make(micro, epoch)

    def _make(self, ids: npt.NDArray[np.int64], epoch: int) -> Batch:
        if isinstance(self._backend, Resident):
            ids = self._backend.sound(ids)
            return self._batch(ids, self._backend(ids, *self._draw(ids, epoch)))
        while True:
            ids, encoded = self._read_sound(ids)
            try:
                return self._batch(ids, self._backend(encoded, *self._draw(ids, epoch)))
            except UndecodableError as error:  # a sound header and broken data: known only now
                for place, reason in error.reasons.items():
                    self._count_corrupt(int(ids[place]), reason)

    def _draw(self, ids: npt.NDArray[np.int64], epoch: int) -> tuple[ViewParams, ViewParams]:
        config, source = self._config, self._source
        return draw_both(config.augment, config.run.seed, epoch, ids, source.heights[ids], source.widths[ids])

    def _batch(self, ids: npt.NDArray[np.int64], views: tuple[Tensor, Tensor]) -> Batch:
        return Batch(*views, torch.from_numpy(self._source.labels[ids]), torch.from_numpy(ids))

    def _read_sound(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[bytes]]:
        """The bytes of every id; an unsound image is replaced by the next sound one, whichever rank reads it."""
        sound, encoded = ids.copy(), []
        for place, data in enumerate(self._reader(ids.tolist(), unwanted=self._corrupt)):
            number = int(ids[place])
            while not self._is_sound(number, data):
                number = (number + 1) % len(self._source)
                data = b"" if number in self._corrupt else self._source.read(number)
            sound[place] = number
            encoded.append(data)
        return sound, encoded

    def _is_sound(self, number: int, data: bytes) -> bool:
        """Whether these bytes are what the index says of a sample; counts it if not."""
        if number in self._corrupt:
            return False
        try:
            check(data, int(self._source.heights[number]), int(self._source.widths[number]))
        except ValueError as error:
            self._count_corrupt(number, str(error))
            return False
        return True

    def _listed(self, first_step: int) -> dict[int, str]:
        """What an earlier process of this run has found; lines that a kill cut short are left out."""
        if not first_step or not self._corrupt_log or not self._corrupt_log.exists():
            return {}
        found = {}
        for line in self._corrupt_log.read_text(errors="replace").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                if row["rank"] == self._rank and 0 <= row["id"] < len(self._source):
                    found[int(row["id"])] = str(row["reason"])
        return found

    def _count_corrupt(self, number: int, reason: str) -> None:
        self._corrupt[number] = reason
        where = self._source.describe(number)
        if self._corrupt_log:
            row: dict[str, Any] = {"id": number, "where": where, "reason": reason, "rank": self._rank}
            with self._corrupt_log.open("a") as log:
                log.write(json.dumps(row) + "\n")
        self._check_budget()

    def _check_budget(self) -> None:
        """Raises CorruptBudgetError if too many images are undecodable, or none is left."""
        if len(self._corrupt) <= self._config.data.max_corrupt and len(self._corrupt) < len(self._source):
            return
        number, reason = next(reversed(self._corrupt.items()), (0, ""))
        earlier = ""
        if self._listed_before:
            earlier = (
                f"; {self._listed_before} of them were listed before this start: if they have been repaired, "
                f"remove {self._corrupt_log} to go on"
            )
        raise CorruptBudgetError(
            f"{len(self._corrupt)} undecodable images, more than data.max_corrupt={self._config.data.max_corrupt} "
            f"allows; the last: {self._source.describe(number)}: {reason}. Run tools/verify_shards.py on "
            f"{self._config.data.path}, or raise data.max_corrupt{earlier}"
        )


def plain_images(
    source: Source, ids: npt.NDArray[np.int64], config: Config, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Unaugmented images for evaluation: the centre square, resized and normalised.

    The square is the central 7/8 of the short side, rounded and placed as the reference does
    (byol/utils/dataset.py); of an image no larger than a view it is the whole short side.

    Args:
        source: labelled images; an undecodable one is left out.
        ids: which of them.
        config: size, mean and std of the run; data.threads work at a time.
        batch_size: images per batch.

    Yields:
        Images (n, 3, size, size) float32 on the CPU, channels_last, and labels (n,) int64.
    """
    mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)

    def load(number: int) -> Tensor | None:
        data = source.read(number)
        try:
            inspect(data)  # refuses what would take gigabytes to decode
            return _centre(decode(data), config.augment.size)
        except ValueError:
            return None

    with ThreadPoolExecutor(config.data.threads) as pool:
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            loaded = list(pool.map(load, part.tolist()))
            images = [image for image in loaded if image is not None]
            kept = [image is not None for image in loaded]
            if images:
                batch = (torch.stack(images) - mean) / std
                yield batch.permute(0, 3, 1, 2), torch.from_numpy(source.labels[part[kept]])


def _centre(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[:2]
    side = min(height, width)
    if side > size:
        side = int(side * 7 / 8)
    return resize_bicubic(image, (height - side + 1) // 2, (width - side + 1) // 2, side, side, size)

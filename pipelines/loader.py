"""Makes batches ahead of the training step: ids from `order`, bytes from a source, parameters from `views`, a back end.

A thread reads, checks, samples parameters and augments `data.prefetch` micro-batches ahead of the step; on a GPU it
uses a stream of its own, so that the step never queues behind the decoding of a later batch. The only state is the
number of the next step: batch k is the same in any run.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from byolt.configs.schema import Config, Profile, ViewConfig, from_settings
from byolt.files.machine import ranks_here
from byolt.files.rows import append_row, read_rows
from byolt.pipelines import order
from byolt.pipelines.backends import Backend, make_backend, make_resident
from byolt.pipelines.formats.decode import UndecodableError
from byolt.pipelines.remote.source import RemoteSource
from byolt.pipelines.resident import Resident
from byolt.pipelines.sources import ParallelReader, Source, open_source
from byolt.pipelines.subset import file_names
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import ViewParams, draw_both


class Batch(NamedTuple):
    """One micro-batch of one rank, on its device."""

    view1: Tensor  # (n, 3, size, size), normalized, channels_last
    view2: Tensor
    label: Tensor  # (n,) int64 on the CPU; -1 where the image has no label
    id: Tensor  # (n,) int64 on the CPU: sample ids


_Ids = npt.NDArray[np.int64]


class CorruptBudgetError(Exception):
    """More different images were undecodable than data.max_corrupt allows."""


class Loader:
    """Iterates over the micro-batches of one rank, endlessly, from a given step on.

    Step k of the run consists of `train.accumulation` consecutive micro-batches. The loader is a context manager: its
    thread starts on entering and stops on leaving.

    Attributes:
        waited: Seconds that the step's thread waited for a batch. On a GPU the step's stream can wait as well, unseen
            by the host: a batch is delivered as soon as its work is queued. tools/bench.py measures both, as
            the stall: loader and step together against the slower of the two alone.
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
            backend: made by `backends.make_backend` or `backends.make_resident`.
            rank: this process, 0 <= rank < world_size.
            world_size: processes that share each global batch.
            first_step: the step of the run to begin with.
            corrupt_log: file that gets a JSON line for each undecodable image, with the name of its file if the data
                set holds it. With a `first_step` above 0, the images that this rank has listed count from the start
                and are not listed again.
            device: the GPU to which the back end delivers; batches are then made on a stream of their own.

        Raises:
            ValueError: the batch is larger than the data set, or not divisible by the number of ranks.
        """
        config.check_ranks(world_size)
        self._config, self._source = config, source
        self._rank, self._world_size = rank, world_size
        self._order = order.RankOrder(
            config.run.seed, len(source), config.train.batch_size, config.data.order,
            config.train.accumulation, rank, world_size,
        )  # fmt: skip
        self._corrupt_log = corrupt_log
        self._corrupt = self._listed(first_step)
        self._listed_before = len(self._corrupt)
        self._next_step = first_step
        prove = not isinstance(backend, TorchBackend)  # which checks the pixels as it decodes
        self._reader = ParallelReader(source, config.data.threads, config.data.max_pixels, prove)
        self._ahead: float | None = None  # share of a window to plan ahead
        self.waited = 0.0
        on_gpu = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._queue: queue.Queue[tuple[Batch, torch.cuda.Event | None] | BaseException] = queue.Queue(
            config.data.prefetch
        )
        self._stop = threading.Event()
        self._backend: Callable[[Any, ViewParams, ViewParams], tuple[Tensor, Tensor]] = backend
        self._find: Callable[[_Ids], tuple[_Ids, Any]] = self._read_sound
        self._broken: Mapping[int, str] = {}  # known before the first batch
        if isinstance(backend, Resident):  # it takes ids instead of encoded images
            self._find, self._broken = backend.find, backend.broken
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)

    @property
    def corrupt_count(self) -> int:
        """Number of different undecodable images that this rank has met."""
        return len(self._corrupt)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yields one list of `accumulation` micro-batches per training step.

        Raises:
            RuntimeError: the loader was not entered, so no batch would ever come.
        """
        if self._thread.ident is None:
            raise RuntimeError("a Loader makes batches only inside its with statement")
        while True:
            yield [self._take() for _ in range(self._config.train.accumulation)]

    def stand_in(self, device: torch.device) -> list[Batch]:
        """Batches in the place of a step's that cannot be made: views of NaN, labels 0 and the ids -1."""
        numbers = torch.zeros(self._config.images_per_rank(self._world_size), dtype=torch.int64)
        size = self._config.augment.size
        views = torch.full((len(numbers), 3, size, size), torch.nan, device=device)
        return [Batch(views, views, numbers, numbers - 1)] * self._config.train.accumulation

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
        """Stops the thread and drops the batches made ahead."""
        self._stop.set()
        with self._source.interrupted() if isinstance(self._source, RemoteSource) else nullcontext():
            while self._thread.is_alive():
                with suppress(queue.Empty):
                    self._queue.get(timeout=0.05)
            self._reader.close()

    def _produce(self) -> None:
        """Runs in the thread."""
        try:
            self._check_budget()
            for number in sorted(self._broken.keys() - self._corrupt.keys()):
                if number % self._world_size == self._rank:  # every rank has decoded the whole data set
                    self._count_corrupt(number, self._broken[number])
            planned = self._next_step
            with torch.cuda.stream(self._stream):  # None changes nothing
                while not self._stop.is_set():
                    planned = self._plan(planned)
                    epoch, rows = self._order.batches(self._next_step)
                    for ids in rows:
                        batch = self._make(ids, epoch)
                        self._queue.put((batch, self._stream.record_event() if self._stream else None))
                    self._next_step += 1
        except BaseException as error:  # of any kind: the waiting step must see it
            self._queue.put(error)

    def _plan(self, step: int) -> int:
        """Announces to a remote source the samples from step `step` on to a window of the order ahead of the next step.

        Returns:
            The first step that is not announced.
        """
        if not isinstance(self._source, RemoteSource):
            return step
        window = order.window(self._config.data.order, self._config.train.batch_size)
        if self._ahead is None:
            machines = self._world_size / ranks_here()  # each has a cache
            own = window / machines if self._config.data.order == "lanes" else window
            self._ahead = self._source.share_ahead(own)
        end = self._next_step + 1 + int(self._ahead * window / self._config.train.batch_size)
        for later in range(step, end):
            self._source.plan(self._order.batches(later)[1].ravel())
        return max(step, end)

    def _make(self, ids: _Ids, epoch: int) -> Batch:
        """The batch of these samples, each damaged one replaced by the next valid one, the same one on any rank."""
        while True:
            ids, images = self._find(ids)
            try:
                views = self._backend(images, *self._draw(ids, epoch))
            except UndecodableError as error:  # a valid header, but damaged pixels
                for place, reason in error.reasons.items():
                    self._count_corrupt(int(ids[place]), reason)
            else:
                return Batch(*views, torch.from_numpy(self._source.labels[ids]), torch.from_numpy(ids))

    def _draw(self, ids: _Ids, epoch: int) -> tuple[ViewParams, ViewParams]:
        config, source = self._config, self._source
        return draw_both(config.augment, config.run.seed, epoch, ids, source.heights[ids], source.widths[ids])

    def _read_sound(self, ids: _Ids) -> tuple[_Ids, list[bytes]]:
        """The samples, after replacements, and their bytes."""
        sound, encoded = ids.copy(), []
        for place, data in enumerate(self._reader(ids.tolist(), unwanted=self._corrupt)):
            number = int(ids[place])
            while number in self._corrupt or isinstance(data, ValueError):
                if number not in self._corrupt:
                    self._count_corrupt(number, str(data))
                number = (number + 1) % len(self._source)
                data = b"" if number in self._corrupt else self._reader.read(number)
            sound[place] = number
            encoded.append(data)
        return sound, encoded

    def _listed(self, first_step: int) -> dict[int, str]:
        """The undecodable images that an earlier process of this run listed; skips lines that a kill cut short."""
        if not first_step or not self._corrupt_log:
            return {}
        rows = read_rows(self._corrupt_log, id=int, rank=int, reason=str)
        return {r["id"]: r["reason"] for r in rows if r["rank"] == self._rank and r["id"] < len(self._source)}

    def _count_corrupt(self, number: int, reason: str) -> None:
        self._corrupt[number] = reason
        where = self._source.describe(number)
        if self._corrupt_log:
            row: dict[str, Any] = {"id": number, "where": where, "reason": reason, "rank": self._rank}
            if (file := file_names(self._source)(number)) != where:
                row["file"] = file
            append_row(self._corrupt_log, row)
        self._check_budget()

    def _check_budget(self) -> None:
        """Raises CorruptBudgetError if too many images are undecodable, or all."""
        if len(self._corrupt) <= self._config.data.max_corrupt and len(self._corrupt) < len(self._source):
            return
        number, reason = next(reversed(self._corrupt.items()), (0, ""))
        earlier = ""
        if self._listed_before:
            earlier = (
                f"; {self._listed_before} of them were listed before this start: if they have been repaired, "
                f"remove {self._corrupt_log} to continue"
            )
        path, allowed = self._config.data.path, self._config.data.max_corrupt
        if len(self._corrupt) < len(self._source):
            what = f"{len(self._corrupt)} undecodable images, more than data.max_corrupt={allowed} allows"
            remedy = f"Run tools/verify_shards.py on {path}, or raise data.max_corrupt"
        else:
            what = f"all {len(self._source)} images are undecodable: none is left to train on"
            remedy = f"Run tools/verify_shards.py on {path}"
        last = f"the last: {self._source.describe(number)}: {reason}"
        raise CorruptBudgetError(f"{what}; {last}. {remedy}{earlier}")


@contextmanager
def _argument_names() -> Iterator[None]:
    """Errors name the arguments of `open_loader`, which are the settings without their section."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"(^|; )(data|augment|train|run)\.", r"\1", str(error))) from None


def open_loader(
    path: str | Path,
    batch_size: int,
    *,
    size: int = 224,
    seed: int = 0,
    view1: ViewConfig | None = None,
    view2: ViewConfig | None = None,
    profile: Profile = "byol",
    threads: int | None = None,
    max_corrupt: int = 100,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
) -> Loader:
    """A Loader for a training loop of one's own, without the config of a BYOL run.

    Args:
        path: what data.path takes: shards, a folder of images, .beton files, synthetic:COUNT:HxW.
        batch_size: images per step over all ranks.
        size: side of a view in pixels.
        seed: of the sample order and of every augmentation.
        view1: the augmentation of the first view; the paper's by default.
        view2: the augmentation of the second view; the paper's by default.
        profile: whose definitions the augmentations follow, "byol" or "torchvision".
        threads: CPU threads that read, decode and, without a GPU, augment; by default the cores, as data.threads.
        max_corrupt: undecodable images per rank that are replaced before the loader raises CorruptBudgetError.
        device: where the views are made and delivered; by default the current GPU, or the CPU without one.
        dtype: of the views: float32, float16 or bfloat16.
        rank: this process, 0 <= rank < world_size.
        world_size: processes that share each batch.
        first_step: the step to begin with; its batch is the same as in a run that began at step 0.

    Returns:
        A loader to be used in a with statement. Each step is a list of one Batch: `for (batch,) in loader`.

    Raises:
        ValueError: the data set cannot be opened, or batch_size or dtype is not valid.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} must be float32, float16 or bfloat16")
    with _argument_names():
        config = from_settings(
            {
                "data": {"path": str(path), "max_corrupt": max_corrupt}
                | ({} if threads is None else {"threads": threads}),
                "augment": {
                    "profile": profile,
                    "size": size,
                    "view1": view1 or ViewConfig(blur=1.0, solarize=0.0),
                    "view2": view2 or ViewConfig(blur=0.1, solarize=0.2),
                },
                "train": {"batch_size": batch_size, "epochs": 1},
                "run": {"out": "", "seed": seed},
                # The rest is not read by a loader.
                "model": {},
                "optimizer": {"base_lr": 0, "warmup_epochs": 0, "weight_decay": 0, "base_tau": 1},
            }
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = open_source(config.data.path, config.data)
    with _argument_names():  # refuses a batch larger than the data set before any work
        order.check_batch_size(len(source), batch_size)
    backend, _ = make_resident(config, source, where, dtype) or make_backend(config, where, dtype)
    return Loader(
        config, source, backend, rank=rank, world_size=world_size, first_step=first_step, device=where
    )

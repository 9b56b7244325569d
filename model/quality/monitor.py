"""Measures the kNN accuracy of a running training."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from byolt.configs.schema import Config
from byolt.files.console import difference
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.quality import features, scores
from byolt.model.quality.knn import knn_accuracy


class Labeled(Protocol):
    """A data set with labels (len,) int64, -1 for an unlabeled image, and the names of its classes, if known."""

    labels: np.ndarray
    classes: list[str] | None

    def __len__(self) -> int: ...


class KnnMonitor:
    """Measures kNN top-1 of eval.path with data.path as the bank; the ranks share the images."""

    def __init__(
        self,
        config: Config,
        bank: Labeled,
        queries: Labeled,
        world: World,
        images: Callable[[Any, np.ndarray, Config, int], Iterable[tuple[Tensor, Tensor]]],
        spaced: Callable[[int, int], np.ndarray],
    ) -> None:
        """
        Args:
            config: of the run.
            bank: data.path.
            queries: eval.path.
            world: the ranks, which share the images.
            images: (data set, ids, config, batch size) -> batches of images (n, 3, H, W) with labels (n,).
            spaced: (total, count) -> evenly spaced ids.

        Raises:
            ValueError: kNN cannot compare the data sets.
        """
        if len(queries) < world.size:
            raise ValueError(
                f"eval.path={config.eval.path} holds {len(queries)} images for {world.size} ranks: use more images"
            )
        for key, split in (("data.path", bank), ("eval.path", queries)):
            if (split.labels < 0).any():
                raise ValueError(
                    f"{key} holds unlabeled images, and kNN needs labels in both data sets: set eval.path=null, and "
                    "evaluate the encoder with tools/evaluate.py --train LABELED --data LABELED"
                )
        if bank.labels.min() == bank.labels.max():
            raise ValueError(
                f"data.path={config.data.path}: all {len(bank)} images are of one class, so kNN top-1 would be 100 % "
                "for any encoder: set eval.path=null, or sort the images into two class folders or more"
            )
        self._num_classes = scores.num_classes(bank.labels, queries.labels)
        if bank.classes and queries.classes and bank.classes != queries.classes:
            raise ValueError(
                f"eval.path={config.eval.path} has other classes than data.path={config.data.path}: "
                f"{difference('eval.path', queries.classes, 'data.path', bank.classes)}"
            )
        self._config, self._bank, self._queries, self._world = config, bank, queries, world
        self._images, self._spaced = images, spaced

    def __call__(self, encoder: nn.Module, calibrate: bool) -> float:
        """Returns kNN top-1 in percent; NaN if a feature is not finite.

        Args:
            encoder: the same on every rank.
            calibrate: first average the batch-norm statistics over 2,048 images, in a copy. An untrained encoder has
                no statistics, and without them the comparison would flatter the trained one.
        """
        if calibrate:
            encoder = copy.deepcopy(encoder)
            ranks = self._world.size
            batch = max(2, 256 // ranks)  # batch norm needs 2 images
            whole, count = batch * ranks, min(2048, len(self._bank))
            # Only whole batches, equally many on every rank, so that all count the same; with fewer images one batch.
            count = count // whole * whole or count // ranks * ranks
            features.calibrate_batch_norm(encoder, self._share(self._bank, count, batch))
        bank, bank_labels = self._features(encoder, self._bank)
        queries, labels = self._features(encoder, self._queries)
        if not (bank.isfinite().all() and queries.isfinite().all()):
            return math.nan
        k, temperature = self._config.eval.k, self._config.eval.temperature
        return 100 * knn_accuracy(bank, bank_labels, queries, labels, self._num_classes, k, temperature)

    def _features(self, encoder: nn.Module, split: Labeled) -> list[Tensor]:
        """Features and labels of eval.max_images images, gathered from all ranks."""
        mine = features.extract_features(encoder, self._share(split, self._config.eval.max_images))
        return [distributed.gather_rows(part, self._world) for part in mine]

    def _share(self, split: Labeled, count: int, batch: int = 256) -> Iterable[tuple[Tensor, Tensor]]:
        """This rank's share of `count` evenly spaced images of a data set."""
        ids = self._spaced(len(split), count)[self._world.rank :: self._world.size]
        return self._images(split, ids, self._config, batch)

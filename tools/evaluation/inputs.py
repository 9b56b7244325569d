"""The inputs of an evaluation: labeled data sets, checked before any work; an untrained encoder."""

import numpy as np
import torch

from byolt.configs.schema import DataConfig
from byolt.files.console import count, difference
from byolt.model.quality import scores
from byolt.model.resnet import make_encoder
from byolt.model.run.trained import Trained
from byolt.pipelines.sources import Source, open_split
from byolt.pipelines.subset import Subset, random_ids


def open_labeled(
    option: str, path: str | None, limit: int | None, settings: DataConfig | None = None
) -> Source:
    """Opens a data set in which every image has a label, or a random part of it with at most `limit` images."""
    if path is None:
        raise ValueError(f"{option} is needed: the run that made this encoder names no labeled data")
    source = open_split(option, path, settings)
    if (source.labels < 0).any():
        raise ValueError(f"{option} {path} holds unlabeled images: give a data set with classes")
    if limit and limit < len(source):
        return Subset(source, random_ids(len(source), limit))
    return source


def check_splits(train_path: str, train: Source, test_path: str, test: Source) -> str:
    """Refuses data sets that do not fit each other.

    Returns:
        A warning with the number of test images that are also training images, byte for byte; "" if there is none, or
        the images of one data set have no checksums.

    Raises:
        ValueError: classes differ, a label is too large to be a class, there is one class only, or every test image is
            a training image.
    """
    if train.classes and test.classes and train.classes != test.classes:
        raise ValueError(
            f"--train {train_path} has other classes than --data {test_path}: "
            f"{difference('--train', train.classes, '--data', test.classes)}"
        )
    scores.num_classes(train.labels, test.labels)
    if train.labels.min() == train.labels.max():
        raise ValueError(
            f"--train {train_path}: all {len(train)} images are of one class: give a data set with two classes or more"
            + " or raise --max-images" * isinstance(train, Subset)
        )
    same, shared = train.fingerprint == test.fingerprint, 0
    if train.checksums is not None and test.checksums is not None:
        shared = int(np.isin(test.checksums, train.checksums).sum())
    if same or shared == len(test):
        raise ValueError(
            f"--train {train_path} and --data {test_path} hold the same images, so the encoder would be tested on its "
            "training data: name another data set (tools/make_shards.py --split train=.9,val=.1 makes two)"
        )
    if not shared:
        return ""
    found = f"{shared:,} of the {count(len(test), 'image')} of --data {test_path}"
    return f"warning: {found} are also in --train {train_path}, byte for byte: part of the test is on training data"


def number_classes(train: Source, test: Source) -> None:
    """Renumbers labels beyond the named classes in their order, so that only those that occur count as classes.

    A single label of 99,999 would make a confusion matrix of 80 GB.
    """
    names = test.classes or train.classes or []
    beyond = np.unique(np.concatenate([train.labels, test.labels]))
    beyond = beyond[beyond >= len(names)]
    for source in (train, test):
        place = len(names) + np.searchsorted(beyond, source.labels)
        source.labels = np.where(source.labels < len(names), source.labels, place)
        source.classes = [*names, *map(str, beyond.tolist())]


def untrained(trained: Trained, seed: int) -> Trained:
    """The same network with fresh weights, which have no digest."""
    model, size = trained.config.model, trained.config.augment.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make_encoder(model.backbone, model.stem, size)
    return trained._replace(encoder=encoder.eval(), step=0, digest="")

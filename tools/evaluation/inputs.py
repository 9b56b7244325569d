"""The inputs of an evaluation: options and labeled data sets, checked before any work; an untrained encoder."""

import argparse
import itertools
import math
from typing import Any

import numpy as np
import torch

from byolt.files.console import difference
from byolt.model.quality import scores
from byolt.model.resnet import make_encoder
from byolt.model.run.trained import Trained
from byolt.pipelines.sources import Source, open_source
from byolt.pipelines.subset import Subset, drawn

OPTIONS = {  # of each protocol, beside the options of all
    "knn": ("k", "temperature"),
    "linear": ("lr", "epochs", "batch_size", "fast"),
    "finetune": ("lr", "epochs", "batch_size", "labels", "subset"),
    "transfer": ("l2", "max_iterations"),
}


def check_options(args: argparse.Namespace) -> None:
    """Refuses options that do not go together or are out of range, before anything is read.

    Raises:
        ValueError: names the option and the remedy.
    """
    for option in dict.fromkeys(itertools.chain(*OPTIONS.values())):
        having = [protocol for protocol, options in OPTIONS.items() if option in options]
        if getattr(args, option) is not None and args.protocol not in having:
            name = option.replace("_", "-")
            raise ValueError(
                f"--{name} is an option of --protocol {' and '.join(having)}, not {args.protocol}"
            )
    limits = dict.fromkeys(("max_images", "k", "temperature", "lr", "epochs", "max_iterations", "batch_size"))
    for option, most in (limits | {"threads": 1024, "l2": 10_000}).items():
        given: Any = getattr(args, option)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{option.replace('_', '-')} {value} must be a number more than 0")
            if value is not None and most and value > most:
                raise ValueError(f"--{option} {value} must be at most {most}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be at least 0 and below 2**63")
    if args.protocol == "finetune" and (args.labels is None) == (args.subset is None):
        raise ValueError("--protocol finetune needs --labels 0.01, 0.1 or 1.0, or --subset FILE")
    if args.protocol == "linear" and len(args.epochs or [80]) > 1:
        raise ValueError("--epochs: the linear protocol takes one number")
    if args.subset and args.max_images:
        raise ValueError("--subset cannot be combined with --max-images, which renumbers the samples")


def open_labeled(option: str, path: str | None, limit: int | None) -> Source:
    """Opens a data set in which every image has a label, or a random part of it with at most `limit` images."""
    if path is None:
        raise ValueError(f"{option} is needed: the run that made this encoder names no labeled data")
    try:
        source = open_source(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    if (source.labels < 0).any():
        raise ValueError(f"{option} {path} holds unlabeled images: give a data set with classes")
    if limit and limit < len(source):
        return Subset(source, drawn(len(source), limit))
    return source


def check_splits(train_path: str, train: Source, test_path: str, test: Source) -> None:
    """Refuses data sets that do not fit each other.

    Raises:
        ValueError: classes differ, a label is too large to be a class, there is one class only, or both data sets hold
            the same images.
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
    if train.fingerprint == test.fingerprint:
        raise ValueError(
            f"--train {train_path} and --data {test_path} hold the same images, so the encoder would be tested on its "
            "training data: name another data set (tools/make_shards.py --split train=.9,val=.1 makes two)"
        )


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
    model = trained.config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = make_encoder(model.backbone, model.stem)
    return trained._replace(encoder=encoder.eval(), step=0, digest="")

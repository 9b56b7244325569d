"""The curves of reports: which numbers of metrics.jsonl are drawn, and how to read them."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Curve(NamedTuple):
    """One figure of curves over the steps."""

    title: str
    keys: dict[str, str]  # of metrics.jsonl, with the names of the curves
    unit: str
    caption: str
    # Value and name of a dashed line, by the projector's size D: the value of vectors that are spread over the sphere.
    spread: Callable[[int], tuple[float, str]] | None = None


_GAUGES = {"prediction": "prediction", "projection": "target's projection"}
CURVES = (
    Curve("Loss", {"loss": "loss"}, "loss", "4: predictions and targets are unrelated; 0: they agree."),
    Curve(
        "Accuracy",
        {"knn_top1": "kNN, held-out images", "probe_top1": "online probe, training images"},
        "top-1, percent",
        "Of classifiers on the encoder's features, which do not change the encoder. They answer different questions. "
        "kNN: the nearest training images vote on unaugmented images that the network was not trained on. Probe: a "
        "linear classifier that learns beside the network, tested on each batch of augmented training images before "
        "it learns from it.",
    ),
    Curve("Learning rate", {"lr": "learning rate"}, "learning rate", "Before LARS scales it for each layer."),
    Curve("tau", {"tau": "tau"}, "tau", "The target network keeps this share of its weights at each step."),
    Curve("Speed", {"images_per_second": "speed"}, "images/s", "Training only, over all ranks."),
    Curve("Waiting for data", {"data_wait_percent": "waiting"}, "percent", "Share of the time."),
    Curve(
        "Collapse: spread",
        {f"{key}_std": name for key, name in _GAUGES.items()},
        "std",
        "Of each normalized dimension over a batch: 0 if collapsed, 1/√D if spread over the sphere.",
        lambda size: (1 / math.sqrt(size), "1/√D"),
    ),
    Curve(
        "Collapse: cosine",
        {f"{key}_cosine": name for key, name in _GAUGES.items()},
        "mean |cosine|",
        "Between different images: 1 if collapsed, √(2/πD) if spread over the sphere.",
        lambda size: (math.sqrt(2 / (math.pi * size)), "√(2/πD)"),
    ),
    Curve("Gradient", {"gradient_norm": "gradient norm"}, "norm", "Over all parameters, before LARS."),
)

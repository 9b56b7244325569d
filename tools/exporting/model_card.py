"""Writes the model card, README.md of an export: recipe, measured accuracies, and how to load the encoder.

Names from settings and files enter the Markdown as code on one line, so that they cannot act as markup. Of an
absolute path only the last part is published.
"""

import json
import re
from pathlib import Path
from typing import Any

from byolt.configs import schema
from byolt.files.regular import read_regular
from byolt.files.rows import read_metrics
from byolt.model.run.trained import Trained
from byolt.tools.reporting.run import training_images


def public(config: schema.Config) -> schema.Config:
    """The config without the folders of the machine that trained."""
    run = config.run.model_copy(update={"out": _public_path(config.run.out), "mirror": None})
    data = config.data.model_copy(update={"path": _public_path(config.data.path), "cache": None})
    path = config.eval.path and _public_path(config.eval.path)
    init_from = config.model.init_from and _public_path(config.model.init_from)
    model = config.model.model_copy(update={"init_from": init_from})
    evaluation = config.eval.model_copy(update={"path": path})
    return config.model_copy(update={"run": run, "data": data, "model": model, "eval": evaluation})


def model_card(trained: Trained, library: str, loading: str, resizing: str) -> str:
    """The text of the card, for a library by its name on the Hugging Face hub.

    `loading` are lines of Python that load the encoder; `resizing` is a sentence about the preprocessing, or "".
    """
    config = public(trained.config)
    measured = "\n".join([*_evaluated(trained), *_during_training(trained)]) or "Not measured."
    images = training_images(_rows(trained), config.train.batch_size)
    recipe = schema.to_yaml(config).rstrip()
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", recipe))])  # longer than any inside
    size, mean, std = config.augment.size, list(config.augment.mean), list(config.augment.std)
    return f"""---
library_name: {library}
tags: [image-feature-extraction, self-supervised, byol]
---
# {config.model.backbone}, pre-trained with BYOL

The online encoder of a BYOL run ([arXiv 2006.07733](https://arxiv.org/abs/2006.07733)), without projector and
predictor: images to {trained.encoder.num_features} features. Trained without labels.

- Images: {_code(config.data.path)}{f", {images:,} images (from metrics.jsonl)" if images else ""}
- Length: {_epochs_done(trained)}
- Weights at the start: {_code(config.model.init_from) if config.model.init_from else "random"}
- Stem: {config.model.stem}; views of {size} px
- Preprocessing: center crop of 7/8 of the short side, or of all of it if that is {size} px or less; bicubic to
  {size} px without antialiasing (torchvision's and timm's transforms of PIL images antialias when they shrink:
  numbers may differ slightly); values in 0 .. 1, minus {mean}, divided by {std}.{resizing and " " + resizing}
- sha256 of the weights: `{trained.digest}`

## Measured

{measured}

## Load

```python
{loading}
```

## Recipe

{fence}yaml
{recipe}
{fence}
"""


def _evaluated(trained: Trained) -> list[str]:
    """Results of tools/evaluate.py beside the checkpoint whose sha256 is that of these weights."""
    lines = []
    for path in sorted(trained.path.parent.glob("evaluate-*.json")):
        try:
            document = json.loads(read_regular(path))
            if document["encoder_sha256"] == trained.digest:
                lines += [_result(document, result) for result in document["results"] if "top1" in result]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a result of tools/evaluate.py ({error}): remove it") from None
    return lines


def _result(document: dict[str, Any], result: dict[str, Any]) -> str:
    tops = [_percent(result, f"top{k}") for k in (1, 5) if f"top{k}" in result]
    test, train = document["test"], document["train"]
    learned = "bank" if document["protocol"] == "knn" else "training set"
    return (
        f"- {_code(document['protocol'])}, {_code(result['name'])}: {', '.join(tops)}; {result['images']:d} images of "
        f"{_code(_public_path(test['path']))}; {learned}: {train['images']:d} images of "
        f"{_code(_public_path(train['path']))}"
    )


def _percent(result: dict[str, Any], name: str) -> str:
    value, (low, high) = result[name], result[f"{name}_interval"]
    if not all(0 <= number <= 100 for number in (value, low, high)):
        raise ValueError(f"{name} or its interval is not between 0 and 100")
    return f"{name.replace('top', 'top-')} {value:.2f} % ({low:.2f} to {high:.2f})"


def _during_training(trained: Trained) -> list[str]:
    """The kNN accuracy of the run itself. metrics.jsonl does not identify weights; the line states this."""
    config = public(trained.config)
    rows = [row for row in _rows(trained) if "knn_top1" in row]
    if not rows:
        return []
    sets = f" of {_code(config.eval.path or '')}; bank: {_code(config.data.path)}" if config.eval.path else ""
    return [
        f"- kNN during training (k = {config.eval.k}, temperature {config.eval.temperature:g}): top-1 "
        f"{rows[-1]['knn_top1']:.2f} %; at most {config.eval.max_images} images{sets}. "
        f"From metrics.jsonl beside the checkpoint, step {trained.step}: not checked to be of these weights"
    ]


def _epochs_done(trained: Trained) -> str:
    """Length of the training; the epochs are known only if metrics.jsonl is beside the checkpoint."""
    epochs, train = [row["epoch"] for row in _rows(trained) if "epoch" in row], trained.config.train
    planned = f"{train.epochs:g} epochs"
    done = f"{epochs[-1]:.1f} of {planned} (from metrics.jsonl)" if epochs else f"planned: {planned}"
    return f"{trained.step} steps of {train.batch_size} images; {done}"


def _rows(trained: Trained) -> list[dict[str, float]]:
    """Rows of the checkpoint's step in the metrics.jsonl beside it."""
    rows = read_metrics(trained.path.parent / "metrics.jsonl")
    return [row for row in rows if row["step"] == trained.step]


def _public_path(path: str) -> str:
    """A path inside the folder where training was started, or the last part of any other path."""
    parts = [part.strip() for part in path.split(",")]  # .beton files
    private = any(part.startswith(("/", "~")) or "://" in part or ".." in Path(part).parts for part in parts)
    return ",".join(Path(part).name for part in parts) if private else path


def _code(text: str) -> str:
    """The text as code on one line: Markdown and HTML give its characters no meaning."""
    line = " ".join(str(text).split()).replace("`", "'")
    return f"`{''.join(character for character in line if character.isprintable())}`"

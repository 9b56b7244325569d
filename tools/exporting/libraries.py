"""Writes the files that torchvision, timm and transformers load, and checks that they give the encoder's features."""

import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from byolt.configs import schema
from byolt.model.resnet import RESNET8_WIDTHS
from byolt.model.run.trained import Trained, export_trained
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.sources import open_source
from byolt.pipelines.subset import spaced
from byolt.tools.exporting.model_card import model_card, public

Features = Callable[[Tensor], Tensor]  # normalized images (N, 3, H, W) -> (N, F)
LIBRARIES = {"torchvision": "torchvision", "timm": "timm", "huggingface": "transformers"}
TOLERANCE = 1e-5  # relative to the largest feature; other kernels may round differently


def export(trained: Trained, target: str, out: Path) -> list[str]:
    """Writes the files for a library of LIBRARIES, checks them, and only then gives the folder its name.

    Returns:
        One sentence for each check.

    Raises:
        ValueError: the library has no such network, `out` exists, or the encoder is broken or has collapsed.
        RuntimeError: the written files do not give the encoder's features; they are removed.
    """
    check_architecture(trained, target)
    if out.exists():
        raise ValueError(f"--out {out} exists: name a new folder")
    check_alive(trained)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        export_trained(folder / "model.safetensors", trained.encoder, public(trained.config), trained.step)
        resizing = ""
        if target != "torchvision":
            crop, resizing = crop_of(trained.config)
            text = json.dumps(timm_config(trained, target, crop), indent=2)
            (folder / "config.json").write_text(text + "\n")
        card = model_card(trained, LIBRARIES[target], usage(trained, target), resizing)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
        own = target if trained.config.model.backbone.startswith(schema.TIMM) else "torchvision"
        checks = [check_equal(trained, folder, library) for library in dict.fromkeys((own, target))]
        folder.rename(out)
    return checks


def check_architecture(trained: Trained, target: str) -> None:
    """Refuses an encoder that the library cannot build.

    Raises:
        ValueError: names the setting and the remedy.
    """
    model = trained.config.model
    if model.backbone in RESNET8_WIDTHS:
        raise ValueError(
            f"model.backbone={model.backbone} is this project's own network, which {LIBRARIES[target]} does not have: "
            "load encoder.safetensors with byolt's load_trained, or train another backbone"
        )
    if model.backbone.startswith(schema.TIMM) and target == "torchvision":
        raise ValueError(
            f"model.backbone={model.backbone} is a network of timm: use --to timm or --to huggingface"
        )
    if model.stem == "cifar" and target != "torchvision":
        raise ValueError(
            f"model.stem=cifar: timm, which --to {target} uses, builds {model.backbone} with the 7x7 stem only: use "
            "--to torchvision"
        )


@torch.no_grad()
def check_alive(trained: Trained) -> None:
    """Refuses an encoder that gives all images the same features.

    Raises:
        ValueError: names the file.
    """
    one, other = trained.encoder(_noise(trained.config))
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError(
            f"{trained.path}: its features are not finite, the encoder is broken: export another"
        )
    if (one - other).abs().max() <= TOLERANCE * one.abs().max():
        raise ValueError(f"{trained.path}: the encoder has collapsed, all images have the same features")


@torch.no_grad()
def check_equal(trained: Trained, folder: Path, target: str) -> str:
    """Loads the written files as their users will, and compares features.

    Returns:
        One sentence: the difference, or that the library is not installed.

    Raises:
        RuntimeError: the features differ, or the library refuses the files.
    """
    try:
        loaded = LOADERS[target](folder, trained)
    except ImportError as error:
        return f"not checked with {LIBRARIES[target]}: {error} (pip install -e '.[export]')"
    images = _noise(trained.config)
    expected, found = trained.encoder(images), loaded(images)
    if found.shape != expected.shape:
        raise RuntimeError(
            f"{target} gives features of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{target} gives other features than the encoder: relative difference {difference:.2g}"
        )
    return f"checked with {LIBRARIES[target]}: largest relative difference of a feature: {difference:.2g}"


def _noise(config: schema.Config) -> Tensor:
    """Two different images (2, 3, size, size)."""
    size = config.augment.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _load_torchvision(folder: Path, trained: Trained) -> Features:
    network = torchvision.models.get_model(trained.config.model.backbone, weights=None)
    network.fc = nn.Identity()
    if trained.config.model.stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval()


def _load_timm(folder: Path, trained: Trained) -> Features:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _load_transformers(folder: Path, trained: Trained) -> Features:
    import timm  # noqa: F401 -- transformers wraps it; without it transformers fails later and less clearly
    from transformers import AutoModel

    network = AutoModel.from_pretrained(folder).eval()
    return lambda images: network(pixel_values=images).pooler_output


LOADERS = {"torchvision": _load_torchvision, "timm": _load_timm, "huggingface": _load_transformers}


def crop_of(config: schema.Config) -> tuple[float, str]:
    """timm's crop_pct. It is one number for all images, whereas ours depends on the image (see `plain_images`).

    Returns:
        The number that is right for most of 100 images of eval.path or data.path, and a sentence about it.
    """
    sides = []
    with suppress(ValueError, OSError):
        source = open_source(config.eval.path or config.data.path, config.data.on_demand)
        for number in spaced(len(source), 100):
            with suppress(ValueError):  # the evaluation leaves it out, too
                header = inspect(source.read(int(number)))
                sides.append(min(header.height, header.width))
    small = bool(sides) and statistics.median(sides) <= config.augment.size
    found = f"most evaluation images are {'no larger' if small else 'larger'} than a view"
    crop = 1.0 if small else 0.875
    found = found if sides else "the evaluation images were not available"
    return crop, f"config.json has crop_pct {crop:g}: {found}."


def timm_config(trained: Trained, target: str, crop: float) -> dict[str, Any]:
    """config.json for timm's `local-dir:` and `hf-hub:`; for transformers with the type of its wrapper around timm."""
    augment, model = trained.config.augment, trained.config.model
    own = getattr(trained.encoder, "pretrained_cfg", {})  # a network of timm states its first and last layer
    config: dict[str, Any] = {
        "architecture": model.backbone.removeprefix(schema.TIMM),
        "num_classes": 0,
        "num_features": int(trained.encoder.num_features),  # type: ignore[arg-type]
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [3, augment.size, augment.size],
            "interpolation": "bicubic",
            "crop_pct": crop,
            "mean": list(augment.mean),
            "std": list(augment.std),
            "num_classes": 0,
            "pool_size": [(augment.size + 31) // 32] * 2,
            "first_conv": own.get("first_conv", "conv1"),
            "classifier": own.get("classifier", "fc"),
        },
    }
    if own:
        del config["global_pool"]  # its own, which model_args could change
        config["model_args"] = trained.encoder.timm_arguments
    if target == "huggingface":
        config |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}
    return config


_USAGE = {
    "timm": """import timm

model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()  # or hf-hub:NAME""",
    "huggingface": """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained('FOLDER')
model = AutoModel.from_pretrained('FOLDER')
features = model(**processor(image)).pooler_output""",
    "torchvision": """import torch, torchvision
from safetensors.torch import load_file

model = torchvision.models.{backbone}()
model.fc = torch.nn.Identity()
{stem}model.load_state_dict(load_file('model.safetensors'))
model.eval()""",
}
_CIFAR_STEM = """model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
model.maxpool = torch.nn.Identity()
"""


def usage(trained: Trained, target: str) -> str:
    """Lines of Python that load the encoder."""
    model = trained.config.model
    stem = _CIFAR_STEM if model.stem == "cifar" else ""
    return _USAGE[target].format(backbone=model.backbone, stem=stem)

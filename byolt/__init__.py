"""BYOL self-supervised pre-training in which the data pipeline is the product.

This folder holds links to the folders beside it. Every module therefore has one name, `byolt.pipelines.loader`, in a
checkout and installed, and nothing else enters the import path of its users.

The names below are the public API (docs/api.md). Importing `byolt` imports nothing else: torch follows when a name is
first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byolt.model.byol import BYOL, byol_loss
    from byolt.model.quality.features import extract_features
    from byolt.model.run.trained import load_trained
    from byolt.pipelines.loader import open_loader
    from byolt.pipelines.plain import plain_images
    from byolt.pipelines.sources import open_source

__version__ = "0.1.0"

__all__ = [
    "BYOL",
    "byol_loss",
    "extract_features",
    "load_trained",
    "open_loader",
    "open_source",
    "plain_images",
]

_MODULES = {
    "BYOL": "byolt.model.byol",
    "byol_loss": "byolt.model.byol",
    "extract_features": "byolt.model.quality.features",
    "load_trained": "byolt.model.run.trained",
    "open_loader": "byolt.pipelines.loader",
    "open_source": "byolt.pipelines.sources",
    "plain_images": "byolt.pipelines.plain",
}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name when the name is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'byolt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])

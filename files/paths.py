"""Paths as people type them."""

import os
from pathlib import Path


def home_path(text: str) -> Path:
    """The path with a leading ~ expanded, which shells leave as it is in --out=~/x; a type for argparse."""
    return Path(os.path.expanduser(text))  # Path.expanduser refuses a ~ without such a user

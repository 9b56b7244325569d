"""Decodes one encoded image without DALI, by PIL."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from byolt.files.console import shown
from byolt.pipelines.formats.encoded import for_pil


class UndecodableError(Exception):
    """Some images of a batch do not decode: `reasons` maps their place in the batch to the reason."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(shown((f"image {i} of the batch: {reason}" for i, reason in reasons.items()), "; "))
        self.reasons = reasons


def decode(encoded: bytes) -> Tensor:
    """Decodes an image to uint8 (H, W, 3).

    Gray becomes three equal channels, 16 bits become the high byte, and EXIF orientation is ignored.

    Raises:
        ValueError: it does not decode.
    """
    try:
        with Image.open(io.BytesIO(for_pil(encoded))) as image:
            if image.mode.startswith("I;16"):  # PIL would clip 16-bit gray at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"does not decode: {error}") from None

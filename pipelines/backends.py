"""Chooses the back end that makes the views: DALI or torch (data.backend), or the decoded data set in memory."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.files.console import count
from byolt.pipelines.resident import Resident, is_wanted
from byolt.pipelines.sources import Source
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import ViewParams


class Backend(Protocol):
    """Decodes and augments: makes both views of N encoded images."""

    def __call__(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]:
        """Decodes each of N images, which passed `formats.encoded.inspect`, once and makes both views of it.

        Returns:
            Two normalized (N, 3, size, size) tensors in channels_last memory on the device; on a GPU they are ready
            when the current stream reaches this point.

        Raises:
            UndecodableError: names the images of the batch that do not decode. The back end stays usable.
        """
        ...


def make_backend(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """Returns the back end that data.backend selects, and a sentence that names it and the reason.

    Raises:
        ValueError: data.backend is dali, and DALI is not installed.
    """
    choice, threads = config.data.backend, config.data.threads
    reason = f"data.backend={choice}: torch on the CPU, {count(threads, 'thread')}"
    if choice != "torch":
        try:
            from byolt.pipelines.dali_backend import DaliBackend
        except ImportError as error:
            how = "pip install -e '.[dali]' (torch for CUDA 12) or '.[dali-cuda130]' (CUDA 13)"
            if choice == "dali":
                raise ValueError(f"data.backend=dali needs NVIDIA DALI ({error}): {how}") from None
            reason = f"data.backend=auto: torch on the CPU, because DALI is not installed; {how}"
        else:
            why = " (it is installed)" if choice == "auto" else ""
            reason = f"data.backend={choice}: DALI on the {_place(device)}, {count(threads, 'thread')}{why}"
            load = config.data.hw_decoder_load
            return DaliBackend(config.augment, device, dtype, threads, load), reason
    return TorchBackend(config.augment, device, dtype, threads), reason


def make_resident(
    config: Config, source: Source, device: torch.device, dtype: torch.dtype
) -> tuple[Resident, str] | None:
    """Returns the decoded data set in memory and a sentence about it, or None if the images stay encoded.

    data.resident decides; data.backend=torch always decodes anew.

    Raises:
        ValueError: no image decodes, or the pixels do not fit into memory.
    """
    if config.data.backend == "torch" or not is_wanted(config.data, source):
        return None
    resident = Resident(source, config.augment, device, dtype, config.data.threads, config.data.max_pixels)
    kept = f"all {len(source)} images decoded in the {_place(device)}'s memory, and views made there"
    return resident, f"data.resident={config.data.resident}: {kept}"


def _place(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"

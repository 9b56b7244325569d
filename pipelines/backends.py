"""Which back end makes the views: data.backend's, or the data set in memory, and the sentence that says so."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.pipelines.resident import Resident, is_wanted
from byolt.pipelines.sources import Source
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import ViewParams


class Backend(Protocol):
    """What decodes and augments: both views of N encoded images, as TorchBackend documents it."""

    def __call__(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]: ...


def make_backend(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The back end that data.backend asks for, and one sentence that says which it is and why.

    Raises:
        ValueError: data.backend is dali, and DALI is not installed.
    """
    choice, threads = config.data.backend, config.data.threads
    if choice != "torch":
        try:
            from byolt.pipelines.dali_backend import DaliBackend
        except ImportError as error:
            how = "pip install -e '.[dali]' (torch for CUDA 12) or '.[dali-cuda130]' (CUDA 13)"
            if choice == "dali":
                raise ValueError(f"data.backend=dali needs NVIDIA DALI ({error}): {how}") from None
            reason = f"data.backend=auto: torch on the CPU, because DALI is not installed; {how}"
            return TorchBackend(config.augment, device, dtype, threads), reason
        why = ", because it is installed" if choice == "auto" else ""
        reason = f"data.backend={choice}: DALI on the {_place(device)}{why}, {threads} threads"
        return DaliBackend(config.augment, device, dtype, threads), reason
    reason = f"data.backend=torch: torch on the CPU, {threads} threads"
    return TorchBackend(config.augment, device, dtype, threads), reason


def make_resident(
    config: Config, source: Source, device: torch.device, dtype: torch.dtype
) -> tuple[Resident, str] | None:
    """The decoded data set in memory and one sentence about it; None where the images are to stay encoded.

    Args:
        config: the run; data.resident decides, and data.backend=torch keeps no images.
        source: the data set.
        device: where the views are made and delivered.
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: no image decodes, or they do not fit into the memory.
    """
    if config.data.backend == "torch" or not is_wanted(config.data, source):
        return None
    resident = Resident(source, config.augment, device, dtype, config.data.threads)
    kept = f"all {len(source)} images decoded in the {_place(device)}'s memory, and views made there"
    return resident, f"data.resident={config.data.resident}: {kept}"


def _place(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"

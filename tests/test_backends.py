"""The choice of a back end, and what the log says about it."""

import sys

import pytest
import torch
from test_loader import make_config

from byolt.pipelines.backends import make_backend


def test_backend_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "byolt.pipelines.dali_backend", None)  # import fails
    _, reason = make_backend(make_config(data={"backend": "auto"}), torch.device("cpu"), torch.float32)
    assert "torch on the CPU, because DALI is not installed" in reason and "-e '.[dali]'" in reason
    with pytest.raises(ValueError, match=r"data\.backend=dali needs NVIDIA DALI"):
        make_backend(make_config(data={"backend": "dali"}), torch.device("cpu"), torch.float32)


def test_back_end_says_what_it_is() -> None:
    pytest.importorskip("byolt.pipelines.dali_backend", reason="NVIDIA DALI is not installed")
    for choice, why in {"auto": " (it is installed)", "dali": ""}.items():
        _, reason = make_backend(make_config(data={"backend": choice}), torch.device("cpu"), torch.float32)
        assert reason == f"data.backend={choice}: DALI on the CPU, 1 thread{why}"

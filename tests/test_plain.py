"""Images without augmentation, for evaluation."""

import numpy as np
import pytest
import torch
from test_loader import Damaged, bad_images, make_config

from byolt.pipelines.formats.decode import decode
from byolt.pipelines.plain import plain_images
from byolt.pipelines.torch_backend import resize_bicubic


def test_evaluation_refuses_a_bomb_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "byolt.pipelines.plain.decode", lambda data: pytest.fail("decoded") if data == bomb else decode(data)
    )
    bomb = bad_images()["400 Mpx"]
    (batch,) = plain_images(Damaged({2: lambda _: bomb}), np.array([0, 2, 1]), make_config())
    assert len(batch[0]) == 2


def test_plain_images_are_the_center() -> None:
    """A 20 x 30 image at size 8: the central 17 x 17 pixels (7/8 of the short side), resized."""
    source, config = Damaged({2: lambda _: b""}), make_config()
    pixels, labels = zip(*plain_images(source, np.array([0, 2, 1]), config, batch_size=2), strict=True)
    assert [len(p) for p in pixels] == [1, 1]  # the broken one is left out
    assert torch.cat(labels).tolist() == source.labels[[0, 1]].tolist()
    expected = resize_bicubic(decode(source.read(1)), 2, 7, 17, 17, 8)
    mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)
    assert torch.allclose(pixels[1][0].permute(1, 2, 0), (expected - mean) / std, atol=1e-6)

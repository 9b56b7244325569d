"""Images without augmentation, for evaluation."""

import numpy as np
import pytest
import torch
from test_loader import Damaged, bad_images, make_config

from byolt.configs.schema import Config
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.plain import plain_images
from byolt.pipelines.resident import Resident
from byolt.pipelines.sources import Source, open_source
from byolt.pipelines.torch_backend import resize_bicubic, resize_squares


def keep(source: Source, config: Config) -> None:
    """Keeps the data set decoded in memory, as data.resident does, for as long as the source lives."""
    Resident(source, config.augment, torch.device("cpu"), torch.float32, threads=1)


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


@pytest.mark.parametrize("size", [8, 96])
def test_where_nothing_is_resized_the_resize_would_change_no_bit(size: int) -> None:
    source = open_source(f"synthetic:5:{size}x{size + 4}")
    config = make_config(augment={"size": size})
    (batch,) = plain_images(source, np.arange(5), config)
    mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)
    for i, image in enumerate(batch[0]):
        resized = resize_bicubic(decode(source.read(i)), 0, 2, size, size, size)
        assert torch.equal(image.permute(1, 2, 0), (resized - mean) / std)


@pytest.mark.parametrize("shape", ["8x8", "20x30", "6x7"])
def test_resident_images_are_not_decoded_again_and_equal_to_the_bit(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config, ids = open_source(f"synthetic:9:{shape}"), make_config(), np.array([3, 8, 0, 5, 6])
    expected = list(plain_images(source, ids, config, 2))
    keep(source, config)
    monkeypatch.setattr("byolt.pipelines.plain.decode", lambda data: pytest.fail("decoded"))
    for ours, theirs in zip(plain_images(source, ids, config, 2), expected, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_broken_resident_images_are_left_out() -> None:
    source, config = Damaged({2: lambda _: b""}), make_config()
    expected = list(plain_images(source, np.array([0, 2, 1]), config))
    keep(source, config)
    (batch,) = plain_images(source, np.array([0, 2, 1]), config)
    assert torch.equal(batch[0], expected[0][0]) and torch.equal(batch[1], expected[0][1])


def test_squares_of_a_batch_are_resized_as_one_by_one() -> None:
    """On a GPU a resident batch is resized at once; here on the CPU."""
    images = torch.randint(
        0, 256, (3, 21, 21, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for size in (21, 8, 30):
        singly = torch.stack([resize_bicubic(image, 0, 0, 21, 21, size) for image in images])
        torch.testing.assert_close(resize_squares(images, size), singly, rtol=0, atol=1e-6)

import numpy as np
import pytest
import torch

from jacobian_robust.data import ImageDataset, ToyDataModule
from jacobian_robust.data.checks import checked
from jacobian_robust.errors import UserError

IMAGES = torch.randint(1, 256, (12, 2, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def look(images=IMAGES, labels=LABELS, shape=(2, 4, 6)):
    return checked(images, labels, outputs=(3,), shape=shape, what="data: Mine")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES, LABELS.int()),
        (IMAGES, LABELS[:, None]),
        (IMAGES.numpy(), LABELS.numpy()),
        (IMAGES.double() / 255, LABELS),
        (IMAGES.float() / 255, LABELS.numpy().astype(np.uint8)),
    ],
    ids=["int32", "column", "NumPy", "float64", "uint8 labels"],
)
def test_harmless_variants_are_taken(images, labels):
    read, classes = look(images, labels)
    assert read.dtype in (torch.uint8, torch.float32)
    assert classes.dtype == torch.int64
    assert torch.equal(classes, LABELS)
    assert torch.equal(read if read.dtype == torch.uint8 else (read * 255).round().byte(), IMAGES)


PIXELS = IMAGES.float() / 255


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES, LABELS + 1, r"labels are 1 to 3, not 0 to 2.*labels - 1"),
        (IMAGES, LABELS - 1, r"labels are -1 to 1, not 0 to 2"),
        (IMAGES, torch.nn.functional.one_hot(LABELS), r"labels\.argmax\(1\)"),
        (IMAGES, LABELS.float(), r"labels are of type torch\.float32"),
        (IMAGES, LABELS[:5], r"12 images and 5 labels"),
        (IMAGES.float(), LABELS, r"not \[0, 1\]; divide by 255"),
        ((PIXELS - 0.1) / 0.3, LABELS, r"leave the normalisation to the model"),
        (IMAGES.permute(0, 2, 3, 1), LABELS, r"permute\(0, 3, 1, 2\)"),
        (IMAGES[:, 0], LABELS, r"no channel"),
        (IMAGES[..., :3], LABELS, r"shape \(2, 4, 3\), not \(2, 4, 6\)"),
        (IMAGES.long(), LABELS, r"type torch\.int64; give uint8"),
        (PIXELS.masked_fill(IMAGES == 7, torch.nan), LABELS, r"not finite"),
        (PIXELS.masked_fill(IMAGES == 7, torch.inf), LABELS, r"not finite"),
        (IMAGES[:0], LABELS[:0], r"no images"),
        ("pixels", LABELS, r"tensors or NumPy arrays"),
    ],
)
def test_anything_else_is_refused_with_its_remedy(images, labels, said):
    with pytest.raises(UserError, match=f"^data: Mine: .*{said}"):
        look(images, labels)


def test_grey_images_without_a_channel_are_told_so():
    with pytest.raises(UserError, match="no channel"):
        look(IMAGES[:, 0], shape=(1, 4, 6))


class Own(ToyDataModule):
    """Data of one's own, by the documented way: a _read."""

    def _read(self, *, train):
        read = super()._read(train=train)
        return ImageDataset(read.images * (255 if train else 1), read.labels)


def test_every_datamodule_is_checked_when_it_is_read():
    with pytest.raises(UserError, match=r"data: Own, training images: .* divide by 255"):
        Own().setup("fit")
    Own().setup("test")  # raises no error


def test_more_validation_images_than_there_are_is_refused():
    class Few(ToyDataModule):
        def _read(self, *, train):
            read = super()._read(train=train)
            return ImageDataset(read.images[:100], read.labels[:100])

    with pytest.raises(UserError, match=r"data\.validation_size=200 leaves nothing of 100 images"):
        Few().setup("fit")

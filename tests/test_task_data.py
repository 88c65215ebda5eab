"""Data of other tasks, made of MNIST."""

import pytest
import torch
from torchvision.transforms import functional

from jacobian_robust.data import MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import (
    BernoulliProduct,
    Categorical,
    Gaussian,
    GaussianMeanScale,
    PixelCategorical,
    Poisson,
)
from jacobian_robust.task_data import BACKGROUND, MNISTAngleDataModule, MNISTPairsDataModule, rotated

SMALL = {"training_size": 300, "validation_size": 50, "test_size": 100}


def made(kind, family, **options):
    datamodule = kind(**SMALL, **options)
    datamodule.for_task(family)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def test_an_image_turned_anticlockwise_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 1, 28, 28), generator=generator).byte()
    ours = rotated(images, torch.tensor([0.0, 20.0, -35.0]))
    assert torch.equal(ours[0], images[0])
    for image, angle, made_here in zip(images[1:], (20.0, -35.0), ours[1:], strict=True):
        theirs = functional.rotate(image.float(), angle, functional.InterpolationMode.BILINEAR)
        inside = (slice(None), slice(4, -4), slice(4, -4))
        assert (theirs[inside] - made_here.float()[inside]).abs().max() < 1


def test_angles_fill_their_range_and_are_the_same_again():
    first, again = (made(MNISTAngleDataModule, Gaussian(tolerance=15.0), max_angle=30.0) for _ in range(2))
    images, angles = first.split("train").first(None)
    assert images.shape == (250, 1, 28, 28)
    assert angles.shape == (250, *first.output_shape)
    assert -30 <= angles.min() < -25 < 25 < angles.max() <= 30
    assert torch.equal(angles, again.split("train").labels)
    assert len(first.split("test")) == 100
    other = made(MNISTAngleDataModule, Gaussian(tolerance=15.0), data_seed=1)
    assert not torch.equal(other.split("test").labels, first.split("test").labels)


def test_the_targets_of_a_canvas_tell_of_the_same_digits():
    labels = made(MNISTPairsDataModule, BernoulliProduct()).split("train")
    pixels = made(MNISTPairsDataModule, PixelCategorical(), outputs=11).split("train")
    assert torch.equal(labels.images, pixels.images)
    present = torch.stack([(pixels.labels == digit).flatten(1).any(-1) for digit in range(10)], dim=1)
    assert (present.float() <= labels.labels).all()  # one digit can hide the other
    assert (present.float() == labels.labels).all(-1).float().mean() > 0.9
    assert torch.equal(pixels.labels != BACKGROUND, pixels.images[:, 0] > 64)
    counts = made(MNISTPairsDataModule, Poisson(), outputs=1).split("train")
    assert set(counts.labels.flatten().tolist()) == {0.0, 1.0, 2.0}
    assert torch.equal(counts.images.flatten(1).any(-1), counts.labels[:, 0] > 0)


@pytest.mark.parametrize(
    ("kind", "family", "options", "message"),
    [
        (MNISTDataModule, Poisson(), {"validation_size": 5}, "give task=classification, or data=mnist_angle"),
        (MNISTAngleDataModule, Categorical(), SMALL, "give task=regression or task=regression_scale"),
        (MNISTAngleDataModule, GaussianMeanScale(tolerance=1.0), SMALL, "give data.outputs=2"),
        (MNISTPairsDataModule, Gaussian(tolerance=1.0), SMALL, "give task=multilabel or task=segmentation"),
        (MNISTPairsDataModule, PixelCategorical(), SMALL, "give data.outputs=11"),
    ],
)
def test_a_task_without_targets_is_refused_with_what_to_give(kind, family, options, message):
    with pytest.raises(UserError, match=message):
        kind(**options).for_task(family)

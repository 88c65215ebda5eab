"""Data of other tasks than classification, made of MNIST's images: no download, and real strokes.

The targets are drawn from a seed, the same for every run. A data set says in ``for_task`` which tasks it has targets
for, and ``output_shape`` is what a model of the task has to return for an image.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, validate_call
from torch import Tensor, nn

from jacobian_robust.data import ImageDataset, MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import (
    BernoulliProduct,
    Family,
    Gaussian,
    GaussianMeanScale,
    PixelCategorical,
    Poisson,
)
from jacobian_robust.options import STRICT, Count, NonEmpty, Seed, Size

__all__ = ["MNISTAngleDataModule", "MNISTPairsDataModule", "rotated"]

_DIGIT = 16
"""Height and width of a digit on a canvas, in pixels."""

BACKGROUND = 10
"""The class of a pixel that belongs to no digit."""


def rotated(
    images: UInt8[Tensor, "images channels height width"], degrees: Float[Tensor, "images"]
) -> UInt8[Tensor, "images channels height width"]:
    """Return each image turned anticlockwise about its centre, interpolated, black where nothing comes from."""
    parts = []
    for chunk, angle in zip(images.split(5000), degrees.split(5000), strict=True):
        cos, sin, zero = (angle / 180 * math.pi).cos(), (angle / 180 * math.pi).sin(), torch.zeros_like(angle)
        matrix = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
        grid = nn.functional.affine_grid(matrix, list(chunk.shape), align_corners=False)
        parts.append(nn.functional.grid_sample(chunk.float(), grid, align_corners=False).round().byte())
    return torch.cat(parts)


class _MNISTTaskDataModule(MNISTDataModule):
    """What the data sets made of MNIST share: how many images, and the seed that they are made with."""

    image_shape = (1, 28, 28)
    tasks: Sequence[str]

    def _set(self, training_size: int, test_size: int, data_seed: int, outputs: int) -> None:
        if self.validation_size >= training_size:
            raise UserError(
                f"data.validation_size={self.validation_size} leaves nothing of {training_size} images to train on"
            )
        self.training_size, self.test_size, self.data_seed, self.outputs = training_size, test_size, data_seed, outputs

    @property
    def data_name(self) -> str:
        """What the data are called in results."""
        return type(self).__name__.removesuffix("DataModule")

    def _not_for(self, family: Family) -> UserError:
        return UserError(
            f"task: {self.data_name} has no targets for {type(family).__name__}; give {' or '.join(self.tasks)}"
        )

    def _require_outputs(self, wanted: int) -> None:
        if self.outputs != wanted:
            raise UserError(
                f"data.outputs={self.outputs}: the task has {wanted} for an image; give data.outputs={wanted}"
            )

    def _base(self, *, train: bool) -> tuple[ImageDataset, torch.Generator]:
        """Return the digits that a split is made of, and the source of what is drawn for it."""
        whole = super()._read(train=train)
        size = self.training_size if train else self.test_size
        generator = torch.Generator().manual_seed(2 * self.data_seed + 1 + train)
        return ImageDataset(whole.images[:size], whole.labels[:size].long()), generator


class MNISTAngleDataModule(_MNISTTaskDataModule):
    """MNIST's digits, each turned by an angle that is to be told from the image: regression, in degrees.

    Args:
        max_angle: the angles are uniform in ``[-max_angle, max_angle]`` degrees, positive ones anticlockwise.
        training_size: the first so many training images, the held-out ones included.
        test_size: the first so many test images.
        outputs: numbers that the model gives for an image: 1, or with a σ of its own 2.
        data_seed: of the angles.
        root: directory of MNIST's files, see :class:`jacobian_robust.data.MNISTDataModule`.
        batch_size: images in a training batch.
        validation_size: number of training images held out for validation.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves.
        shuffle_seed: seed of the order of the training images.

    Raises:
        UserError: if the sizes contradict each other; from :meth:`prepare_data` if files are missing or damaged.
    """

    classes = 1
    unit = "°"
    tasks = ("task=regression", "task=regression_scale")

    @validate_call(config=STRICT)
    def __init__(
        self,
        max_angle: float = Field(45.0, gt=0, le=180),
        training_size: int = Field(60_000, gt=0, le=60_000),
        test_size: int = Field(10_000, gt=0, le=10_000),
        outputs: Count = 1,
        data_seed: Seed = 0,
        root: NonEmpty = "data",
        batch_size: Count = 64,
        validation_size: Size = 2000,
        split_seed: Seed = 0,
        validate_on_test: bool = False,
        shuffle_seed: Seed = 0,
    ) -> None:
        super().__init__(root, batch_size, validation_size, split_seed, validate_on_test, shuffle_seed)
        self._set(training_size, test_size, data_seed, outputs)
        self.max_angle = max_angle

    @property
    def output_shape(self) -> tuple[int, ...]:
        """One number for an image, or a mean and a log σ."""
        return (self.outputs,)

    def for_task(self, family: Family) -> None:
        """Refuse what is no regression."""
        if not isinstance(family, Gaussian | GaussianMeanScale):
            raise self._not_for(family)
        self._require_outputs(2 if isinstance(family, GaussianMeanScale) else 1)
        self.family = family

    def _read(self, *, train: bool) -> ImageDataset:
        digits, generator = self._base(train=train)
        degrees = self.max_angle * (2 * torch.rand(len(digits), generator=generator) - 1)
        return ImageDataset(rotated(digits.images, degrees), degrees[:, None])


class MNISTPairsDataModule(_MNISTTaskDataModule):
    """Two small digits of MNIST at random places of a canvas, where they may overlap.

    Which digits are there (multi-label), the class of each pixel (segmentation; the brighter digit's, 10 for the
    background), or how many there are (counts; then none, one or two of them are).

    Args:
        training_size: canvases to train on, the held-out ones included.
        test_size: canvases to test on.
        outputs: channels that the model gives: 10 labels, 11 classes of a pixel, or 1 log rate.
        data_seed: of the places and the pairs.
        root: directory of MNIST's files, see :class:`jacobian_robust.data.MNISTDataModule`.
        batch_size: images in a training batch.
        validation_size: number of training images held out for validation.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves.
        shuffle_seed: seed of the order of the training images.

    Raises:
        UserError: if the sizes contradict each other; from :meth:`prepare_data` if files are missing or damaged.
    """

    classes = 1
    tasks = ("task=multilabel", "task=segmentation", "task=counts")

    @validate_call(config=STRICT)
    def __init__(
        self,
        training_size: int = Field(20_000, gt=0, le=60_000),
        test_size: int = Field(2000, gt=0, le=10_000),
        outputs: Count = 10,
        data_seed: Seed = 0,
        root: NonEmpty = "data",
        batch_size: Count = 64,
        validation_size: Size = 1000,
        split_seed: Seed = 0,
        validate_on_test: bool = False,
        shuffle_seed: Seed = 0,
    ) -> None:
        super().__init__(root, batch_size, validation_size, split_seed, validate_on_test, shuffle_seed)
        self._set(training_size, test_size, data_seed, outputs)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """A number for each label, or for each class of each pixel, or one."""
        return (self.outputs, *self.image_shape[1:]) if isinstance(self.family, PixelCategorical) else (self.outputs,)

    def for_task(self, family: Family) -> None:
        """Choose the targets."""
        if not isinstance(family, BernoulliProduct | PixelCategorical | Poisson):
            raise self._not_for(family)
        self._require_outputs({BernoulliProduct: 10, PixelCategorical: 11, Poisson: 1}[type(family)])
        self.family = family

    def _read(self, *, train: bool) -> ImageDataset:
        digits, generator = self._base(train=train)
        size = len(digits)
        both = torch.stack([torch.arange(size), torch.randperm(size, generator=generator)])
        layers = torch.stack([_placed(digits.images[index], generator) for index in both])
        labels = digits.labels[both]
        if isinstance(self.family, Poisson):
            number = torch.randint(0, 3, (size,), generator=generator)
            layers *= (number > torch.arange(2)[:, None])[..., None, None]
            return ImageDataset(layers.amax(0)[:, None], number[:, None].float())
        if isinstance(self.family, PixelCategorical):
            brightness, brighter = layers.max(0)
            of_pixels = labels.T.gather(1, brighter.flatten(1)).view_as(brighter)
            return ImageDataset(brightness[:, None], torch.where(brightness > 64, of_pixels, BACKGROUND))
        return ImageDataset(layers.amax(0)[:, None], nn.functional.one_hot(labels, 10).amax(0).float())


def _placed(
    images: UInt8[Tensor, "images 1 height width"], generator: torch.Generator
) -> UInt8[Tensor, "images 28 28"]:
    """Return the images, made smaller, at random places of black canvases."""
    small = torch.cat(
        [
            nn.functional.interpolate(chunk.float(), (_DIGIT, _DIGIT), mode="bilinear", antialias=True)
            for chunk in images.split(5000)
        ]
    )
    canvas = torch.zeros(len(images), 28, 28, dtype=torch.uint8)
    corners = torch.randint(0, 28 - _DIGIT + 1, (2, len(images), 1), generator=generator)
    rows, columns = corners + torch.arange(_DIGIT)
    canvas[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None]] = small[:, 0].round().byte()
    return canvas

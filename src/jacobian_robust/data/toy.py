"""Points that are drawn, not read."""

import math

import torch
from pydantic import Field, validate_call

from jacobian_robust.data.base import ImageDataModule, ImageDataset
from jacobian_robust.errors import UserError
from jacobian_robust.options import STRICT, Count, Seed, Size

__all__ = ["ToyDataModule"]


class ToyDataModule(ImageDataModule):
    """Points of the unit square, along three interleaved spiral arms, one for each class; drawn, not read.

    A point is an image of two pixels, its coordinates, so that models, penalties and attacks see nothing new. Arm ``k``
    is ``(1/2, 1/2) + r(t)·(cos φ, sin φ)`` with ``r = 0.08 + 0.34 t``, ``φ = 2π (k/3 + turns·t)`` and ``t²`` uniform in
    [0, 1], which spreads the points along it; Gaussian noise is added, and what leaves the square is put on its edge.

    Args:
        training_size: number of training points, the held-out ones included.
        test_size: number of test points.
        noise: standard deviation of each coordinate about the arm.
        turns: how much of a full turn an arm makes.
        data_seed: of the points.
        batch_size: points in a training batch.
        validation_size: number of training points held out for validation.
        split_seed: seed of the choice of the held-out points.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves.
        shuffle_seed: seed of the order of the training points.

    Raises:
        UserError: if the sizes contradict each other.
    """

    classes = 3
    image_shape = (1, 1, 2)
    pictures = False

    @validate_call(config=STRICT)
    def __init__(
        self,
        training_size: int = Field(500, gt=0, le=10**7),
        test_size: int = Field(1000, gt=0, le=10**7),
        noise: float = Field(0.05, ge=0, le=1e6),
        turns: float = Field(0.5, ge=-1e6, le=1e6),
        data_seed: Seed = 0,
        batch_size: Count = 32,
        validation_size: Size = 200,
        split_seed: Seed = 0,
        validate_on_test: bool = False,
        shuffle_seed: Seed = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            validation_size=validation_size,
            split_seed=split_seed,
            validate_on_test=validate_on_test,
            shuffle_seed=shuffle_seed,
        )
        if validation_size >= training_size:
            raise UserError(
                f"data.validation_size={validation_size} leaves nothing of {training_size} points to train on"
            )
        self.training_size = training_size
        self.test_size = test_size
        self.noise = noise
        self.turns = turns
        self.data_seed = data_seed

    def _read(self, *, train: bool) -> ImageDataset:
        size = self.training_size if train else self.test_size
        generator = torch.Generator().manual_seed(2 * self.data_seed + 1 + train)
        labels = torch.arange(size) % self.classes
        t = torch.rand(size, generator=generator).sqrt()
        radius = 0.08 + 0.34 * t
        angle = 2 * math.pi * (labels / self.classes + self.turns * t)
        points = 0.5 + radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        points += self.noise * torch.randn(size, 2, generator=generator)
        return ImageDataset(points.clamp(0, 1).view(-1, *self.image_shape), labels)

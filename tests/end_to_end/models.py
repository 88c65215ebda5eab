"""Classifiers of other kinds than the project's own."""

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from jacobian_robust.data import ImageDataModule, ImageDataset
from jacobian_robust.models import LeNet


class BatchNormalised(nn.Sequential):
    """Batch normalisation by the batch's own statistics couples the samples of a batch."""

    def __init__(self, **_: int) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9 * 9, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        return logits


class Angle(nn.Sequential):
    """A number from an image."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 1))


class WithDropout(nn.Sequential):
    """Draws from torch's global random stream in training."""

    def __init__(self, inputs: int = 784, classes: int = 10, **_: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(inputs, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, classes))


class Detached(LeNet):
    """Shows its parameters to autograd, and hides the image."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.detach())


class Undefined(LeNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.nan


class DoublePrecision(LeNet):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).double()


class Killing(LeNet):
    """Ends its process as the system does when memory runs out."""

    def forward(self, images: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class OfPoints(nn.Sequential):
    """A network of points of the plane."""

    def __init__(self, inputs: int = 2, classes: int = 3, **_: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes))


class Paced(OfPoints):
    """Takes its time in a process that is told how long a batch is to last."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
        logits: Tensor = super().forward(images)
        return logits


class DivergingInOne(OfPoints):
    """Returns what is no number in the second process, from its fifth batch on."""

    batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.batches += self.training
        logits: Tensor = super().forward(images)
        return logits * torch.nan if self.batches > 4 and os.environ.get("RANK") == "1" else logits


class WithIdleHead(OfPoints):
    """Has a layer that nothing passes through."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.head = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        for layer in list(self)[:4]:
            images = layer(images)
        return images


class Rectangles(ImageDataModule):
    """Images that are higher than wide, of two channels and five classes, drawn: each has a bright column."""

    classes = 5
    image_shape = (2, 9, 6)

    def __init__(self, shuffle_seed: int = 0, batch_size: int = 16) -> None:
        super().__init__(
            batch_size=batch_size,
            validation_size=20,
            split_seed=0,
            validate_on_test=False,
            shuffle_seed=shuffle_seed,
        )

    def _read(self, *, train: bool) -> ImageDataset:
        generator = torch.Generator().manual_seed(int(train))
        labels = torch.arange(117 if train else 40) % self.classes
        images = torch.rand(len(labels), *self.image_shape, generator=generator) * 0.5
        images[torch.arange(len(labels)), :, labels] += 0.5
        return ImageDataset(images, labels)


class Odd(nn.Module):
    """Has what a state_dict can hold beside tensors of its own: one weight twice, extra state, a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(108, 16))
        self.second = parametrizations.orthogonal(nn.Linear(16, 16))
        self.third = nn.Linear(16, 16)
        self.third.weight = self.fourth_weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.head = nn.Linear(16, 5)
        self.seen = {"steps": 0, "names": ["a"]}

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen = {**self.seen, "steps": self.seen["steps"] + 1}
        hidden = torch.tanh(self.second(torch.tanh(self.first(images.flatten(1)))))
        logits: Tensor = self.head(torch.tanh(hidden @ self.fourth_weight + self.third(hidden)))
        return logits * (1 + self.seen["steps"] / 1000)

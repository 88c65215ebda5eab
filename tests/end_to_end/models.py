"""Classifiers of other kinds than the project's own."""

import os
import signal

import torch
from torch import Tensor, nn

from jacobian_robust.models import LeNet


class BatchNormalised(nn.Sequential):
    """Batch normalisation by the batch's own statistics couples the samples of a batch."""

    def __init__(self, **_: int) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9 * 9, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        return logits


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

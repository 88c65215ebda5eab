"""Classifiers that no penalty on the Jacobian can be trained with, or that cannot be evaluated as they are."""

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

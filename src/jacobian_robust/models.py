"""Classifiers: pixels in [0, 1] in, logits out. A model that wants normalised pixels normalises them itself."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, validate_call
from torch import Tensor, nn

from jacobian_robust.options import STRICT

__all__ = ["MLP", "LeNet", "PixelInput", "SinglePrecision"]


class LeNet(nn.Module):
    """The note's LeNet: conv3×3(32)-ReLU-conv3×3(64)-ReLU-maxpool2-fc128-ReLU-fc10 (section 4.2).

    Args:
        classes: number of logits.
        channels: channels of the images.
        image_size: height and width of the images, in pixels.
        double_softmax: return probabilities where logits belong. The note's published networks did: cross-entropy and
            attacks then apply the softmax a second time, which holds the loss above ``-log(e / (e + 9)) = 1.461`` for
            ten classes and weakens the attacks' gradients. For reproduction only.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(10, ge=2, le=10**5),
        channels: int = Field(1, gt=0, le=10**4),
        image_size: int = Field(28, ge=6, le=256),
        *,
        double_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.double_softmax = double_softmax
        pooled = (image_size - 4) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, kernel_size=3),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * pooled**2, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.layers(images)
        return logits.softmax(-1) if self.double_softmax else logits


class MLP(nn.Module):
    """A small network of infinitely differentiable layers, for which curvature is defined everywhere.

    Args:
        classes: number of logits.
        inputs: numbers in an image.
        width: of the hidden layers.
        depth: number of hidden layers.
        activation: ``tanh``, or ``softplus``.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(3, ge=2, le=10**5),
        inputs: int = Field(2, gt=0, le=10**6),
        width: int = Field(32, gt=0, le=10**4),
        depth: int = Field(2, gt=0, le=10**3),
        activation: Literal["tanh", "softplus"] = "tanh",
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        hidden = [
            layer
            for before, after in itertools.pairwise(sizes)
            for layer in (nn.Linear(before, after), nn.Tanh() if activation == "tanh" else nn.Softplus())
        ]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))

    def forward(self, images: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1], which the network itself moves to [-3, 3]."""
        logits: Tensor = self.layers(6 * images - 3)
        return logits


class PixelInput(nn.Module):
    """A classifier of pixels in [0, 1] around one of other numbers, ``(low + (high − low)·pixel − mean) / std``.

    Args:
        model: returns logits.
        low: what it was given for a pixel of 0.
        high: and for a pixel of 1, before the normalisation.
        mean: subtracted then, of each channel or of all.
        std: divided by then, of each channel or of all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        low: float = 0.0,
        high: float = 1.0,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.low, self.high = low, high
        self.mean, self.std = (nn.Buffer(torch.as_tensor(value).float().reshape(-1, 1, 1)) for value in (mean, std))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.model((self.low + (self.high - self.low) * images - self.mean) / self.std)
        return logits


class SinglePrecision(nn.Module):
    """A classifier whose logits are float32, which the attack libraries expect, around one with others.

    Args:
        model: returns logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.model(images)
        return logits.float()

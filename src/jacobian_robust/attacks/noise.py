"""Noise: what no adversary chose."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.attacks.base import Attack
from jacobian_robust.options import STRICT

__all__ = ["GaussianNoise", "UniformNoise"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class UniformNoise(Attack):
    """A point of the ℓ∞ ball drawn uniformly, clipped to [0, 1]."""

    norm: Literal["linf"] = "linf"
    any_family: ClassVar[bool] = True

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda images, labels: (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GaussianNoise(Attack):
    """Normal noise of standard deviation ``eps`` in each pixel, clipped to [0, 1]; no ball bounds it."""

    norm: Literal["gaussian"] = "gaussian"
    any_family: ClassVar[bool] = True

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        import torchattacks

        return torchattacks.GN(model, std=eps)

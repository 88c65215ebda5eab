"""Whether targets are ones of a family, looked at once before anything is trained or attacked."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from jacobian_robust.geometry.families.base import Family
from jacobian_robust.geometry.families.diagonal import BernoulliProduct, GaussianMeanScale, Poisson
from jacobian_robust.geometry.families.pixels import PixelCategorical

__all__ = ["as_targets"]


def as_targets(
    targets: Shaped[Tensor, "samples *_"], family: Family, outputs: Sequence[int]
) -> Shaped[Tensor, "samples *_"]:
    """Return targets as a family's loss takes them, ``(samples, *shape)``: of pixels int64, else float32.

    Args:
        targets: of any real type; ``(samples,)`` where there is one number a sample.
        family: of the distribution that the outputs describe, any but the categorical one.
        outputs: the shape of a model's outputs for one sample.

    Raises:
        ValueError: if their shape, type or range does not fit; one line says what must be and what is.
    """
    shape, pixels = tuple(outputs), isinstance(family, PixelCategorical)
    if pixels:
        shape = shape[1:]
    elif isinstance(family, GaussianMeanScale):
        shape = (shape[0] // 2, *shape[1:])
    wanted, fits = _range(family, outputs)
    shaped = targets.shape[1:] == shape or (targets.ndim == 1 and math.prod(shape) == 1)
    found = f"{targets.dtype} of shape {tuple(targets.shape)}"
    if shaped and not targets.is_complex() and not (pixels and targets.is_floating_point()):
        values = targets.long() if pixels else targets.double()
        if fits(values).all():
            return (values if pixels else values.float()).reshape(-1, *shape)
        low, high = values.aminmax()
        found += f" from {low:g} to {high:g}"
    of = (len(targets), *shape)
    raise ValueError(f"the targets must be {wanted}, of shape {of}, not {found}")


def _range(family: Family, outputs: Sequence[int]) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return which targets a family takes, in words and of each entry."""
    if isinstance(family, PixelCategorical):
        return f"integers from 0 to {outputs[0] - 1}", lambda t: (t >= 0) & (t < outputs[0])
    if isinstance(family, BernoulliProduct):
        return "0 or 1", lambda t: (t == 0) | (t == 1)
    if isinstance(family, Poisson):
        return "whole numbers from 0", lambda t: (t >= 0) & (t % 1 == 0)
    return "finite numbers", torch.isfinite

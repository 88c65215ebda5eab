"""Boxes of a model's outputs over the whole ball around an input, for outputs of any family."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from jacobian_robust.bounds.interval import Interval, box, propagate
from jacobian_robust.geometry.families import Family, PixelCategorical

__all__ = ["output_box", "right_in_box"]


def output_box(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    targets: Shaped[Tensor, "batch *_"],
    eps: float,
    family: Family,
    clip: tuple[float, float] | None = (0.0, 1.0),
    *,
    float64: bool = False,
) -> tuple[Float[Tensor, "batch *out"], Float[Tensor, "batch *out"]]:
    """Return bounds of the outputs for all ``x'`` with ``‖x' - x‖∞ ≤ eps`` in ``clip``, sound over the reals.

    Of logits of pixels whose last layer is a 1×1 convolution, ``u_j ≥ s_j(x') - s_y(x')`` twice, with the layer merged
    with the difference: tighter, and the same as far as the targets' loss and rightness go.

    Raises:
        ValueError: as :func:`jacobian_robust.bounds.margin_bounds`.
    """
    model, low, high = box(inputs, eps, clip, model, float64)
    output = propagate(model, low, high)
    source = output.source
    merged = source is not None and source[0] is torch.conv2d and source[1][1].shape[2:] == (1, 1)
    if merged and isinstance(family, PixelCategorical):
        worst = _differences(output, targets)
        return worst, worst
    return output.lower, output.upper


def _differences(output: Interval, targets: Tensor) -> Tensor:
    """Return ``u_j`` of each pixel, with the last layer, a 1×1 convolution, merged with the difference; ``u_y = 0``."""
    assert output.source is not None
    x, weight = output.source[1][:2]
    between = (weight[:, None] - weight).abs().flatten(0, 1)  # of each pair of classes
    radius = F.conv2d((x.upper - x.lower) / 2, between).unflatten(1, (len(weight), -1))
    center = (output.lower + output.upper) / 2
    own = targets[:, None]
    spread = radius.gather(1, own[:, :, None].expand(-1, -1, len(weight), -1, -1)).squeeze(1)
    return center - center.gather(1, own) + spread


def right_in_box(
    family: Family,
    lower: Float[Tensor, "batch *out"],
    upper: Float[Tensor, "batch *out"],
    targets: Shaped[Tensor, "batch *_"],
) -> Bool[Tensor, "batch"]:
    """Return whether a prediction is right for all outputs of a box."""
    right = [family.right(outputs, targets) for outputs in family.extremes(lower, upper, targets)]
    return torch.stack(right).all(0)

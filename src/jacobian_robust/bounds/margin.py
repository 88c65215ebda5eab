"""The Fisher–Rao margin that bounds of the logits' differences imply for a whole ball."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobian_robust.bounds.crown import crown_margin_bounds
from jacobian_robust.bounds.interval import margin_bounds

__all__ = ["certified_margin", "fisher_rao_margin"]


def fisher_rao_margin(bounds: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return the least ``d_y`` over all logits with ``s_j − s_y ≤ u_j``: ``min_j 2 arcsin(a_j/√2)``.

    ``a_j = (1 − e^{u_j/2})/√(1 + Σ_{k≠y} e^{u_k})`` where ``u_j ≤ 0``, which is attained at ``s_j − s_y = u_j`` if no
    ``u_k`` is positive; ``(1 − e^{u_j/2})/√(1 + e^{u_j})`` where ``u_j > 0``. Positive exactly where all ``u_j < 0``.
    """
    own = nn.functional.one_hot(labels, bounds.shape[-1]).bool()
    others = bounds.masked_fill(own, -torch.inf)
    total = torch.cat([torch.zeros_like(others[:, :1]), others], -1).logsumexp(-1, keepdim=True)
    negative = others.clamp_max(0)
    below = -torch.expm1(negative / 2) * (-total / 2).exp()
    half = others.clamp_min(0) / 2
    above = torch.expm1(-half) / (1 + (-2 * half).exp()).sqrt()  # numerator and denominator over e^{u/2}
    least = torch.where(others <= 0, below, above).masked_fill(own, torch.inf).amin(-1)
    return 2 * torch.asin((least / math.sqrt(2)).clamp(-(0.5**0.5), 0.5**0.5))


def certified_margin(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, " batch"],
    eps: float,
    norm: Literal["linf"] = "linf",
    method: Literal["interval", "crown"] = "interval",
    *,
    clip: tuple[float, float] | None = (0.0, 1.0),
    float64: bool = False,
) -> Float[Tensor, " batch"]:
    """Return a lower bound, in [-π/2, π/2], of the signed Fisher–Rao distance to the boundary over the ball.

    Positive exactly where the method certifies the image at ``eps``. Sound over the reals (see ``interval``).

    Raises:
        ValueError: for an unknown norm or method, and as :func:`margin_bounds`.
    """
    if norm != "linf":
        raise ValueError(f"bounds: norm must be linf, not {norm}; lipschitz_margin is the certificate in l2")
    methods = {"interval": margin_bounds, "crown": crown_margin_bounds}
    if method not in methods:
        raise ValueError(f"bounds: method must be interval or crown, not {method}")
    return fisher_rao_margin(methods[method](model, inputs, labels, eps, clip, float64=float64), labels)

"""Information geometry of the categorical simplex.

A point of the simplex is a tensor ``p`` of ``C = m + 1`` class probabilities along its last axis; leading axes are a
batch. Equation numbers are those of the research note "Adversarial robustness with an upper-bound on the norm of the
Jacobian matrix"; the note writes ``θ`` for ``p``.

Every function is pure, runs on any device in float32 or float64, and is differentiable. On the faces of the simplex,
which a confident network reaches in float32, square roots and the metric have infinite slope. There, probabilities
below ``√tiny`` (1e-19 in float32, 1e-154 in float64) are taken to be ``√tiny``: far below rounding, and enough for
values and gradients to stay finite everywhere.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "conformal_factor",
    "distance_to_boundary",
    "distance_to_center",
    "fisher_metric",
    "fisher_rao_distance",
    "from_stereographic",
    "log_conformal_factor",
    "max_distance_to_center",
    "signed_distance_to_boundary",
    "sphere_embedding",
    "stereographic",
]


def _interior(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny ** 0.5)


def sphere_embedding(p: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Return ``μ = 2√p``, the isometric image of the simplex in the sphere of radius 2 (eq. 5)."""
    return 2 * _interior(p).sqrt()


def conformal_factor(p: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Return ``ρ = 1 - √p_C`` in ``(0, 1]``, the scale of the stereographic chart: ``g = ρ² Σ (dt^k)²`` (section 3.4).

    Computed as ``Σ_{k<C} p_k / (1 + √p_C)``, which keeps its digits when the last class is almost certain.
    """
    p = _interior(p)
    return p[..., :-1].sum(-1) / (1 + p[..., -1].sqrt())


def log_conformal_factor(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Return ``log ρ`` of ``softmax(logits)``, with slopes of at most 1 however confident the prediction.

    Floored like the probabilities of this module, at ``log √tiny`` (-44 in float32).
    """
    others, last = logits.log_softmax(-1).split([logits.shape[-1] - 1, 1], dim=-1)
    log_rho = others.logsumexp(-1) - torch.log1p((last.squeeze(-1) / 2).exp())
    return log_rho.clamp_min(math.log(torch.finfo(logits.dtype).tiny) / 2)


def stereographic(p: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch m"]:
    """Return the stereographic coordinates ``t^k = 2μ^k / (2 - μ^C)``, ``k = 1..m`` (section 3.4).

    The chart projects from the vertex of the last class, towards which ``t`` grows without bound.
    """
    return _interior(p[..., :-1]).sqrt() * 2 / conformal_factor(p).unsqueeze(-1)


def from_stereographic(t: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch classes"]:
    """Return the probabilities whose stereographic coordinates are ``t``, the inverse of :func:`stereographic`.

    Coordinates of the simplex are non-negative with ``‖t‖ ≥ 2``; others give points of the rest of the sphere, folded
    back by the square.
    """
    squared = (t / 2).square().sum(-1, keepdim=True)
    rho = 2 / (squared + 1)
    return torch.cat([(rho * t / 2).square(), (1 - rho).square()], dim=-1)


def fisher_metric(p: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch m m"]:
    """Return the Fisher information metric ``g_ij = δ_ij / p_i + 1 / p_C`` in the coordinates ``p_1..p_m`` (eq. 3)."""
    inverse = 1 / _interior(p)
    return torch.diag_embed(inverse[..., :-1]) + inverse[..., -1, None, None]


def fisher_rao_distance(
    p: Float[Tensor, "*#batch classes"], q: Float[Tensor, "*#batch classes"]
) -> Float[Tensor, "..."]:
    """Return the geodesic distance ``2 arccos Σ √(p_i q_i)``, in ``[0, π]``, for the Fisher metric (section 3.1).

    The batches of ``p`` and ``q`` are broadcast against each other.

    Computed from the chord, ``4 arcsin(‖√p - √q‖ / 2)``: exact to rounding for close distributions, where the arccosine
    loses half the digits and has infinite slope. The gradient at ``p = q`` is 0.
    """
    chord = torch.linalg.vector_norm(_interior(p).sqrt() - _interior(q).sqrt(), dim=-1)
    return 4 * torch.asin(chord / 2)


def distance_to_center(p: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Return ``δ``, the Fisher–Rao distance to the uniform distribution (eq. 6)."""
    return 4 * torch.asin(torch.linalg.vector_norm(_interior(p).sqrt() - p.shape[-1] ** -0.5, dim=-1) / 2)


def max_distance_to_center(classes: int) -> float:
    """Return ``δ_m = 2 arccos(1/√C)``, the distance of a vertex to the center: the largest ``δ`` for ``C`` classes.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"a simplex with a decision boundary needs at least 2 classes, not {classes}")
    return 2 * math.acos(classes**-0.5)


def distance_to_boundary(p: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Return ``d_B``, the exact Fisher–Rao distance to the decision boundary, in ``[0, π/2]``.

    ``d_B = 2 arcsin((√p_(1) - √p_(2)) / √2)`` with the two largest probabilities: the geodesic distance on the sphere
    to the great sphere ``μ_(1) = μ_(2)``. The note bounds it by ``δ`` (its simplification 1), from above.
    """
    top = _interior(p).sqrt().topk(2, dim=-1).values
    return 2 * torch.asin((top[..., 0] - top[..., 1]) / math.sqrt(2))


def signed_distance_to_boundary(
    p: Float[Tensor, "*batch classes"], labels: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Return ``d_y``, the Fisher–Rao distance to the true class's boundary, in ``[-π/2, π/2]``; negative outside it.

    ``d_y = 2 arcsin((√p_y - max_{j≠y} √p_j) / √2)``: :func:`distance_to_boundary` where the prediction is right; where
    it is wrong, minus the distance to the great sphere on which the true class and the likeliest tie.
    """
    root = _interior(p).sqrt()
    own = root.gather(-1, labels[..., None]).squeeze(-1)
    other = root.scatter(-1, labels[..., None], 0.0).amax(-1)
    return 2 * torch.asin((own - other) / math.sqrt(2))

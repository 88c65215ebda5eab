"""Penalties on the margin: a ball around each image shall stay, to first order, inside the true class."""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.options import STRICT, Count
from jacobian_robust.penalties.base import Condition, Magnitude, Model, Penalty, vector_jacobian_product

__all__ = ["LinearMargin", "Margin"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Margin(Penalty):
    """``softplus(κ(ε‖J_μ‖_F - d_y))/κ``: asks that a ball of radius ``ε`` stay, to first order, inside the true class.

    Eq. 14 with the exact, signed distance ``d_y`` to the true class's boundary
    (:func:`jacobian_robust.geometry.signed_distance_to_boundary`) in place of the distance to the simplex's center, and
    with a penalty that grows with the violation alone: it cannot overflow and has no chart. It wants a weight η far
    above the note's, as ``eta=constant eta.value=0.5``.

    Args:
        eps: Euclidean radius ``ε``, in units of the inputs.
        kappa: sharpness ``κ``; the penalty is the violation's positive part for large ones.
        probes: number of vector–Jacobian products for the norm, see :func:`jacobian_robust.jacobian.frobenius_norm`;
            ``None`` is exact.
        family: of the distribution that the outputs describe; ``d_y`` is then its signed distance to the boundary of
            what is right.
    """

    eps: Magnitude
    kappa: Magnitude = 4.0
    probes: Count | None = None
    family: Family = CATEGORICAL

    def condition(self, classes: int) -> Condition:
        """Return ``ε`` and the exact distance."""
        return Condition(self.eps, "boundary")

    def __call__(
        self,
        logits: Float[Tensor, "batch *outputs"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Shaped[Tensor, "batch *_"],
        *,
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        norm = frobenius_norm(
            logits, inputs, family=self.family, probes=self.probes, generator=generator, create_graph=create_graph
        )
        distance = self.family.signed_distance_to_boundary(logits.to(norm.dtype), labels)
        return nn.functional.softplus(self.eps * norm - distance, beta=self.kappa)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LinearMargin(Penalty):
    """``max_j softplus(κ(ε‖∇_x d_j‖_* - d_j))/κ``: a ball in any norm shall stay, to first order, in the true class.

    ``d_j`` is the signed distance of the true class ``y`` to its boundary with the class ``j``, and ``‖·‖_*`` the dual
    of the ball's norm: by Hölder's inequality ``d_j(x + r) ≥ d_j - ε‖∇_x d_j‖_*`` for all ``‖r‖ ≤ ε``, to first order,
    and an ``r`` attains it. :class:`Margin` bounds the same fall, in the ℓ2 ball alone, by ``ε‖J_μ‖_F`` for all classes
    at once: no distance has a longer gradient. The idea, for logits, is that of Elsayed et al., "Large margin deep
    networks for classification", 2018; the Fisher–Rao distance in their place is ours.

    Classes beyond the first ``rivals`` are not looked at: what is bounded then is the fall of these distances alone. It
    wants a weight η far above the note's, as ``eta=constant eta.value=0.5``.

    Args:
        eps: radius ``ε`` of the ball, in units of the inputs.
        norm: of the ball.
        distance: ``fisher_rao``, ``2 arcsin((√θ_y - √θ_j)/√2)``, at most π/2; or ``logits``, ``s_y - s_j``.
        kappa: sharpness ``κ``; the penalty is the violation's positive part for large ones.
        rivals: how many of the other classes, the most likely ones, are looked at, a vector–Jacobian product each;
            ``None`` for all.
        family: of the distribution that the outputs describe; ``d_j`` are then its signed distances to the boundaries
            of what is right, and the nearest ``rivals`` of them are looked at.
    """

    eps: Magnitude
    norm: Literal["linf", "l2"] = "linf"
    distance: Literal["fisher_rao", "logits"] = "fisher_rao"
    kappa: Magnitude = 4.0
    rivals: Count | None = 1
    family: Family = CATEGORICAL

    @model_validator(mode="after")
    def _logits_of_classes(self) -> "LinearMargin":
        if self.distance == "logits" and not isinstance(self.family, Categorical):
            raise ValueError("distance=logits is the lead of a class; give distance=fisher_rao")
        return self

    def condition(self, classes: int) -> Condition:
        """Return ``ε`` and the exact distance: an ℓ∞ ball holds the Euclidean one of its radius."""
        return Condition(self.eps, "boundary")

    def __call__(
        self,
        logits: Float[Tensor, "batch *outputs"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Shaped[Tensor, "batch *_"],
        *,
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        violations = []
        for distance, slope in self._nearest(logits, labels):
            gradient = vector_jacobian_product(logits, inputs, slope.to(logits.dtype), create_graph=create_graph)
            fall = self.eps * torch.linalg.vector_norm(gradient, ord=1 if self.norm == "linf" else 2, dim=-1)
            violations.append(fall - distance)
        return nn.functional.softplus(torch.stack(violations).amax(0), beta=self.kappa)

    def _nearest(
        self, logits: Float[Tensor, "batch *outputs"], labels: Shaped[Tensor, "batch *_"]
    ) -> Iterator[tuple[Float[Tensor, "batch"], Float[Tensor, "batch *outputs"]]]:
        """Yield distances and their derivatives with respect to the logits."""
        if self.distance == "fisher_rao" or not isinstance(self.family, Categorical):
            yield from self.family.nearest_boundaries(logits, labels, self.rivals)
            return
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for rivalry in self.family.rivalries(logits, labels, self.rivals):
            difference = rivalry.to(logits.dtype)
            yield (logits * difference).sum(-1), difference

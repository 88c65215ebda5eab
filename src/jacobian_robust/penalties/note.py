"""The note's penalties, which bound the Jacobian of the prediction (eq. 15), and the isometry that came before them."""

import abc
import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from jacobian_robust.geometry import distance_to_center, log_conformal_factor, max_distance_to_center
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.jacobian import frobenius_norm, gram_matrix, spectral_norm
from jacobian_robust.options import STRICT, Count
from jacobian_robust.penalties.base import Bound, Condition, Magnitude, Model, Penalty

__all__ = [
    "ExponentialPenalty",
    "Frobenius",
    "Isometry",
    "RadiusPenalty",
    "Spectral",
    "capped_exp",
    "note_condition",
    "satisfies_condition",
]

NOTE_DELTA_OVER_EPS = 1e-3
"""The note's ``δ_m/ε`` (section 4.2)."""


def note_condition(classes: int) -> Condition:
    """Return the ``ε`` and the bound of eq. 14 in the note, for a training whose penalty has none of its own."""
    return Condition(max_distance_to_center(classes) / NOTE_DELTA_OVER_EPS, "center")


def capped_exp(exponent: Float[Tensor, "*shape"], cap: float) -> Float[Tensor, "*shape"]:
    """Return ``exp(exponent)`` up to ``cap`` and its tangent beyond: finite, with a continuous slope.

    Float32 overflows at an exponent of 88; one bad batch would end a training with nan.
    """
    return exponent.clamp_max(cap).exp() * (1 + (exponent - cap).relu())


def satisfies_condition(
    norm: Float[Tensor, "batch"],
    logits: Float[Tensor, "batch *outputs"],
    *,
    bound: Bound,
    eps: float,
    family: Family = CATEGORICAL,
) -> Bool[Tensor, "batch"]:
    """Return whether ``‖J_μ‖ ≤ d / ε`` for each sample: eq. 14 when ``norm`` is the spectral norm.

    Args:
        norm: a norm of the Jacobian ``J_μ``.
        logits: the model's outputs before the softmax, or the parameters of the family.
        bound: the Fisher–Rao distance ``d``: to the ``center`` (the note's ``δ``) or to the decision ``boundary``; to
            the boundary where the family has no center, as all but the categorical one.
        eps: the Euclidean radius ``ε``, in units of the inputs.
        family: of the distribution that the outputs describe.
    """
    return norm <= _distance(logits, bound, family) / eps


def _distance(logits: Tensor, bound: Bound, family: Family) -> Float[Tensor, "batch"]:
    if bound == "center" and isinstance(family, Categorical):
        return distance_to_center(logits.softmax(-1))
    return family.distance_to_boundary(logits)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RadiusPenalty(Penalty):
    """What the note's penalties share: the Euclidean radius that they protect, and where they measure.

    Args:
        eps: Euclidean radius ``ε`` in which the prediction shall hold, in units of the inputs.
        delta_over_eps: the note's way to give ``ε``: the ratio ``δ_m/ε`` to the largest ``δ`` for the number of
            classes, 1e-3 in the note. Exactly one of the two is given.
        chart: where the Jacobian is taken: ``stereographic`` coordinates (the note's, which punish confidence in the
            last class hardest, by the conformal factor ``ρ``) or the ``sphere``, which treats all classes alike.
        bound: the Fisher–Rao distance ``d``: to the ``center`` of the simplex (the note's ``δ``) or, exact, to the
            decision ``boundary``.
        outputs: what the model returns, ``logits`` or, if its last layer is a softmax, ``probabilities``. They are then
            the prediction that is measured, although a cross-entropy that is given them applies the softmax again.
    """

    eps: Magnitude | None = None
    delta_over_eps: Magnitude | None = None
    chart: Literal["stereographic", "sphere"] = "stereographic"
    bound: Bound = "center"
    outputs: Literal["logits", "probabilities"] = "logits"

    @model_validator(mode="after")
    def _one_radius(self) -> "RadiusPenalty":
        if (self.eps is None) == (self.delta_over_eps is None):
            state = "neither is set" if self.eps is None else "both are set"
            raise ValueError(f"eps and delta_over_eps: {state}; give exactly one and leave the other null")
        return self

    def radius(self, classes: int) -> float:
        """Return the Euclidean radius ``ε`` for a number of classes."""
        if self.eps is not None:
            return self.eps
        assert self.delta_over_eps is not None
        return max_distance_to_center(classes) / self.delta_over_eps

    def condition(self, classes: int) -> Condition:
        """Return the radius and the distance that the penalty is made of."""
        return Condition(self.radius(classes), self.bound)

    def with_radius(self, share: float) -> Penalty:
        """Return the penalty with ``share`` times its radius, in the notation that it is given in."""
        if self.delta_over_eps is not None:
            return replace(self, delta_over_eps=self.delta_over_eps / share)
        return super().with_radius(share)

    @property
    def takes_probabilities(self) -> bool:
        """Whether the model's last layer is a softmax."""
        return self.outputs == "probabilities"

    def _logits(self, outputs: Float[Tensor, "batch *outputs"]) -> Float[Tensor, "batch *outputs"]:
        """Return logits whose softmax is the prediction; that of a class without probability is finite, too."""
        return outputs if self.outputs == "logits" else outputs.clamp_min(1e-12).log()


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExponentialPenalty(RadiusPenalty, abc.ABC):
    """The note's penalty ``α = exp(‖J̃‖ - d/(ρε))`` (eq. 15), for a norm that a subclass chooses.

    On the sphere it is ``exp(‖J_μ‖ - d/ε)``; in the stereographic chart the exponent is that, divided by ``ρ``.

    Of another family than the categorical one ``J_μ`` is ``Lᵀ J_s`` with a factor ``L`` of its Fisher metric, and
    ``d`` its distance to the boundary of what is right; it has no chart and no center, and ``chart`` and ``bound`` are
    not looked at. ``δ_m`` is then the largest such distance.

    Args:
        cap: the exponent above which the exponential goes on as a straight line.
        family: of the distribution that the outputs describe.
    """

    cap: float = Field(default=10.0, gt=0, le=40)
    family: Family = CATEGORICAL

    def radius_at(self, outputs: Float[Tensor, "batch *outputs"]) -> float:
        """Return the Euclidean radius ``ε`` for outputs of this shape.

        Raises:
            ValueError: if ``delta_over_eps`` is given and the family has no largest distance.
        """
        if self.eps is not None:
            return self.eps
        assert self.delta_over_eps is not None
        return self.family.largest_distance(outputs) / self.delta_over_eps

    @abc.abstractmethod
    def norm(
        self,
        logits: Float[Tensor, "batch *outputs"],
        inputs: Float[Tensor, "batch *shape"],
        *,
        generator: torch.Generator | None,
        create_graph: bool,
    ) -> Float[Tensor, "batch"]:
        """Return the norm of ``J_μ`` that is penalised."""

    def __call__(
        self,
        logits: Float[Tensor, "batch *outputs"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Shaped[Tensor, "batch *_"] | None = None,
        *,
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return ``α`` of each sample (eq. 15), differentiable with respect to the model's parameters.

        The labels play no part in it. The exponent is computed as ``(‖J_μ‖ - d/ε)/ρ``, which equals ``‖J̃‖ - d/(ρε)``.
        """
        logits = self._logits(logits)
        norm = self.norm(logits, inputs, generator=generator, create_graph=create_graph)
        logits = logits.to(norm.dtype)
        exponent = norm - _distance(logits, self.bound, self.family) / self.radius_at(logits)
        if self.chart == "stereographic" and isinstance(self.family, Categorical):
            exponent = exponent * (-log_conformal_factor(logits)).exp()
        return capped_exp(exponent, self.cap)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Frobenius(ExponentialPenalty):
    """Eq. 15 with the Frobenius norm, as in the note: an upper bound of the spectral norm.

    Args:
        probes: number of vector–Jacobian products for the norm, see :func:`jacobian_robust.jacobian.frobenius_norm`;
            ``None`` is exact.
    """

    probes: Count | None = None

    def norm(
        self,
        logits: Float[Tensor, "batch *outputs"],
        inputs: Float[Tensor, "batch *shape"],
        *,
        generator: torch.Generator | None,
        create_graph: bool,
    ) -> Float[Tensor, "batch"]:
        """Return ``‖J_μ‖_F``."""
        return frobenius_norm(
            logits, inputs, family=self.family, probes=self.probes, generator=generator, create_graph=create_graph
        )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Spectral(ExponentialPenalty):
    """Eq. 15 with the spectral norm, which eq. 14 asks for (no simplification 4).

    Args:
        columns: size of the subspace in which the norm is sought, see
            :func:`jacobian_robust.jacobian.spectral_norm`; ``None`` is exact.
        tolerance: relative accuracy to which the subspace grows; ``None`` leaves it as it is. Only with ``columns``.
    """

    columns: Count | None = None
    tolerance: Magnitude | None = None

    @model_validator(mode="after")
    def _tolerance_of_a_subspace(self) -> "Spectral":
        if self.tolerance is not None and self.columns is None:
            raise ValueError("tolerance: the norm is exact without columns; give columns=2 too, or tolerance=null")
        return self

    def norm(
        self,
        logits: Float[Tensor, "batch *outputs"],
        inputs: Float[Tensor, "batch *shape"],
        *,
        generator: torch.Generator | None,
        create_graph: bool,
    ) -> Float[Tensor, "batch"]:
        """Return ``‖J_μ‖₂``."""
        return spectral_norm(
            logits,
            inputs,
            family=self.family,
            columns=self.columns,
            tolerance=self.tolerance,
            create_graph=create_graph,
        )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Isometry(RadiusPenalty):
    """``ε²‖J̃ J̃ᵀ - (d/(ρε))² I‖_F``: asks for an isometry up to scale, not only for a bound.

    The penalty that came before eq. 15: Shi-Garrier, Bouaynaya & Delahaye, "Adversarial robustness with partial
    isometry", Entropy 26(2), 2024. All ``m`` singular values of ``J_μ`` are drawn to ``d/ε``, the largest that eq. 14
    allows, so small ones cost as much as large ones.

    Args:
        rho_min: the conformal factor below which ``1/ρ²`` grows no more (ours); towards the vertex of the last class it
            has no bound.
    """

    rho_min: float = Field(default=1e-3, ge=1e-9, le=1)

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"] | None = None,
        *,
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters.

        Computed as ``‖ε² Lᵀ J_s J_sᵀ L - d² I‖_F / ρ²``: the chart is conformal, so that ``ρ² J̃ J̃ᵀ`` has the
        eigenvalues of that Gram matrix (:func:`jacobian_robust.jacobian.gram_matrix`).
        """
        logits = self._logits(logits)
        gram = gram_matrix(logits, inputs, create_graph=create_graph)
        logits = logits.to(gram.dtype)
        wanted = torch.diag_embed(_distance(logits, self.bound, CATEGORICAL).square()[:, None].expand(gram.shape[:2]))
        value = torch.linalg.matrix_norm(self.radius(logits.shape[-1]) ** 2 * gram - wanted)
        if self.chart == "stereographic":
            value = value * (-2 * log_conformal_factor(logits).clamp_min(math.log(self.rho_min))).exp()
        return value

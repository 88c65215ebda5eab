"""Penalties that bound the input–output Jacobian, or what a classifier does nearby, one small class each.

A penalty is called with the logits of a batch, the inputs they came from and their labels, and returns one value a
sample. Equation numbers are those of the research note "Adversarial robustness with an upper-bound on the norm of the
Jacobian matrix".
"""

import abc
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.errors import UserError
from jacobian_robust.geometry import (
    distance_to_boundary,
    distance_to_center,
    log_conformal_factor,
    max_distance_to_center,
    signed_distance_to_boundary,
)
from jacobian_robust.jacobian import frobenius_norm, gram_matrix, spectral_norm
from jacobian_robust.options import STRICT, Count
from jacobian_robust.training.shares import drawn

__all__ = [
    "VAT",
    "Amortization",
    "Curvature",
    "ExponentialPenalty",
    "Frobenius",
    "InputGradient",
    "Isometry",
    "LinearMargin",
    "LogitJacobian",
    "Margin",
    "Penalty",
    "RadiusPenalty",
    "Spectral",
    "capped_exp",
    "condition_of",
    "innermost",
    "needs_input_graph",
    "satisfies_condition",
    "takes_model",
    "with_radius",
]

Bound = Literal["center", "boundary"]

Magnitude = Annotated[float, Field(ge=1e-6, le=1e6)]
"""A positive number that float32 can be multiplied with, divided by and squared."""


@runtime_checkable
class Penalty(Protocol):
    """What the LightningModule asks of a penalty.

    One that looks at other points than the inputs declares a keyword ``model`` too, and is given what maps inputs to
    logits. One that does not differentiate ``logits`` with respect to ``inputs`` says ``input_graph = False``, and the
    inputs then come without a graph.
    """

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample.

        Args:
            logits: the model's outputs before the softmax, with a graph to ``inputs``.
            inputs: what the model was given, with ``requires_grad`` set before the forward pass.
            labels: the true classes.
            generator: source of the penalty's randomness, if it has any; to draw the same on several devices as on
                one, by :func:`jacobian_robust.training.shares.drawn`.
            create_graph: make the penalty differentiable with respect to the model's parameters.
        """


def needs_input_graph(penalty: Penalty) -> bool:
    """Return whether a penalty differentiates the logits with respect to the inputs."""
    return getattr(penalty, "input_graph", True)


def takes_model(penalty: Penalty) -> bool:
    """Return whether a penalty asks for the model."""
    return _takes_model(type(penalty))


@functools.cache
def _takes_model(penalty: type) -> bool:
    return "model" in inspect.signature(penalty.__call__).parameters


@dataclass(frozen=True, config=STRICT | {"strict": False}, kw_only=True)  # made of a mapping, too
class Amortization:
    """How seldom a penalty is computed, so that it costs less. The loss is the same in the mean.

    Args:
        every: the penalty joins the loss of every ``every``-th step, from the first on, with as many times its weight.
        fraction: share of a batch whose penalty is computed, in (0, 1], rounded to at least one image; its mean stands
            for the batch's.
    """

    every: Count = 1
    fraction: float = Field(default=1.0, gt=0, le=1, strict=True)

    def weight(self, step: int) -> int:
        """Return by what the penalty is multiplied in a step, counted from 0: a pure function, right after resuming."""
        return self.every if step % self.every == 0 else 0

    def samples(self, batch: int) -> int:
        """Return how many images of a batch are penalised."""
        return max(1, round(self.fraction * batch))


def capped_exp(exponent: Float[Tensor, "*shape"], cap: float) -> Float[Tensor, "*shape"]:
    """Return ``exp(exponent)`` up to ``cap`` and its tangent beyond: finite, with a continuous slope.

    Float32 overflows at an exponent of 88; one bad batch would end a training with nan.
    """
    return exponent.clamp_max(cap).exp() * (1 + (exponent - cap).relu())


def satisfies_condition(
    norm: Float[Tensor, "batch"], logits: Float[Tensor, "batch classes"], *, bound: Bound, eps: float
) -> Bool[Tensor, "batch"]:
    """Return whether ``‖J_μ‖ ≤ d / ε`` for each sample: eq. 14 when ``norm`` is the spectral norm.

    Args:
        norm: a norm of the Jacobian ``J_μ``.
        logits: the model's outputs before the softmax.
        bound: the Fisher–Rao distance ``d``: to the ``center`` (the note's ``δ``) or to the decision ``boundary``.
        eps: the Euclidean radius ``ε``, in units of the inputs.
    """
    return norm <= _distance(logits, bound) / eps


def _distance(logits: Tensor, bound: Bound) -> Float[Tensor, "batch"]:
    p = logits.softmax(-1)
    return distance_to_center(p) if bound == "center" else distance_to_boundary(p)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RadiusPenalty:
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

    def _logits(self, outputs: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return logits whose softmax is the prediction; that of a class without probability is finite, too."""
        return outputs if self.outputs == "logits" else outputs.clamp_min(1e-12).log()


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExponentialPenalty(RadiusPenalty, abc.ABC):
    """The note's penalty ``α = exp(‖J̃‖ - d/(ρε))`` (eq. 15), for a norm that a subclass chooses.

    On the sphere it is ``exp(‖J_μ‖ - d/ε)``; in the stereographic chart the exponent is that, divided by ``ρ``.

    Args:
        cap: the exponent above which the exponential goes on as a straight line.
    """

    cap: float = Field(default=10.0, gt=0, le=40)

    @abc.abstractmethod
    def norm(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        *,
        generator: torch.Generator | None,
        create_graph: bool,
    ) -> Float[Tensor, "batch"]:
        """Return the norm of ``J_μ`` that is penalised."""

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"] | None = None,
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return ``α`` of each sample (eq. 15), differentiable with respect to the model's parameters.

        The labels play no part in it. The exponent is computed as ``(‖J_μ‖ - d/ε)/ρ``, which equals ``‖J̃‖ - d/(ρε)``.
        """
        logits = self._logits(logits)
        norm = self.norm(logits, inputs, generator=generator, create_graph=create_graph)
        logits = logits.to(norm.dtype)
        exponent = norm - _distance(logits, self.bound) / self.radius(logits.shape[-1])
        if self.chart == "stereographic":
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
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        *,
        generator: torch.Generator | None,
        create_graph: bool,
    ) -> Float[Tensor, "batch"]:
        """Return ``‖J_μ‖_F``."""
        return frobenius_norm(logits, inputs, probes=self.probes, generator=generator, create_graph=create_graph)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Spectral(ExponentialPenalty):
    """Eq. 15 with the spectral norm, which eq. 14 asks for (no simplification 4).

    Args:
        columns: size of the subspace in which the norm is sought, see
            :func:`jacobian_robust.jacobian.spectral_norm`; ``None`` is exact.
        tolerance: relative accuracy to which the subspace grows; ``None`` leaves it as it is.
    """

    columns: Count | None = None
    tolerance: Magnitude | None = None

    def norm(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        *,
        generator: torch.Generator | None,
        create_graph: bool,
    ) -> Float[Tensor, "batch"]:
        """Return ``‖J_μ‖₂``."""
        return spectral_norm(logits, inputs, columns=self.columns, tolerance=self.tolerance, create_graph=create_graph)


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
        wanted = torch.diag_embed(_distance(logits, self.bound).square()[:, None].expand(gram.shape[:2]))
        value = torch.linalg.matrix_norm(self.radius(logits.shape[-1]) ** 2 * gram - wanted)
        if self.chart == "stereographic":
            value = value * (-2 * log_conformal_factor(logits).clamp_min(math.log(self.rho_min))).exp()
        return value


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Margin:
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
    """

    eps: Magnitude
    kappa: Magnitude = 4.0
    probes: Count | None = None

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        norm = frobenius_norm(logits, inputs, probes=self.probes, generator=generator, create_graph=create_graph)
        distance = signed_distance_to_boundary(logits.to(norm.dtype).softmax(-1), labels)
        return nn.functional.softplus(self.eps * norm - distance, beta=self.kappa)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LinearMargin:
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
    """

    eps: Magnitude
    norm: Literal["linf", "l2"] = "linf"
    distance: Literal["fisher_rao", "logits"] = "fisher_rao"
    kappa: Magnitude = 4.0
    rivals: Count | None = 1

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        classes = logits.shape[-1]
        own = nn.functional.one_hot(labels, classes)
        others = min(self.rivals or classes, classes - 1)
        rivals = logits.detach().masked_fill(own.bool(), -torch.inf).topk(others, dim=-1).indices
        violations = []
        for rival in rivals.unbind(-1):
            distance, slope = self._distance(logits, own, nn.functional.one_hot(rival, classes))
            gradient = _gradient(logits, inputs, slope.to(logits.dtype), create_graph=create_graph)
            fall = self.eps * torch.linalg.vector_norm(gradient, ord=1 if self.norm == "linf" else 2, dim=-1)
            violations.append(fall - distance)
        return nn.functional.softplus(torch.stack(violations).amax(0), beta=self.kappa)

    def _distance(
        self,
        logits: Float[Tensor, "batch classes"],
        own: Int[Tensor, "batch classes"],
        rival: Int[Tensor, "batch classes"],
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch classes"]]:
        """Return the distance and its derivative with respect to the logits; the classes are one-hot.

        No root is differentiated where a probability underflows, and ``u² ≤ 1/2``.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.distance == "logits":
            difference = (own - rival).to(logits.dtype)
            return (logits * difference).sum(-1), difference
        theta, roots = logits.softmax(-1), (logits.log_softmax(-1) / 2).exp()
        signed = roots * (own - rival)
        u = signed.sum(-1, keepdim=True) / math.sqrt(2)
        slope = (signed - u * math.sqrt(2) * theta) / (2 * (1 - u.square())).sqrt()
        return 2 * u.squeeze(-1).asin(), slope


NOTE_DELTA_OVER_EPS = 1e-3
"""The note's ``δ_m/ε`` (section 4.2)."""


def condition_of(penalty: object, classes: int) -> tuple[float, Bound]:
    """Return the ``ε`` and the bound of eq. 14 that a penalty enforces; the note's for one that knows none, or none.

    Args:
        penalty: a penalty, or ``None``.
        classes: the number of classes.
    """
    penalty = innermost(penalty)
    if isinstance(penalty, Margin | LinearMargin):  # an ℓ∞ ball holds the Euclidean one of its radius
        return penalty.eps, "boundary"
    if isinstance(penalty, RadiusPenalty):
        return penalty.radius(classes), penalty.bound
    return max_distance_to_center(classes) / NOTE_DELTA_OVER_EPS, "center"


def innermost(penalty: Any) -> Any:
    """Return the penalty that a constraint is made of; any other as it is."""
    return getattr(penalty, "penalty", penalty)


def with_radius(penalty: Penalty, share: float) -> Penalty:
    """Return the penalty with a ``share`` of its radius ``ε``, the same in eq. 15's other notation ``δ_m/ε``.

    Raises:
        UserError: if it has no radius.
    """
    if isinstance(penalty, RadiusPenalty) and penalty.delta_over_eps is not None:
        return replace(penalty, delta_over_eps=penalty.delta_over_eps / share)
    radius = getattr(penalty, "eps", None)
    if radius is None:
        raise UserError(f"eps_schedule: {type(penalty).__name__} has no radius ε; give eps_schedule=none")
    changed: Penalty = replace(penalty, eps=radius * share)  # type: ignore[type-var]
    return changed


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LogitJacobian:
    """``‖J_s‖_F²/2`` of the logits' own Jacobian, by random projections.

    Hoffman, Roberts & Yaida, "Robust learning with Jacobian regularization", 2019: ``C/K Σ ‖v_kᵀ J_s‖²/2`` with
    directions uniform on the unit sphere, unbiased. The published loss is ``CE + λ·penalty``; here, up to a factor,
    ``λ = η/(1-η)``.

    Args:
        projections: number ``K`` of directions, a vector–Jacobian product each; ``None`` is exact.
    """

    projections: Count | None = 1

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"] | None = None,
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        classes = logits.shape[-1]
        if self.projections is None:
            directions = torch.eye(classes, device=logits.device).expand(len(logits), -1, -1).unbind(1)
            scale = 1.0
        else:
            projections = self.projections

            def normal(samples: int) -> Tensor:
                return torch.randn(projections, samples, classes, generator=generator)

            normals = drawn(normal, len(logits), generator, dim=1)
            directions = nn.functional.normalize(normals, dim=-1).to(logits.device).unbind(0)
            scale = classes / projections
        squares = [
            _gradient(logits, inputs, direction.to(logits.dtype), create_graph=create_graph).square().sum(-1)
            for direction in directions
        ]
        return scale / 2 * torch.stack(squares).sum(0)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class InputGradient:
    """``‖∇_x CE‖²``, the squared input gradient of the loss (Drucker & LeCun, 1992; Ross & Doshi-Velez, 2018).

    With ``norm="l1"`` ``‖∇_x CE‖₁``, the dual of the ℓ∞ norm: ``ε`` times it is the largest rise of the loss, to first
    order, in an ℓ∞ ball of radius ``ε`` (Lyu, Huang & Liang, 2015; Simon-Gabriel et al., 2019).

    Args:
        norm: ``l2``, squared, or ``l1``.
    """

    norm: Literal["l1", "l2"] = "l2"

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        gradient = _loss_gradient(logits, inputs, labels, create_graph=create_graph)
        return gradient.abs().sum(-1) if self.norm == "l1" else gradient.square().sum(-1)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VAT:
    """``KL(θ(x) ‖ θ(x + r))`` at the ``r`` of length ``ε`` along which the prediction changes fastest.

    The local distributional smoothness of Miyato et al., "Virtual adversarial training: a regularization method for
    supervised and semi-supervised learning", 2018. To second order the divergence is ``rᵀ G r / 2`` with the pull-back
    metric ``G = J_μᵀ J_μ``, so ``r`` is its top direction and the value ``ε²‖J_μ‖₂²/2``. The direction is found by
    power iteration, a product with ``G`` being the divergence's gradient at a small displacement; ``θ(x)`` and ``r``
    are constants for the gradient. It needs no second derivatives.

    Args:
        eps: Euclidean length ``ε`` of ``r``, in units of the inputs; ``x + r`` may leave [0, 1].
        xi: Euclidean length of the small displacement. The paper's 1e-6 drowns in float32's rounding.
        iterations: of the power iteration, a forward and a backward pass each.
    """

    input_graph: ClassVar[bool] = False

    eps: float = Field(gt=0, le=1e6)
    xi: float = Field(0.1, gt=0, le=1e6)
    iterations: Count = 1

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"] | None = None,
        *,
        model: Callable[[Tensor], Tensor],
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        inputs, log_theta = inputs.detach(), _log_softmax(logits.detach())

        def divergence(displaced: Tensor) -> Tensor:
            return (log_theta.exp() * (log_theta - _log_softmax(model(displaced)))).sum(-1)

        def normal(samples: int) -> Tensor:
            return torch.randn(samples, *inputs.shape[1:], generator=generator)

        direction = _unit(drawn(normal, len(inputs), generator).to(inputs))
        for _ in range(self.iterations):
            with torch.enable_grad():
                displaced = (inputs + self.xi * direction).requires_grad_()
                (gradient,) = torch.autograd.grad(divergence(displaced).sum(), displaced)
            direction = _unit(gradient)
        with torch.set_grad_enabled(create_graph):
            return divergence(inputs + self.eps * direction)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Curvature:
    """``‖∇ℓ(x + hz) - ∇ℓ(x)‖²``, the curvature of the cross-entropy ``ℓ`` along the sign ``z`` of its gradient.

    Moosavi-Dezfooli et al., "Robustness via curvature regularization, and vice versa", 2019 (CURE). ``z`` has unit
    length and is a constant for the gradient. To second order in ``h`` the value is ``h²‖Hz‖²`` with the Hessian ``H``.

    Args:
        h: Euclidean length of the step, in units of the inputs.
    """

    h: float = Field(gt=0, le=1e6)

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        *,
        model: Callable[[Tensor], Tensor],
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        here = _loss_gradient(logits, inputs, labels, create_graph=create_graph)
        z = _unit(here.detach().sign()).reshape(inputs.shape).to(inputs.dtype)
        with torch.enable_grad():
            displaced = (inputs.detach() + self.h * z).requires_grad_()
            there = _loss_gradient(model(displaced), displaced, labels, create_graph=create_graph)
        return (there - here).square().sum(-1)


def _log_softmax(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _unit(vectors: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
    """Return each sample's vector at unit length; one of zeros stays as it is."""
    flat = vectors.flatten(1)
    # By the largest entry first: the square of a confident network's gradient underflows.
    flat = flat / flat.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return nn.functional.normalize(flat, dim=-1).reshape(vectors.shape)


def _loss_gradient(
    logits: Float[Tensor, "batch classes"],
    inputs: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, "batch"],
    *,
    create_graph: bool,
) -> Float[Tensor, "batch n"]:
    """Return the input gradient of each sample's cross-entropy, ``(θ - y)ᵀ J_s``, flat."""
    theta = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    residual = theta - nn.functional.one_hot(labels, logits.shape[-1])
    return _gradient(logits, inputs, residual.to(logits.dtype), create_graph=create_graph)


def _gradient(
    logits: Float[Tensor, "batch classes"],
    inputs: Float[Tensor, "batch *shape"],
    direction: Float[Tensor, "batch classes"],
    *,
    create_graph: bool,
) -> Float[Tensor, "batch n"]:
    """Return ``vᵀ J_s`` of each sample in float32 or better, flat."""
    (row,) = torch.autograd.grad(logits, inputs, direction, create_graph=create_graph, retain_graph=True)
    return row.flatten(1).to(torch.promote_types(row.dtype, torch.float32))

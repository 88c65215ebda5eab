"""Published penalties to compare with: Jacobian regularisation, input gradients, virtual adversaries, curvature."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.options import STRICT, Count
from jacobian_robust.penalties.base import Model, Penalty, vector_jacobian_product
from jacobian_robust.randomness import drawn

__all__ = ["VAT", "Curvature", "InputGradient", "LogitJacobian"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LogitJacobian(Penalty):
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
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        classes = logits.shape[-1]
        if self.projections is None:
            directions = torch.eye(classes, device=logits.device).expand(len(logits), -1, -1).unbind(1)
            scale = 1.0
        else:
            normals = _normal(self.projections, len(logits), classes, generator=generator)
            directions = nn.functional.normalize(normals, dim=-1).to(logits.device).unbind(0)
            scale = classes / self.projections
        squares = [
            vector_jacobian_product(logits, inputs, direction.to(logits.dtype), create_graph=create_graph)
            .square()
            .sum(-1)
            for direction in directions
        ]
        return scale / 2 * torch.stack(squares).sum(0)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class InputGradient(Penalty):
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
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        gradient = _loss_gradient(logits, inputs, labels, create_graph=create_graph)
        return gradient.abs().sum(-1) if self.norm == "l1" else gradient.square().sum(-1)


class _AtOtherPoints(Penalty):
    """A penalty that evaluates the model at other points than the inputs."""

    @property
    def needs_model(self) -> bool:
        """Return ``True``."""
        return True

    def _given(self, model: Model | None) -> Model:
        if model is None:
            raise TypeError(f"{type(self).__name__} evaluates the model at other points: pass it as model=…")
        return model


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VAT(_AtOtherPoints):
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

    eps: float = Field(gt=0, le=1e6)
    xi: float = Field(0.1, gt=0, le=1e6)
    iterations: Count = 1

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
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        evaluate, inputs, log_theta = self._given(model), inputs.detach(), _log_softmax(logits.detach())

        def divergence(displaced: Tensor) -> Tensor:
            return (log_theta.exp() * (log_theta - _log_softmax(evaluate(displaced)))).sum(-1)

        direction = _unit(_normal(*inputs.shape, generator=generator).to(inputs))
        for _ in range(self.iterations):
            with torch.enable_grad():
                displaced = (inputs + self.xi * direction).requires_grad_()
                (gradient,) = torch.autograd.grad(divergence(displaced).sum(), displaced)
            direction = _unit(gradient)
        with torch.set_grad_enabled(create_graph):
            return divergence(inputs + self.eps * direction)

    @property
    def needs_graph(self) -> bool:
        """Return ``False``: the displaced inputs have a graph of their own."""
        return False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Curvature(_AtOtherPoints):
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
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters."""
        evaluate = self._given(model)
        here = _loss_gradient(logits, inputs, labels, create_graph=create_graph)
        z = _unit(here.detach().sign()).reshape(inputs.shape).to(inputs.dtype)
        with torch.enable_grad():
            displaced = (inputs.detach() + self.h * z).requires_grad_()
            there = _loss_gradient(evaluate(displaced), displaced, labels, create_graph=create_graph)
        return (there - here).square().sum(-1)


def _normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Return normal numbers drawn on the generator's device, the CPU by default."""
    place = generator.device if generator is not None else "cpu"
    return drawn(lambda: torch.randn(shape, generator=generator, device=place), generator)


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
    return vector_jacobian_product(logits, inputs, residual.to(logits.dtype), create_graph=create_graph)

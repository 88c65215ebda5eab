"""Penalties on a bound over the whole ball around each image, in place of a derivative at the image."""

from dataclasses import replace
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.bounds import (
    certified_margin,
    fisher_rao_margin,
    lipschitz_margin,
    margin_bounds,
    output_box,
    right_in_box,
)
from jacobian_robust.bounds.lipschitz import PowerIteration, pairwise_constants
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.options import STRICT, Count
from jacobian_robust.penalties.base import Magnitude, Model, Penalty
from jacobian_robust.randomness import drawn

__all__ = ["CertifiedMargin", "GloRo"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class _OfTheBall(Penalty):
    """What the penalties share: a radius that may rise, another one to certify, and the model in place of a graph.

    Args:
        eps: radius of the ball in training, in units of the inputs.
        target: radius that :meth:`certified` is asked for; ``None`` for ``eps``.
    """

    eps: Magnitude
    target: Magnitude | None = None

    @property
    def needs_graph(self) -> bool:
        """Return ``False``: the bound is differentiated with respect to the weights alone."""
        return False

    @property
    def needs_model(self) -> bool:
        """Return ``True``: the bound is the model's."""
        return True

    def with_radius(self, share: float) -> Penalty:
        """Return the penalty with ``share`` times its radius, and the same target."""
        return replace(self, eps=self.eps * share, target=self.target or self.eps)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CertifiedMargin(_OfTheBall):
    """A loss of the worst logits that interval bounds allow in the ℓ∞ ball, which is clipped to [0, 1].

    With ``u_j ≥ s_j(x') − s_y(x')`` for all ``x'`` in the ball (:func:`jacobian_robust.bounds.margin_bounds`), the
    penalty is the cross-entropy ``log Σ_j e^{u_j}`` of the worst logits (Gowal et al., "On the effectiveness of
    interval bound propagation for training verifiably robust models", 2018), or ``softplus(−κ d_y)/κ`` of the
    certified Fisher–Rao margin ``d_y`` (:func:`jacobian_robust.bounds.fisher_rao_margin`). It uses no adversarial
    example and no derivative with respect to the input. Let ``eps`` and the weight rise from small values:
    ``eps_schedule=linear eta=linear``. With an adversary, whose point the cross-entropy is then taken at, the loss is
    MTL-IBP's (De Palma et al., 2024).

    Args:
        eps: radius of the ball in training, in units of the inputs.
        form: ``cross_entropy`` or ``margin``. The margin is at most π/2, and its gradient vanishes for loose bounds.
        kappa: sharpness ``κ`` of the form ``margin``.
        target: radius that :meth:`certified` is asked for; ``None`` for ``eps``. Training at a somewhat larger ``eps``
            certifies more images at the target.
        family: of the distribution that the outputs describe. Of another than the categorical one the penalty is the
            mean over the targets of the largest negative log-likelihood within the bounds of the outputs.
    """

    form: Literal["cross_entropy", "margin"] = "cross_entropy"
    kappa: Magnitude = 4.0
    family: Family = CATEGORICAL

    @model_validator(mode="after")
    def _margin_of_classes(self) -> "CertifiedMargin":
        if self.form == "margin" and not isinstance(self.family, Categorical):
            raise ValueError("form=margin is of class logits; give form=cross_entropy")
        return self

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
        if model is None:
            raise TypeError("CertifiedMargin bounds the model: pass it as model=…")
        with torch.set_grad_enabled(create_graph):
            if not isinstance(self.family, Categorical):
                lower, upper = output_box(cast(nn.Module, model), inputs, labels, self.eps, self.family)
                return self.family.worst_loss(lower, upper, labels)
            bounds = margin_bounds(cast(nn.Module, model), inputs, labels, self.eps)
            if self.form == "cross_entropy":
                return nn.functional.cross_entropy(bounds, labels, reduction="none")
            return nn.functional.softplus(-fisher_rao_margin(bounds, labels), beta=self.kappa)

    def certified(
        self, model: nn.Module, inputs: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Bool[Tensor, "batch"]:
        """Return whether interval bounds, in double precision, certify each sample at the target."""
        with torch.no_grad():
            if not isinstance(self.family, Categorical):
                box = output_box(model, inputs, labels, self.target or self.eps, self.family, float64=True)
                return right_in_box(self.family, *box, labels)
            return certified_margin(model, inputs, labels, self.target or self.eps, float64=True) > 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GloRo(_OfTheBall):
    """A loss of the logits when every other class has gained what the network's ℓ2 Lipschitz constants allow it.

    With ``K_iy`` a bound of the constant of ``s_i − s_y`` (:func:`jacobian_robust.bounds.lipschitz.pairwise_constants`)
    no point within ``ε`` has ``s_i − s_y`` above its value at the image by more than ``εK_iy``. ``bottom`` is the
    cross-entropy with one more class, ``s_⊥ = max_{i≠y} (s_i + εK_iy)`` (Leino, Wang & Fredrikson, "Globally-robust
    neural networks", 2021); ``margin`` is that of the logits ``s_i + εK_iy`` (Tsuzuku, Sato & Sugiyama,
    "Lipschitz-margin training", 2018), which suits 1-Lipschitz layers with a temperature (Prach & Lampert, 2022; the
    temperature is theirs). The norms of the layers are by power iteration, which is no bound; :meth:`certified`
    takes one that holds. Let ``eps`` rise from a small value, ``eps_schedule=linear``: from the start a large one leads
    to a constant prediction.

    Args:
        eps: radius of the ℓ2 ball in training, in units of the inputs.
        target: radius that :meth:`certified` is asked for; ``None`` for ``eps``.
        form: ``bottom`` or ``margin``.
        temperature: what the logits are multiplied by in the cross-entropy, which is divided by it.
        iterations: of the power iteration for each layer, on one image, from a new start in each step.
    """

    form: Literal["bottom", "margin"] = "bottom"
    temperature: Magnitude = 1.0
    iterations: Count = 10

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
        if model is None:
            raise TypeError("GloRo bounds the model: pass it as model=…")
        place = generator.device if generator is not None else "cpu"

        def normal(shape: torch.Size) -> Tensor:
            return drawn(lambda: torch.randn(shape, generator=generator, device=place), generator)

        with torch.set_grad_enabled(create_graph):
            constants = pairwise_constants(model, inputs[:1].detach(), PowerIteration(self.iterations, normal))
            lifted = logits + self.eps * constants[labels]  # its diagonal is 0
            if self.form == "bottom":
                own = nn.functional.one_hot(labels, logits.shape[-1]).bool()
                lifted = torch.cat([logits, lifted.masked_fill(own, -torch.inf).amax(-1, keepdim=True)], -1)
            loss = nn.functional.cross_entropy(self.temperature * lifted, labels, reduction="none")
            return loss / self.temperature

    def certified(
        self, model: nn.Module, inputs: Float[Tensor, "batch *shape"], labels: Int[Tensor, "batch"]
    ) -> Bool[Tensor, "batch"]:
        """Return whether a sound bound of the constants, in double precision, certifies each sample at the target."""
        return lipschitz_margin(model, inputs, labels) >= (self.target or self.eps)

"""The loss of a batch: cross-entropy, or an adversary's, and the penalty (the note's eq. 16)."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from jacobian_robust.adversaries import Adversary, Place
from jacobian_robust.geometry.families import CATEGORICAL, Family
from jacobian_robust.penalties import Penalty

__all__ = ["Batch", "LossTerms", "loss_terms"]

Batch = tuple[Float[Tensor, "batch *shape"], Shaped[Tensor, "batch *_"]]


@runtime_checkable
class Classifier(Protocol):
    """Maps inputs to logits by its ``model``, which an adversary attacks."""

    model: nn.Module

    def __call__(self, inputs: Float[Tensor, "batch *shape"], /) -> Float[Tensor, "batch *outputs"]:
        """Return the logits."""


class LossTerms(NamedTuple):
    """The loss of one batch and what it is made of, each a mean over the batch; and the logits behind them."""

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    penalty: Float[Tensor, ""] | None
    logits: Float[Tensor, "batch *outputs"]


@dataclass
class _Passes:
    """The forward passes of a batch, at most one at each place."""

    classify: Callable[[Tensor], Tensor]
    points: dict[Place, Tensor]
    known: dict[Place, Tensor] = field(default_factory=dict)

    def logits_at(self, place: Place) -> Tensor:
        if place not in self.known:
            self.known[place] = self.classify(self.points[place])
        return self.known[place]

    def watched(self, place: Place, samples: int | None, *, needs_graph: bool) -> tuple[Tensor, Tensor]:
        """Return the first samples at a place and their logits, with a graph to the samples if that is needed."""
        points = self.points[place]
        watched = points[:samples]
        if not needs_graph:
            return watched, self.logits_at(place)[:samples]
        if not watched.requires_grad:
            watched = watched.detach().requires_grad_()
        logits = self.known[place] = self.classify(watched)
        if len(watched) < len(points):
            # Two passes cost what one does, and no derivative is taken with respect to the rest.
            self.known[place] = torch.cat([logits, self.classify(points[len(watched) :])])
        return watched, logits


def loss_terms(
    classifier: Classifier,
    batch: Batch,
    *,
    eta: float | Tensor,
    penalty: Penalty | None,
    adversary: Adversary | None,
    family: Family = CATEGORICAL,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
    weight: int | float = 1,
    penalised: int | None = None,
) -> LossTerms:
    """Return the loss ``(1 - η)·CE + η·weight·mean(α)`` of a batch and its parts.

    Args:
        classifier: maps inputs to logits.
        batch: inputs and labels.
        eta: ``η``.
        penalty: ``α``; ``None`` leaves ``CE`` alone.
        adversary: displaces the inputs and says what stands for ``CE``.
        family: of the distribution that the model's outputs describe; its negative log-likelihood is ``CE``.
        generator: source of the penalty's random probes.
        create_graph: make the penalty differentiable; without it, only its value is computed.
        weight: by what ``η·mean(α)`` is multiplied; with 0 the penalty is not computed.
        penalised: how many of the inputs the penalty is computed of, the first ones; all by default.
    """
    inputs, labels = batch
    passes = _Passes(classifier, {"clean": inputs})
    fit_at: Place = "clean"
    if adversary is not None:
        fit_at = adversary.fit_at
        passes.points["adversary"] = adversary.perturb(classifier.model, inputs, labels)
    if penalty is None or not weight:
        fit, cross_entropy = _fit(passes, labels, adversary, family)
        loss = fit if penalty is None else (1 - eta) * fit
        return LossTerms(loss, cross_entropy, None, passes.logits_at(fit_at))
    place: Place = "clean" if adversary is None else adversary.penalty_at
    more: dict[str, Any] = {"model": classifier} if penalty.needs_model else {}
    with torch.enable_grad():
        watched, logits = passes.watched(place, penalised, needs_graph=penalty.needs_graph)
        fit, cross_entropy = _fit(passes, labels, adversary, family)
        with _full_precision(inputs.device):
            alpha = penalty(logits, watched, labels[:penalised], generator=generator, create_graph=create_graph, **more)
            mean = alpha.mean()
        loss = (1 - eta) * fit + eta * weight * mean
    return LossTerms(loss, cross_entropy, mean, passes.logits_at(fit_at))


def _fit(passes: _Passes, labels: Tensor, adversary: Adversary | None, family: Family) -> tuple[Tensor, Tensor]:
    """Return the loss that fits the labels, and the cross-entropy."""
    if adversary is not None:
        return adversary.fit(passes.logits_at, labels)
    cross_entropy = family.loss(passes.logits_at("clean"), labels)
    return cross_entropy, cross_entropy


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which mixed precision, if it is on, is off."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else contextlib.nullcontext()

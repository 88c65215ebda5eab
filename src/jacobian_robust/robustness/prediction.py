"""What the geometry predicts against what attacks find: is a Jacobian a promise of robustness?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jacobian_robust.attacks import FAB, distances
from jacobian_robust.geometry import distance_to_boundary, distance_to_center
from jacobian_robust.jacobian import jacobian_norms
from jacobian_robust.penalties import Bound
from jacobian_robust.robustness.budgets import attack_standing
from jacobian_robust.robustness.estimates import ESTIMATES, Prediction
from jacobian_robust.robustness.schema import Condition, FirstOrder
from jacobian_robust.robustness.workers import Attackers, one_by_one

__all__ = ["JacobianNorm", "Nearest", "Radii", "Sample", "compare", "radii", "smallest_perturbations"]

JacobianNorm = Literal["frobenius", "spectral"]


@dataclass(frozen=True)
class Radii:
    """The Fisher–Rao distances and the Jacobian's norms at each image.

    Attributes:
        center: δ, the distance of the prediction to the simplex's centre (eq. 6).
        boundary: d_B, its exact distance to the decision boundary.
        frobenius: ``‖J_μ‖_F``.
        spectral: ``‖J_μ‖₂``.
        prediction: how the radius was estimated, and
        estimate: the radius; ``None`` for ``first_order``, which the others imply.
    """

    center: Float[Tensor, "images"]
    boundary: Float[Tensor, "images"]
    frobenius: Float[Tensor, "images"]
    spectral: Float[Tensor, "images"]
    prediction: Prediction = "first_order"
    estimate: Float[Tensor, "images"] | None = None

    @property
    def predicted(self) -> Float[Tensor, "images"]:
        """The estimate; else the first-order radius ``d_B/‖J_μ‖₂``, which a linear model of ``μ`` asks for."""
        return self.boundary / self.spectral if self.estimate is None else self.estimate

    def first(self, number: int) -> "Radii":
        """Return the same of the first images alone."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        cut: dict[str, Any] = {name: value[:number] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **cut)

    def satisfy(self, *, bound: Bound, norm: JacobianNorm, eps: float) -> Bool[Tensor, "images"]:
        """Return at which images ``‖J_μ‖ ≤ d/ε``: eq. 14 for the spectral norm and the distance to the center.

        Args:
            bound: the distance ``d``: to the ``center`` (δ) or to the decision ``boundary`` (d_B).
            norm: of the Jacobian.
            eps: the Euclidean radius ``ε``, in units of the inputs.
        """
        distance = self.center if bound == "center" else self.boundary
        return (self.frobenius if norm == "frobenius" else self.spectral) * eps <= distance


@dataclass(frozen=True)
class Nearest:
    """The nearest adversarial examples that were found.

    Attributes:
        length: ℓ2 length of each perturbation; infinite where none was found.
        examples: the adversarial images; the clean ones where none was found.
    """

    length: Float[Tensor, "images"]
    examples: Float[Tensor, "images *shape"]


@dataclass(frozen=True)
class Sample:
    """Images of one split and what is known of them.

    Attributes:
        images: pixels in [0, 1].
        correct: which of them are classified correctly.
        radii: the distances and the norms there.
        nearest: the nearest adversarial examples of the correct ones.
        smallest: the ℓ2 length of the smallest perturbation known to break each, by any attack; infinite for none.
    """

    images: Float[Tensor, "images *shape"]
    correct: Bool[Tensor, "images"]
    radii: Radii
    nearest: Nearest
    smallest: Float[Tensor, "images"]

    def first(self, number: int) -> "Sample":
        """Return the same of the first images alone."""
        nearest = Nearest(self.nearest.length[:number], self.nearest.examples[:number])
        return Sample(
            self.images[:number], self.correct[:number], self.radii.first(number), nearest, self.smallest[:number]
        )


def radii(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    progress: Callable[[int], None] = lambda images: None,
    prediction: Prediction = "first_order",
) -> Radii:
    """Return the distances and the exact norms at images with pixels in [0, 1].

    Args:
        model: returns logits, in evaluation mode.
        images: on the device of the model.
        progress: called with the number of images after each batch.
        prediction: how the radius is estimated.
    """
    estimate = ESTIMATES.get(prediction)
    estimates: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for chunk in images.split(50):
        inputs = chunk.clone().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            logits = model(inputs)
            frobenius, spectral = jacobian_norms(logits, inputs)
        theta = logits.detach().double().softmax(-1)  # a confident prediction's distance to the vertex needs the digits
        parts.append((distance_to_center(theta), distance_to_boundary(theta), frobenius.detach(), spectral.detach()))
        if estimate:
            estimates.append(estimate(model, chunk))
        progress(len(chunk))
    center, boundary, frobenius, spectral = (torch.cat(part).to(images.dtype) for part in zip(*parts, strict=True))
    return Radii(center, boundary, frobenius, spectral, prediction, torch.cat(estimates) if estimate else None)


def smallest_perturbations(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Int[Tensor, "images"],
    correct: Bool[Tensor, "images"],
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda images: None,
    attackers: Attackers = one_by_one,
) -> Nearest:
    """Return the smallest ℓ2 perturbations that FAB found for the correct images."""
    attack = FAB(name="fab_smallest", norm="l2", eps=(math.sqrt(images[0].numel()),), steps=20, targets=4)
    smallest = Nearest(images.new_full((len(images),), torch.inf), images.clone())
    standing = correct.clone()
    batches = attack_standing(model, images, labels, standing, attack, attack.eps[0], seed=seed, attackers=attackers)
    for batch in batches:
        lengths = distances(images[batch.indices], batch.adversarial, "l2")
        smallest.length[batch.indices] = torch.where(batch.fallen, lengths, torch.inf)
        smallest.examples[batch.indices[batch.fallen]] = batch.adversarial[batch.fallen]
        progress(len(batch.indices))
    return smallest


def compare(
    predicted: Radii,
    smallest: Float[Tensor, "images"],
    correct: Bool[Tensor, "images"],
    budgets: Sequence[float],
) -> FirstOrder:
    """Return how the prediction and the note's condition fare against what was found, over the correct images.

    Args:
        predicted: at all images.
        smallest: length of the smallest ℓ2 perturbation known to break each image; infinite for none.
        correct: which images are classified correctly.
        budgets: the radii at which the condition is looked at.
    """
    radius, found_at = predicted.predicted[correct], smallest[correct]
    known = found_at.isfinite()
    correlation = None
    if int(known.sum()) > 2:
        from scipy.stats import spearmanr  # not at the top: it takes a second

        value = float(spearmanr(radius[known].cpu(), found_at[known].cpu()).statistic)
        correlation = value if math.isfinite(value) else None
    conditions = []
    for eps in budgets:
        fell = found_at <= eps
        center, boundary = (
            predicted.satisfy(bound=bound, norm="spectral", eps=eps)[correct] for bound in get_args(Bound)
        )
        conditions.append(
            Condition(
                eps=eps,
                survived=int((~fell).sum()),
                fell=int(fell.sum()),
                center_survived=int((center & ~fell).sum()),
                center_fell=int((center & fell).sum()),
                boundary_survived=int((boundary & ~fell).sum()),
                boundary_fell=int((boundary & fell).sum()),
            )
        )
    return FirstOrder(
        prediction=predicted.prediction,
        images=int(correct.sum()),
        found=int(known.sum()),
        rank_correlation=correlation,
        unsafe=int((found_at < radius).sum()),
        median_predicted=_median(radius),
        median_found=_median(found_at[known]),
        conditions=conditions,
    )


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None

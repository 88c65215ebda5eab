"""What ``simplifications.json`` holds."""

from itertools import product
from typing import Literal, get_args

from pydantic import Field

from jacobian_robust.penalties import Bound
from jacobian_robust.robustness.prediction import JacobianNorm
from jacobian_robust.robustness.schema import Strict

FORMAT: Literal[1] = 1
"""Raised whenever a field changes its meaning, its type or its place."""

DISTANCES: dict[Bound, str] = {"center": "δ", "boundary": "d_B"}
"""As they are written for a reader."""

Split = Literal["evaluated", "training"]
"""Whether a classifier was trained on the images."""

JACOBIAN_NORMS: dict[JacobianNorm, str] = {"frobenius": "‖J‖_F", "spectral": "‖J‖₂"}

VARIANTS: tuple[tuple[Bound, JacobianNorm], ...] = tuple(product(get_args(Bound), get_args(JacobianNorm)))
"""Of the condition; the note's penalty first."""


class Distribution(Strict):
    """Quantiles of a quantity over images; those where it is not a finite number are left out."""

    images: int = Field(description="How many it is finite for.")
    smallest: float = Field(description="The smallest value.")
    q05: float = Field(description="5% are below.")
    q25: float = Field(description="The lower quartile.")
    median: float = Field(description="Half are below.")
    q75: float = Field(description="The upper quartile.")
    q95: float = Field(description="95% are below.")
    largest: float = Field(description="The largest value.")


class Agreement(Strict):
    """Simplification 1 at one radius: how many images satisfy the condition with δ and how many with d_B."""

    eps: float = Field(description="The Euclidean radius ε.")
    norm: JacobianNorm = Field(description="Of the Jacobian.")
    both: int = Field(description="Images that satisfy it with either distance.")
    center_only: int = Field(description="With δ alone.")
    boundary_only: int = Field(description="With d_B alone: none, since d_B ≤ δ.")
    neither: int = Field(description="With neither.")


class FlatnessPoint(Strict):
    """Simplification 2 at one radius: ``d(F(x), F(x + rv))`` over its first order ``‖J_μ v‖ r``, for unit vectors v."""

    radius: float = Field(description="The Euclidean length ``r``.")
    worst: Distribution | None
    """Along the top right singular vector of ``J_μ``, where it is over ``‖J_μ‖₂ r``; of both signs the larger."""
    worst_outside: float
    """Share of the images for which one of these points has pixels outside [0, 1], a box that the geometry ignores."""
    attack: Distribution | None = Field(description="Along the nearest adversarial perturbation found.")
    attack_outside: float | None
    """Share of the images with such a perturbation whose point has pixels outside [0, 1]; null where there is none."""


class OffBy(Strict):
    """From which radius on the first order is off by a tenth, image by image."""

    images: int = Field(description="Images with such a direction.")
    over: int
    """Where the true displacement is larger by then: the model moves faster than ``J_μ`` says."""
    under: int = Field(description="Where it is smaller by then.")
    never: int = Field(description="Where neither happens up to the largest radius.")
    radius: Distribution | None = Field(description="The radius, over the images where it happens.")


class Flatness(Strict):
    """Simplification 2: how far the first order holds, on the evaluated images."""

    points: list[FlatnessPoint] = Field(description="By radius.")
    worst: OffBy = Field(description="Along the worst directions, by the sign that is off first.")
    attack: OffBy = Field(description="Along the nearest adversarial perturbations found.")
    alignment: Distribution | None
    """``‖J_μ v‖ / ‖J_μ‖₂`` for the latter: 1 where the attack takes the worst direction of the Jacobian."""


class Satisfied(Strict):
    """Simplification 5: how many images satisfy the condition, seen in training or not."""

    eps: float = Field(description="The Euclidean radius ε.")
    bound: Bound = Field(description="The distance ``d``: ``center`` (δ) or ``boundary`` (d_B).")
    norm: JacobianNorm = Field(description="Of the Jacobian.")
    evaluated: float = Field(description="Share of the evaluated images.")
    training: float | None = Field(description="Share of the training images; null where these are not known.")


class Epoch(Strict):
    """Simplification 6 during training: as the run's monitor recorded it, on the first images of its splits."""

    epoch: int = Field(description="From 1.")
    train: float | None = Field(description="Share of training images that satisfy eq. 14, by the exact spectral norm.")
    validation: float | None = Field(description="The same of the images of its validation curves.")


class Falls(Strict):
    """What the condition promised at one radius and what attacks found, over the correctly classified images.

    A fall where the condition holds is put down to the first simplification, in the note's order, without which there
    would have been no promise: 1 if ``‖J_μ‖₂ ≤ d_B/ε`` fails; else 2, since there a flat metric rules the fall out. A
    fall where the condition is violated is put down to 5 and 6: training did not enforce it there.
    """

    split: Split = Field(description="Which images: on training images FAB alone looked for adversarial examples.")
    eps: float = Field(description="The Euclidean radius ε.")
    bound: Bound = Field(description="The distance ``d``: ``center`` (δ) or ``boundary`` (d_B).")
    norm: JacobianNorm = Field(description="Of the Jacobian.")
    images: int = Field(description="Correct images.")
    fell: int = Field(description="Of these, those misclassified under attack: the falls.")
    satisfied: int = Field(description="How many satisfy the condition.")
    satisfied_fell: int = Field(description="Of these, the falls: the next two together.")
    by_center: int = Field(description="Put down to simplification 1: ``‖J_μ‖₂ > d_B/ε``.")
    by_center_examples: int = Field(description="Of these, for how many an adversarial example inside ε is at hand.")
    by_center_alone: int
    """Of the examples, how many the first order itself takes to the boundary, ``(1 + 1/10) ‖J_μ (x' - x)‖ ≥ d_B``; for
    the others flatness failed as well."""
    by_curvature: int = Field(description="Put down to simplification 2: ``‖J_μ‖₂ ≤ d_B/ε``.")
    by_curvature_examples: int = Field(description="Of these, for how many an adversarial example inside ε is at hand.")
    contradictions: int
    """Of the examples, how many are nearer to the clean prediction than d_B, in the true distance: none, or the
    geometry is wrong."""
    overshoot: Distribution | None
    """True Fisher–Rao displacement to the examples over the most that a flat metric allows, ``‖J_μ‖₂ ‖x' - x‖``, where
    the condition held: above 1 the metric is not flat."""
    violated_fell: int = Field(description="Falls that violate the condition: put down to simplifications 5 and 6.")
    violated_stood: int
    """Robust images that violate it: what its strictness denies, or attacks did not find."""
    strict_stood: int
    """Of these, how many satisfy it by the spectral norm: what simplification 4 costs. None for the spectral norm."""


class ModelSimplifications(Strict):
    """The six simplifications for one classifier."""

    name: str = Field(description="As in ``robustness.json``.")
    images: int = Field(description="Evaluated images looked at, the first of the split.")
    training_images: int | None
    """Training images looked at, the first of the training split; null where they are not known."""
    condition_eps: float | None
    """The ε of eq. 14 that its training recorded: its penalty's, its twin's, or the note's; null where the checkpoint
    does not say."""
    condition_bound: Bound | None = Field(description="The distance of that condition.")
    center_over_boundary: Distribution | None = Field(description="Simplification 1: δ/d_B.")
    agreements: list[Agreement] = Field(description="Simplification 1, by radius and norm, over all images.")
    flatness: Flatness
    """Simplification 2. There is nothing to measure for simplification 3: eqs. 9 and 10 are equivalent."""
    frobenius_over_spectral: Distribution | None = Field(description="Simplification 4: ``‖J_μ‖_F/‖J_μ‖₂``.")
    satisfied: list[Satisfied] = Field(description="Simplification 5, by radius and variant, over all images.")
    epochs: list[Epoch] = Field(description="Simplification 6; empty where the checkpoint does not say.")
    falls: list[Falls] = Field(description="By split, radius and variant.")

    def falls_of(self, split: Split) -> list[Falls]:
        """Return those of one split, by radius and variant."""
        return [fall for fall in self.falls if fall.split == split]


class Simplifications(Strict):
    """What ``simplifications.json`` holds: the note's six simplifications, measured."""

    format: Literal[1] = FORMAT
    """Version of this schema."""
    split: Literal["test", "validation"] = Field(description="Which images were evaluated.")
    seed: int = Field(description="Of the attacks.")
    attacks: list[str]
    """The ℓ2 attacks whose perturbations count, on the evaluated images; FAB for every image goes without saying."""
    models: list[ModelSimplifications] = Field(description="The evaluated classifiers.")

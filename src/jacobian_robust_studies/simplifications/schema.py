"""What ``simplifications.json`` holds."""

from itertools import product
from typing import Literal, get_args

from jacobian_robust.penalties import Bound
from jacobian_robust.robustness.prediction import JacobianNorm
from jacobian_robust.robustness.schema import Strict

__all__ = [
    "DISTANCES",
    "FORMAT",
    "JACOBIAN_NORMS",
    "VARIANTS",
    "Agreement",
    "Distribution",
    "Epoch",
    "Falls",
    "Flatness",
    "FlatnessPoint",
    "ModelSimplifications",
    "OffBy",
    "Satisfied",
    "Simplifications",
    "Split",
]

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

    images: int
    """How many it is finite for."""
    smallest: float
    """The smallest value."""
    q05: float
    """5% are below."""
    q25: float
    """The lower quartile."""
    median: float
    """Half are below."""
    q75: float
    """The upper quartile."""
    q95: float
    """95% are below."""
    largest: float
    """The largest value."""


class Agreement(Strict):
    """Simplification 1 at one radius: how many images satisfy the condition with δ and how many with d_B."""

    eps: float
    """The Euclidean radius ε."""
    norm: JacobianNorm
    """Of the Jacobian."""
    both: int
    """Images that satisfy it with either distance."""
    center_only: int
    """With δ alone."""
    boundary_only: int
    """With d_B alone: none, since d_B ≤ δ."""
    neither: int
    """With neither."""


class FlatnessPoint(Strict):
    """Simplification 2 at one radius: ``d(F(x), F(x + rv))`` over its first order ``‖J_μ v‖ r``, for unit vectors v."""

    radius: float
    """The Euclidean length ``r``."""
    worst: Distribution | None
    """Along the top right singular vector of ``J_μ``, where it is over ``‖J_μ‖₂ r``; of both signs the larger."""
    worst_outside: float
    """Share of the images for which one of these points has pixels outside [0, 1], a box that the geometry ignores."""
    attack: Distribution | None
    """Along the nearest adversarial perturbation found."""
    attack_outside: float | None
    """Share of the images with such a perturbation whose point has pixels outside [0, 1]; null where there is none."""


class OffBy(Strict):
    """From which radius on the first order is off by a tenth, image by image."""

    images: int
    """Images with such a direction."""
    over: int
    """Where the true displacement is larger by then: the model moves faster than ``J_μ`` says."""
    under: int
    """Where it is smaller by then."""
    never: int
    """Where neither happens up to the largest radius."""
    radius: Distribution | None
    """The radius, over the images where it happens."""


class Flatness(Strict):
    """Simplification 2: how far the first order holds, on the evaluated images."""

    points: list[FlatnessPoint]
    """By radius."""
    worst: OffBy
    """Along the worst directions, by the sign that is off first."""
    attack: OffBy
    """Along the nearest adversarial perturbations found."""
    alignment: Distribution | None
    """``‖J_μ v‖ / ‖J_μ‖₂`` for the latter: 1 where the attack takes the worst direction of the Jacobian."""


class Satisfied(Strict):
    """Simplification 5: how many images satisfy the condition, seen in training or not."""

    eps: float
    """The Euclidean radius ε."""
    bound: Bound
    """The distance ``d``: ``center`` (δ) or ``boundary`` (d_B)."""
    norm: JacobianNorm
    """Of the Jacobian."""
    evaluated: float
    """Share of the evaluated images."""
    training: float | None
    """Share of the training images; null where these are not known."""


class Epoch(Strict):
    """Simplification 6 during training: as the run's monitor recorded it, on the first images of its splits."""

    epoch: int
    """From 1."""
    train: float | None
    """Share of training images that satisfy eq. 14, by the exact spectral norm."""
    validation: float | None
    """The same of the images of its validation curves."""


class Falls(Strict):
    """What the condition promised at one radius and what attacks did, over the correctly classified images.

    A fall under a condition that holds is put down to the first simplification, in the note's order, without which
    there would have been no promise: 1 if ``‖J_μ‖₂ ≤ d_B/ε`` fails; else 2, since there a flat metric rules the fall
    out. A fall where the condition is violated is put down to 5 and 6: training did not enforce
    it there.
    """

    split: Split
    """Which images: on training images FAB alone looked for adversarial examples."""
    eps: float
    """The Euclidean radius ε."""
    bound: Bound
    """The distance ``d``: ``center`` (δ) or ``boundary`` (d_B)."""
    norm: JacobianNorm
    """Of the Jacobian."""
    images: int
    """Correct images."""
    fell: int
    """Of these, how many fell."""
    satisfied: int
    """How many satisfy the condition."""
    satisfied_fell: int
    """Of these, how many fell: the next two together."""
    by_center: int
    """Put down to simplification 1: ``‖J_μ‖₂ > d_B/ε``."""
    by_center_examples: int
    """Of these, for how many an adversarial example inside ε is at hand."""
    by_center_alone: int
    """Of the examples, how many the first order itself takes to the boundary, ``(1 + 1/10) ‖J_μ (x' - x)‖ ≥ d_B``; for
    the others flatness failed as well."""
    by_curvature: int
    """Put down to simplification 2: ``‖J_μ‖₂ ≤ d_B/ε``."""
    by_curvature_examples: int
    """Of these, for how many an adversarial example inside ε is at hand."""
    contradictions: int
    """Of the examples, how many are nearer to the clean prediction than d_B, in the true distance: none, or the
    geometry is wrong."""
    overshoot: Distribution | None
    """True Fisher–Rao displacement to the examples over the most that a flat metric allows, ``‖J_μ‖₂ ‖x' - x‖``, where
    the condition held: above 1 the metric is not flat."""
    violated_fell: int
    """Images that violate the condition, and fell: put down to simplifications 5 and 6."""
    violated_stood: int
    """Images that violate it, and stood: what its strictness denies, or attacks did not find."""
    strict_stood: int
    """Of these, how many satisfy it by the spectral norm: what simplification 4 costs. None for the spectral norm."""


class ModelSimplifications(Strict):
    """The six simplifications for one classifier."""

    name: str
    """As in ``robustness.json``."""
    images: int
    """Evaluated images looked at, the first of the split."""
    training_images: int | None
    """Training images looked at, the first of the training split; null where they are not known."""
    condition_eps: float | None
    """The ε of eq. 14 that its training recorded: its penalty's, its twin's, or the note's; null where the checkpoint
    does not say."""
    condition_bound: Bound | None
    """The distance of that condition."""
    center_over_boundary: Distribution | None
    """Simplification 1: δ/d_B."""
    agreements: list[Agreement]
    """Simplification 1, by radius and norm, over all images."""
    flatness: Flatness
    """Simplification 2. There is nothing to measure for simplification 3: eqs. 9 and 10 are equivalent."""
    frobenius_over_spectral: Distribution | None
    """Simplification 4: ``‖J_μ‖_F/‖J_μ‖₂``."""
    satisfied: list[Satisfied]
    """Simplification 5, by radius and variant, over all images."""
    epochs: list[Epoch]
    """Simplification 6; empty where the checkpoint does not say."""
    falls: list[Falls]
    """By split, radius and variant."""

    def falls_of(self, split: Split) -> list[Falls]:
        """Return those of one split, by radius and variant."""
        return [fall for fall in self.falls if fall.split == split]


class Simplifications(Strict):
    """What ``simplifications.json`` holds: the note's six simplifications, measured."""

    format: Literal[1] = FORMAT
    """Version of this schema."""
    split: Literal["test", "validation"]
    """Which images were evaluated."""
    seed: int
    """Of the attacks."""
    attacks: list[str]
    """The ℓ2 attacks whose perturbations count, on the evaluated images; FAB for every image goes without saying."""
    models: list[ModelSimplifications]
    """The evaluated classifiers."""

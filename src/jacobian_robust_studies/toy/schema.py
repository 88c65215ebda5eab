"""Measurements of a classifier of the plane: those of ``toy.json``, and those of the figures alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacobian_robust.geometry.pullback import Geodesics
from jacobian_robust.robustness.schema import Strict

__all__ = ["CLOSED", "LEVELS", "Attack", "AttackNumbers", "Ball", "BallNumbers", "Budget", "ClassifierNumbers"]
__all__ += ["Condition", "Scene", "Toy", "samples"]

LEVELS = (0.25, 0.5)
"""Shares of a geodesic ball's radius at which smaller balls are drawn in it."""

CLOSED = (0.25, 0.5, 0.75, 1.0)
"""Shares of ``d_B`` for which it is counted how many geodesic balls of that radius are balls."""


class Budget(Strict):
    """Accuracy on all test points under attack at a Euclidean radius."""

    eps: float  # the radius
    pgd: float  # under PGD
    search: float  # under the search of a fine polar grid of the ball


class Condition(Strict):
    """The first-order condition ``‖J_μ‖₂ ≤ d/ε`` (eq. 14) among the correct test points."""

    satisfied: int  # points that satisfy it
    broken: int  # of these, those with an error within ε, by the search


class BallNumbers(Strict):
    """The geodesic ball of radius ``d_B`` around a test point (eq. 7) beside its flat approximation."""

    point: list[float]
    label: int  # of the point, and predicted there
    share: float = 1.0  # of d_B that is the radius
    radius: float  # of the ball, a share of d_B, the Fisher–Rao distance to the decision boundary
    rays: int  # geodesics followed
    partway: list[int]  # how many have the LEVELS of the radius as their length, before or at their end
    reached: int  # how many have the whole radius as their length
    left: int  # how many left the window before
    folded: int  # how many met a fold of the classifier before
    gap: float  # largest Euclidean distance between the ends of a geodesic of the whole length and of its flat twin
    flat_shortest: float  # shortest semi-axis of the flat ball, d_B/‖J_μ‖₂: the radius that is safe to first order
    flat_wrong: int  # of the flat ball's border points inside the window, those of another class
    great_circle_error: float  # largest distance on the sphere of a geodesic's samples from the great circle


class AttackNumbers(Strict):
    """The path of PGD from a test point."""

    point: list[float]
    label: int
    euclidean: float  # distance from the test point to the last iterate
    fisher_rao: float  # distance between the predictions there
    boundary: float  # d_B at the test point
    broken: bool  # whether another class is predicted at the last iterate


class ClassifierNumbers(Strict):
    """One classifier."""

    name: str  # vanilla, or the penalty's name
    sha256: str  # of its checkpoint
    seed: int  # of its training
    epochs: int | None
    test_points: int
    clean_accuracy: float
    budgets: list[Budget]
    jacobian_mean: float  # mean ‖J_μ‖₂ over the test points
    jacobian_max: float  # largest ‖J_μ‖₂ on a grid of the square
    center: Condition  # with d = δ, the distance to the centre: the note's condition
    boundary: Condition  # with d = d_B, the exact distance to the decision boundary
    balls: list[BallNumbers]
    closed_points: list[int]  # by the CLOSED shares of d_B, correct test points whose ball is one (see closed.py)
    closed: list[BallNumbers]  # of each class, the largest of these balls
    attacks: list[AttackNumbers]


class Toy(Strict):
    """What ``toy.json`` holds."""

    eps: float  # Euclidean radius ε of the penalty; the square's side is 1
    classifiers: list[ClassifierNumbers]  # the undefended one first
    versions: dict[str, str]  # of the packages
    commit: str | None = None  # of the clone
    dirty: bool | None = None  # whether the clone had uncommitted changes


@dataclass(frozen=True)
class Ball:
    """A geodesic ball and its flat approximation."""

    numbers: BallNumbers
    rays: Geodesics  # to its border
    flat: Float[Tensor, "rays 2"]  # x + X for the tangent vectors X of the ball's radius, in the same directions


def samples(rays: Geodesics, ray: int) -> tuple[Float[Tensor, "samples 2"], Float[Tensor, "samples"]]:
    """Return the sampled points of a geodesic, its end last, and the lengths up to there."""
    known = rays.lengths[ray].isfinite()
    return (
        torch.cat([rays.positions[ray, known], rays.ends[[ray]]]),
        torch.cat([rays.lengths[ray, known], rays.radius[[ray]]]),
    )


@dataclass(frozen=True)
class Attack:
    """The path of an attack: its iterates, from the clean point on, and the predictions there."""

    numbers: AttackNumbers
    iterates: Float[Tensor, "iterates 2"]
    theta: Float[Tensor, "iterates 3"]


@dataclass(frozen=True)
class Scene:
    """The contents of a classifier's figures."""

    title: str
    numbers: ClassifierNumbers
    theta: Float[Tensor, "grid 3"]  # the predictions on a square grid of points, row by row from below
    field: Float[Tensor, "field 2"]  # points of a coarser grid
    field_theta: Float[Tensor, "field 3"]  # the predictions there
    field_metric: Float[Tensor, "field 2 2"]  # the pulled-back metric there
    balls: Sequence[Ball]
    closed: Sequence[Ball]
    circles: Sequence[tuple[int, Float[Tensor, "2"], Float[Tensor, "circle 3"]]]  # class, centre, predictions around it
    attacks: Sequence[Attack]

    @property
    def side(self) -> int:
        """Points along a side of the grid."""
        return math.isqrt(len(self.theta))

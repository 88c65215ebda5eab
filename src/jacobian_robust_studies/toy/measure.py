"""The measurements behind the toy model's figures, in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jacobian_robust.attacks import PGD
from jacobian_robust.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.geometry import distance_to_boundary, fisher_rao_distance
from jacobian_robust.geometry.pullback import (
    Geodesics,
    geodesics,
    great_circle,
    information_ball,
    pullback_metric,
    semi_axes,
    sphere_jacobian,
    sphere_point,
)
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.prediction import radii
from jacobian_robust_studies.toy.closed import closed_areas, largest
from jacobian_robust_studies.toy.schema import (
    LEVELS,
    Attack,
    AttackNumbers,
    Ball,
    BallNumbers,
    Budget,
    ClassifierNumbers,
    Condition,
    Scene,
    samples,
)

__all__ = ["Classifier", "classifiers", "scenes"]

WINDOW = (-0.5, 1.5)
"""Coordinates between which geodesics are followed: the data's square and half its side around it."""

SIDE, FIELD, CIRCLES = 301, 10, 3
"""Points along a side of the fine grid and of the coarse one; circles of each class."""

CLOSED_SIDE = 201
"""Points along a side of the grid on which it is seen which geodesic balls are balls."""

SHARES = (0.25, 0.5, 0.75, 1.0)
"""The budgets of the attacks, as shares of ε."""


@dataclass(frozen=True)
class Classifier:
    """A classifier of the plane, in float64: its name, its checkpoint, and its network of images of two pixels."""

    name: str
    checkpoint: Checkpoint
    network: nn.Module

    def logits(self, points: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 3"]:
        """Return the logits of points."""
        logits: Tensor = self.network(points.reshape(-1, 1, 1, 2))
        return logits

    def probabilities(self, points: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 3"]:
        """Return ``θ`` at points, without a graph."""
        with torch.no_grad():
            return torch.cat([self.logits(chunk).softmax(-1) for chunk in points.split(100_000)])

    def predicted(self, points: Float[Tensor, "batch 2"]) -> Int[Tensor, "batch"]:
        """Return the classes of points."""
        return self.probabilities(points).argmax(-1)


def classifiers(place: Path) -> tuple[list[Classifier], float, Float[Tensor, "points 2"], Int[Tensor, "points"]]:
    """Return the undefended classifier and the penalised one, the penalty's ε, and the test points with their classes.

    Args:
        place: directory of a run with ``twin=true``, or with two exports.

    Raises:
        UserError: if there are other checkpoints than these two, not of points of the plane, or not of the same data.
    """
    checkpoints = [load_checkpoint(path) for path in find_checkpoints([place])]
    for checkpoint in checkpoints:
        datamodule = checkpoint.datamodule()
        if (datamodule.image_shape, datamodule.classes) != ((1, 1, 2), 3):
            raise UserError(
                f"{checkpoint.path} classifies {datamodule.data_name}, not points of the plane in three classes: train "
                "with experiment=toy"
            )
    plain = [c for c in checkpoints if not c.config.get("regularizer")]
    penalised = [c for c in checkpoints if c.config.get("regularizer")]
    if (len(plain), len(penalised)) != (1, 1):
        raise UserError(
            f"{place} holds {len(plain)} checkpoints without a penalty and {len(penalised)} with one; one of each is "
            "needed, as twin=true leaves them"
        )
    (vanilla,), (regularised,) = plain, penalised
    if vanilla.config["data"] != regularised.config["data"]:
        raise UserError(f"{place}: the two classifiers were trained on other data")
    penalty = regularised.config["regularizer"]
    if not penalty.get("eps"):
        raise UserError(f"{regularised.path}: its penalty has no ε, which is what the figures show; train with one")
    named = [(vanilla, "vanilla"), (regularised, str(penalty["_target_"]).rpartition(".")[-1].lower())]
    datamodule = vanilla.datamodule()
    datamodule.setup("test")
    points, labels = datamodule.split("test").first(None)
    models = [Classifier(name, c, c.model().double().requires_grad_(False)) for c, name in named]
    return models, float(penalty["eps"]), points.view(-1, 2).double(), labels


def scenes(
    models: list[Classifier], points: Float[Tensor, "points 2"], labels: Int[Tensor, "points"], eps: float, rays: int
) -> list[Scene]:
    """Return the figures' contents and the numbers of both classifiers, with so many rays for each geodesic ball."""
    nearest = [_error_distances(model, points, labels, eps) for model in models]
    shown, attacked = _shown(models, points, labels), _attacked(nearest, labels, eps)
    found = []
    for model, near in zip(models, nearest, strict=True):
        balls = [_ball(model, points[i], int(labels[i]), rays) for i in shown]
        areas = closed_areas(model.logits, _grid(CLOSED_SIDE), points) * (near > 0)
        closed = [_ball(model, points[i], int(labels[i]), rays, share) for i, share in largest(areas, labels)]
        attacks = [_attack(model, points[i], int(labels[i]), eps) for i in attacked]
        around = [int(i) for label in range(3) for i in (labels == label).nonzero()[:CIRCLES]]
        field = _grid(FIELD, 0.5 / FIELD, 1 - 0.5 / FIELD)
        numbers = _numbers(model, points, labels, near, eps, attacks)
        numbers |= {
            "balls": [ball.numbers for ball in balls],
            # A ball inside one that is a ball is one, too, be it too small for the grid.
            "closed_points": (areas.flip(0).cummax(0).values.flip(0) > 0).sum(1).tolist(),
            "closed": [ball.numbers for ball in closed],
        }
        scene = Scene(
            title="with the penalty" if model.checkpoint.config.get("regularizer") else "undefended",
            numbers=ClassifierNumbers.model_validate(numbers),
            theta=model.probabilities(_grid(SIDE)),
            field=field,
            field_theta=model.probabilities(field),
            field_metric=pullback_metric(model.logits, field),
            balls=balls,
            closed=closed,
            circles=[
                (int(labels[i]), points[i], model.probabilities(points[i] + eps * _directions(120))) for i in around
            ],
            attacks=attacks,
        )
        found.append(scene)
    return found


def _directions(number: int) -> Float[Tensor, "number 2"]:
    """Return unit vectors at equal angles."""
    angles = torch.arange(number, dtype=torch.float64) * (2 * math.pi / number)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def _grid(side: int, low: float = 0.0, high: float = 1.0) -> Float[Tensor, "points 2"]:
    """Return the points of a square grid, row by row from below."""
    axis = torch.linspace(low, high, side, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis).flip(1)


def _error_distances(
    model: Classifier, points: Float[Tensor, "points 2"], labels: Int[Tensor, "points"], eps: float
) -> Float[Tensor, "points"]:
    """Return how far the nearest error is from each point: 0 at an error, infinity if none is within ``eps``.

    By exhaustion, over 40 radii and 90 angles, within the square: no attack is as sure, and only in the plane is it
    cheap.
    """
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype)
    for radius in (round(eps * step / 40, 12) for step in range(40, -1, -1)):
        ring = (points[:, None] + radius * _directions(90)).reshape(-1, 2)
        inside = ((ring >= 0) & (ring <= 1)).all(1)
        wrong = (model.predicted(ring) != labels.repeat_interleave(90)) & inside
        nearest[wrong.view(len(points), 90).any(1)] = radius
    return nearest


def _shown(models: list[Classifier], points: Float[Tensor, "points 2"], labels: Int[Tensor, "points"]) -> list[int]:
    """Return the first test point of each class that both classify correctly, with a probability from 0.6 to 0.98.

    Balls of more confident points are larger than the square, those of less confident ones too small to be seen.
    """
    fit = torch.ones(len(points), dtype=torch.bool)
    for model in models:
        p = model.probabilities(points).gather(1, labels[:, None])[:, 0]
        fit &= (p > 0.6) & (p < 0.98)
    return [int(found[0]) for label in range(3) if len(found := (fit & (labels == label)).nonzero())]


def _attacked(nearest: Sequence[Float[Tensor, "points"]], labels: Int[Tensor, "points"], eps: float) -> list[int]:
    """Return the test points to attack: of each class the first that vanilla alone errs near, and that both do."""
    correct = torch.stack(list(nearest)).amin(0) > 0
    vanilla, regularised = (distances <= eps for distances in nearest)
    kinds = [(vanilla & ~regularised), (vanilla & regularised)]
    found = [(kind & correct & (labels == label)).nonzero() for label in range(3) for kind in kinds]
    return [int(index[0]) for index in found if len(index)]


def _ball(model: Classifier, point: Float[Tensor, "2"], label: int, rays: int, share: float = 1.0) -> Ball:
    """Return the geodesic ball of a share of the radius ``d_B`` around a point, by so many rays."""
    radius = share * float(distance_to_boundary(model.probabilities(point[None]))[0])
    metric = pullback_metric(model.logits, point[None])[0]
    # Half of them evenly spread in the metric, half in the plane: of a long and thin ball either set misses a part.
    lengths, axes = semi_axes(metric, metric.new_tensor(1.0))
    in_metric = torch.nn.functional.normalize(_directions(rays // 2) @ (axes @ (axes / lengths).mT), dim=-1)
    both = torch.cat([_directions(rays - rays // 2), in_metric])
    unit = both[torch.atan2(both[:, 1], both[:, 0]).argsort()]
    followed = geodesics(model.logits, point, radius, unit, low=WINDOW[0], high=WINDOW[1], samples=801, rtol=1e-7)
    flat = point + information_ball(metric, radius, unit)
    seen = ((flat >= WINDOW[0]) & (flat <= WINDOW[1])).all(1)
    whole = torch.tensor([why == "radius" for why in followed.why])
    gaps = (flat - followed.ends).norm(dim=1)[whole]
    numbers = BallNumbers(
        point=point.tolist(),
        label=label,
        share=share,
        radius=radius,
        rays=rays,
        partway=[int((followed.radius > level * radius).sum()) for level in LEVELS],
        reached=int(whole.sum()),
        left=followed.why.count("window") + followed.why.count("length"),
        folded=followed.why.count("fold"),
        gap=float(gaps.max()) if len(gaps) else 0.0,
        flat_shortest=float(semi_axes(metric, metric.new_tensor(radius))[0][0]),
        flat_wrong=int((model.predicted(flat[seen]) != label).sum()),
        great_circle_error=_great_circle_error(model, point, information_ball(metric, 1.0, unit), followed),
    )
    return Ball(numbers, followed, flat)


def _great_circle_error(
    model: Classifier, point: Float[Tensor, "2"], tangents: Float[Tensor, "rays 2"], followed: Geodesics
) -> float:
    """Return the largest distance on the sphere of a geodesic's samples from the great circle of its tangent vector."""
    start = sphere_point(model.logits, point[None])[0]
    velocities = tangents @ sphere_jacobian(model.logits, point[None])[0].mT
    error = 0.0
    for ray in range(len(tangents)):
        points, lengths = samples(followed, ray)
        apart = sphere_point(model.logits, points) - great_circle(start, velocities[ray], lengths)
        error = max(error, float(apart.norm(dim=1).max()))
    return error


def _attack(model: Classifier, point: Float[Tensor, "2"], label: int, eps: float) -> Attack:
    """Return the path of PGD in the ball of radius ``eps``, from the point itself on."""
    iterates: list[Tensor] = []

    def remember(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        iterates.append(arguments[0].detach().reshape(2).clone())

    attack = PGD(name="pgd", norm="l2", eps=(eps,), steps=40, step_size=eps / 10, random_start=False, early_stop=False)
    with model.network.register_forward_pre_hook(remember):
        last = attack.perturb(model.network, point.view(1, 1, 1, 2), torch.tensor([label]), eps)
    path = torch.stack([*iterates, last.reshape(2)])
    theta = model.probabilities(path)
    numbers = AttackNumbers(
        point=point.tolist(),
        label=label,
        euclidean=float((path[-1] - point).norm()),
        fisher_rao=float(fisher_rao_distance(theta[-1], theta[0])),
        boundary=float(distance_to_boundary(theta[0])),
        broken=int(theta[-1].argmax()) != label,
    )
    return Attack(numbers, path, theta)


def _numbers(
    model: Classifier,
    points: Float[Tensor, "points 2"],
    labels: Int[Tensor, "points"],
    nearest: Float[Tensor, "points"],
    eps: float,
    attacks: Sequence[Attack],
) -> dict[str, Any]:
    """Return the numbers of a classifier but those of its geodesic balls."""
    images, correct = points.view(-1, 1, 1, 2), nearest > 0
    budgets = tuple(round(share * eps, 12) for share in SHARES)
    pgd = PGD(name="pgd", norm="l2", eps=budgets, steps=40, step_size=eps / 10, batch_size=len(points))
    swept = sweep(model.network, images, labels, [pgd], examples=0)
    found = radii(model.network, images)

    def condition(distance: Float[Tensor, "points"]) -> Condition:
        satisfied: Bool[Tensor, points] = (found.spectral * eps <= distance) & correct
        return Condition(satisfied=int(satisfied.sum()), broken=int((satisfied & (nearest <= eps)).sum()))

    return {
        "name": model.name,
        "sha256": str(model.checkpoint.sha256),
        "seed": int(model.checkpoint.config["seed"]),
        "epochs": model.checkpoint.epochs,
        "test_points": len(points),
        "clean_accuracy": float(correct.double().mean()),
        "budgets": [
            Budget(eps=b.eps, pgd=b.robust_accuracy, search=float((nearest > b.eps).double().mean()))
            for b in swept.budgets
        ],
        "jacobian_mean": float(found.spectral.mean()),
        "jacobian_max": float(torch.linalg.eigvalsh(pullback_metric(model.logits, _grid(101))).max().sqrt()),
        "center": condition(found.center),
        "boundary": condition(found.boundary),
        "attacks": [attack.numbers for attack in attacks],
    }

"""Figures and figures' numbers of the toy model: ``python -m jacobian_robust_studies.toy RUN --out DIRECTORY``.

RUN is what ``train.py experiment=toy`` left, or any directory with the checkpoints of two classifiers of the plane, one
trained with a penalty and one without. Everything that is drawn is computed here, in float64, and everything that is
quoted goes to ``toy.json``; :mod:`jacobian_robust_studies.toy_plots` draws.
"""

import argparse
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from jacobian_robust.attacks import PGD
from jacobian_robust.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from jacobian_robust.errors import UserError, ends_in_one_line
from jacobian_robust.files import write_atomically
from jacobian_robust.geometry import distance_to_boundary, fisher_rao_distance
from jacobian_robust.geometry.pullback import (
    geodesics,
    great_circle,
    information_ball,
    pullback_metric,
    semi_axes,
    sphere_jacobian,
    sphere_point,
)
from jacobian_robust.provenance import versions
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.prediction import radii
from jacobian_robust.robustness.schema import Strict
from jacobian_robust_studies import toy_plots
from jacobian_robust_studies.toy_plots import Attacked, Ball, Scene

__all__ = ["Classifier", "Toy", "classifiers", "toy"]

WINDOW = (-0.5, 1.5)
"""Coordinates between which geodesics are followed; the data's square and half its side around it."""

SIDE, FIELD, CIRCLES = 301, 10, 4
"""Points along a side of the fine grid and of the coarse one; circles drawn of each class."""

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of ε, the budgets of the attacks."""


class Budget(Strict):
    """What stands at a Euclidean radius."""

    eps: float
    """The radius."""
    pgd: float
    """Share of all test points that PGD leaves correct."""
    search: float
    """Share of all test points that are correct and with them all points of a fine polar grid of the ball."""


class Condition(Strict):
    """The first-order condition ``‖J_μ‖₂ ≤ d/ε`` (eq. 14) among the correct test points, and what it is worth there."""

    satisfied: int
    """Points that satisfy it."""
    broken: int
    """Of these, how many have an error in their ball of radius ε, by the search."""


class BallNumbers(Strict):
    """The geodesic ball of radius ``d_B`` around a test point (eq. 7) beside its flat approximation."""

    point: list[float]
    """The test point."""
    label: int
    """Its class, which is predicted."""
    radius: float
    """``d_B`` there: Fisher–Rao distance to the decision boundary."""
    rays: int
    """Geodesics followed."""
    partway: list[int]
    """How many have a quarter and a half of the radius as their length, before or at their end."""
    reached: int
    """How many have the whole radius as their length."""
    left: int
    """How many left the window before."""
    folded: int
    """How many met a fold of the classifier before."""
    gap: float
    """Largest Euclidean distance between the ends of a geodesic that has the whole length and of its flat twin."""
    flat_shortest: float
    """Shortest semi-axis of the flat ball: ``d_B/‖J_μ‖₂``, the radius that is safe to first order."""
    flat_wrong: int
    """How many of the flat ball's border points, inside the window, another class is predicted for."""
    great_circle_error: float
    """Largest distance on the sphere of any sample of a geodesic from the great circle that it should lie on."""


class AttackNumbers(Strict):
    """The path of PGD from a test point."""

    point: list[float]
    """The test point."""
    label: int
    """Its class."""
    euclidean: float
    """Distance from the test point to the last iterate."""
    fisher_rao: float
    """Distance between the predictions there."""
    boundary: float
    """``d_B`` at the test point."""
    broken: bool
    """Whether another class is predicted at the last iterate."""


class ClassifierNumbers(Strict):
    """One classifier."""

    name: str
    """``vanilla``, or the penalty's name."""
    sha256: str
    """Of its checkpoint."""
    seed: int
    """Of its training."""
    epochs: int | None
    """Of its training."""
    test_points: int
    """All of them."""
    clean_accuracy: float
    """Share of them classified correctly."""
    budgets: list[Budget]
    """At each radius."""
    jacobian_mean: float
    """Mean ``‖J_μ‖₂`` over the test points."""
    jacobian_max: float
    """Largest ``‖J_μ‖₂`` on the grid of the square."""
    center: Condition
    """With ``d = δ``, the distance to the centre: the note's condition."""
    boundary: Condition
    """With ``d = d_B``, the exact distance to the decision boundary."""
    balls: list[BallNumbers]
    """Of the geodesic balls that are drawn."""
    attacks: list[AttackNumbers]
    """Of the attacks that are drawn."""


class Toy(Strict):
    """What ``toy.json`` holds."""

    eps: float
    """Euclidean radius ε of the penalty, in units of the square's side."""
    classifiers: list[ClassifierNumbers]
    """The undefended one first."""
    versions: dict[str, str]
    """Of the packages."""


@dataclass(frozen=True)
class Classifier:
    """A classifier of the plane, in float64.

    Attributes:
        name: ``vanilla``, or the penalty's name.
        checkpoint: what its file says.
        network: returns logits of images of two pixels, a point's coordinates.
    """

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


def directions(number: int) -> Float[Tensor, "number 2"]:
    """Return unit vectors at equal angles."""
    angles = torch.arange(number, dtype=torch.float64) * (2 * math.pi / number)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def grid(side: int, low: float = 0.0, high: float = 1.0) -> Float[Tensor, "points 2"]:
    """Return the points of a square grid, row by row from below."""
    axis = torch.linspace(low, high, side, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis).flip(1)


def error_distances(
    model: Classifier, points: Float[Tensor, "points 2"], labels: Int[Tensor, "points"], eps: float
) -> Float[Tensor, "points"]:
    """Return how far the nearest error is from each point: 0 at an error, infinity if none is within ``eps``.

    By exhaustion, over 40 radii and 90 angles, within the square: no attack is as sure, and only in the plane is it
    cheap.
    """
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype)
    for radius in (round(eps * step / 40, 12) for step in range(40, -1, -1)):
        ring = (points[:, None] + radius * directions(90)).reshape(-1, 2)
        inside = ((ring >= 0) & (ring <= 1)).all(1)
        wrong = (model.predicted(ring) != labels.repeat_interleave(90)) & inside
        nearest[wrong.view(len(points), 90).any(1)] = radius
    return nearest


def shown_points(
    models: list[Classifier], points: Float[Tensor, "points 2"], labels: Int[Tensor, "points"]
) -> list[int]:
    """Return the first test point of each class that both classify correctly, with a probability from 0.6 to 0.98.

    Surer ones have balls that are larger than the square, less sure ones such that nothing is to be seen.
    """
    fit = torch.ones(len(points), dtype=torch.bool)
    for model in models:
        p = model.probabilities(points).gather(1, labels[:, None])[:, 0]
        fit &= (p > 0.6) & (p < 0.98)
    return [int(found[0]) for label in range(3) if len(found := (fit & (labels == label)).nonzero())]


def ball(model: Classifier, point: Float[Tensor, "2"], label: int, rays: int) -> tuple[Ball, BallNumbers]:
    """Return the geodesic ball of radius ``d_B`` around a point, by so many rays, and its numbers."""
    radius = float(distance_to_boundary(model.probabilities(point[None]))[0])
    metric, jacobian = pullback_metric(model.logits, point[None])[0], sphere_jacobian(model.logits, point[None])[0]
    # Half of them evenly spread in the metric, half in the plane: of a long and thin ball either set misses a part.
    in_plane = directions(rays // 2)
    lengths, axes = semi_axes(metric, metric.new_tensor(1.0))
    root = axes @ (axes / lengths).mT
    both = torch.cat([directions(rays - rays // 2), torch.nn.functional.normalize(in_plane @ root, dim=-1)])
    unit = both[torch.atan2(both[:, 1], both[:, 0]).argsort()]
    followed = geodesics(model.logits, point, radius, unit, low=WINDOW[0], high=WINDOW[1], samples=801, rtol=1e-7)
    start, velocities = sphere_point(model.logits, point[None])[0], information_ball(metric, 1.0, unit) @ jacobian.mT
    error = 0.0
    for ray in range(rays):
        known = followed.lengths[ray].isfinite()
        x = torch.cat([followed.positions[ray, known], followed.ends[[ray]]])
        length = torch.cat([followed.lengths[ray, known], followed.radius[[ray]]])
        expected = great_circle(start, velocities[ray], length)
        error = max(error, float((sphere_point(model.logits, x) - expected).norm(dim=1).max()))
    flat = point + information_ball(metric, radius, unit)
    seen = ((flat >= WINDOW[0]) & (flat <= WINDOW[1])).all(1)
    whole = torch.tensor([why == "radius" for why in followed.why])
    gaps = (flat - followed.ends).norm(dim=1)[whole]
    numbers = BallNumbers(
        point=point.tolist(),
        label=label,
        radius=radius,
        rays=rays,
        partway=[int((followed.radius > share * radius).sum()) for share in toy_plots.LEVELS],
        reached=int(whole.sum()),
        left=followed.why.count("window") + followed.why.count("length"),
        folded=followed.why.count("fold"),
        gap=float(gaps.max()) if len(gaps) else 0.0,
        flat_shortest=float(semi_axes(metric, metric.new_tensor(radius))[0][0]),
        flat_wrong=int((model.predicted(flat[seen]) != label).sum()),
        great_circle_error=error,
    )
    return Ball(point, label, radius, followed, flat), numbers


def attack_path(model: Classifier, point: Float[Tensor, "2"], label: int, eps: float) -> tuple[Attacked, AttackNumbers]:
    """Return the iterates of PGD in the ball of radius ``eps``, from the point itself on, and their numbers."""
    iterates: list[Tensor] = []

    def remember(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        iterates.append(arguments[0].detach().reshape(2).clone())

    attack = PGD(name="pgd", norm="l2", eps=(eps,), steps=40, step_size=eps / 10, random_start=False, early_stop=False)
    hook = model.network.register_forward_pre_hook(remember)
    try:
        last = attack.perturb(model.network, point.view(1, 1, 1, 2), torch.tensor([label]), eps)
    finally:
        hook.remove()
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
    return Attacked(label, path, theta), numbers


def attacked_points(nearest: Sequence[Float[Tensor, "points"]], labels: Int[Tensor, "points"], eps: float) -> list[int]:
    """Return the test points whose attacks are drawn: chosen to show what differs and what does not.

    Of each class the first that only the vanilla classifier errs near, and the first that both do.

    Args:
        nearest: the distance of the nearest error from each point, of either classifier.
        labels: their classes.
        eps: how near.
    """
    correct = torch.stack(list(nearest)).amin(0) > 0
    vanilla, regularised = (distances <= eps for distances in nearest)
    kinds = [(vanilla & ~regularised), (vanilla & regularised)]
    found = [(kind & correct & (labels == label)).nonzero() for label in range(3) for kind in kinds]
    return [int(index[0]) for index in found if len(index)]


def _condition(
    norm: Tensor, distance: Tensor, nearest: Tensor, eps: float, correct: Bool[Tensor, "points"]
) -> Condition:
    satisfied = (norm * eps <= distance) & correct
    return Condition(satisfied=int(satisfied.sum()), broken=int((satisfied & (nearest <= eps)).sum()))


def _drawn(
    model: Classifier,
    points: Float[Tensor, "points 2"],
    labels: Int[Tensor, "points"],
    nearest: Float[Tensor, "points"],
    shown: Sequence[int],
    attacked: Sequence[int],
    eps: float,
    rays: int,
) -> tuple[Scene, ClassifierNumbers]:
    """Return what is drawn of a classifier and what is told of it."""
    balls = [ball(model, points[i], int(labels[i]), rays) for i in shown]
    paths = [attack_path(model, points[i], int(labels[i]), eps) for i in attacked]
    around = [int(i) for label in range(3) for i in (labels == label).nonzero()[:CIRCLES]]
    field = grid(FIELD, 0.5 / FIELD, 1 - 0.5 / FIELD)
    scene = Scene(
        name=model.name if not model.checkpoint.config.get("regularizer") else f"regularised ({model.name})",
        theta=model.probabilities(grid(SIDE)),
        field=field,
        field_theta=model.probabilities(field),
        field_metric=pullback_metric(model.logits, field),
        balls=[drawn for drawn, _ in balls],
        circles=[(int(labels[i]), model.probabilities(points[i] + eps * directions(120))) for i in around],
        attacks=[drawn for drawn, _ in paths],
    )
    images = points.view(-1, 1, 1, 2)
    budgets = tuple(round(share * eps, 12) for share in SHARES)
    pgd = PGD(name="pgd", norm="l2", eps=budgets, steps=40, step_size=eps / 10, batch_size=len(points))
    swept = sweep(model.network, images, labels, [pgd], examples=0)
    found, correct = radii(model.network, images), nearest > 0
    numbers = ClassifierNumbers(
        name=model.name,
        sha256=str(model.checkpoint.sha256),
        seed=int(model.checkpoint.config["seed"]),
        epochs=model.checkpoint.epochs,
        test_points=len(points),
        clean_accuracy=float(correct.double().mean()),
        budgets=[
            Budget(eps=b.eps, pgd=b.robust_accuracy, search=float((nearest > b.eps).double().mean()))
            for b in swept.budgets
        ],
        jacobian_mean=float(found.spectral.mean()),
        jacobian_max=float(torch.linalg.eigvalsh(pullback_metric(model.logits, grid(101))).max().sqrt()),
        center=_condition(found.spectral, found.center, nearest, eps, correct),
        boundary=_condition(found.spectral, found.boundary, nearest, eps, correct),
        balls=[numbers for _, numbers in balls],
        attacks=[numbers for _, numbers in paths],
    )
    return scene, numbers


def toy(place: Path, directory: Path, *, rays: int = 56) -> Toy:
    """Write the figures, as PNG and SVG, and ``toy.json`` into a new directory; return what the latter holds.

    Args:
        place: directory of a run with ``twin=true``, or with two exports.
        directory: for the results; it is empty, or does not exist yet.
        rays: geodesics of each ball.

    Raises:
        UserError: if the checkpoints are at fault, or the directory holds something.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} holds something already, which is left as it is: choose another --out")
    models, eps, points, labels = classifiers(place)
    nearest = [error_distances(model, points, labels, eps) for model in models]
    shown, attacked = shown_points(models, points, labels), attacked_points(nearest, labels, eps)
    drawn = [
        _drawn(model, points, labels, near, shown, attacked, eps, rays)
        for model, near in zip(models, nearest, strict=True)
    ]
    results = Toy(eps=eps, classifiers=[numbers for _, numbers in drawn], versions=versions())
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in toy_plots.figures([scene for scene, _ in drawn], points, labels, eps).items():
        figure.savefig(directory / f"{name}.png", dpi=120, pil_kwargs={"optimize": True})
        _save_svg(figure, directory / f"{name}.svg")
    with write_atomically(directory / "toy.json") as file:  # last: it says that the rest is whole
        file.write(results.model_dump_json(indent=2))
    Console().print(f"results: {directory}/toy.json, *.png, *.svg", soft_wrap=True)
    return results


def _save_svg(figure: Figure, path: Path) -> None:
    """Write a figure with coordinates to a hundredth of a point, at half the size; of equal figures equal files."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    lean = re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text.getvalue())
    path.write_text(lean, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m jacobian_robust_studies.toy", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of the run, or with two exports (model.safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the figures and toy.json")
    arguments = parser.parse_args(argv)
    with ends_in_one_line():
        toy(arguments.run, arguments.out)


if __name__ == "__main__":
    main()

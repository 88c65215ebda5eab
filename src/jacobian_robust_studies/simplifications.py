"""The note's six simplifications (section 3.5), measured one by one, and which of them accounts for each fall.

The condition of eq. 14, ``‖J_μ‖ ≤ d/ε``, is looked at in four variants: the distance ``d`` is δ, to the simplex's
center (the note's), or d_B, to the decision boundary; the norm is Frobenius' (the note's penalty) or the spectral one.
An image that satisfies it at ``ε`` is promised to stand every perturbation up to that Euclidean length. A *fall* is a
correct image with a known adversarial perturbation that is not longer.

A *flat* metric is one that is constant over the ball, in the coordinates of the inputs: what the step from eq. 8 to
eq. 9 uses. The note asks for zero curvature there, which is less.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jacobian_robust.geometry import fisher_rao_distance
from jacobian_robust.jacobian import stretch, worst_direction
from jacobian_robust.penalties import Bound
from jacobian_robust.robustness.prediction import JacobianNorm, Radii, Sample
from jacobian_robust.robustness.schema import Strict

__all__ = [
    "FALL_COLUMNS",
    "FORMAT",
    "PASSES",
    "Agreement",
    "Distribution",
    "Epoch",
    "Falls",
    "Flatness",
    "FlatnessPoint",
    "ModelSimplifications",
    "OffBy",
    "Sample",
    "Satisfied",
    "Simplifications",
    "Study",
    "agreements",
    "directions",
    "displacements",
    "distribution",
    "fall_rows",
    "falls",
    "image_rows",
    "off_by",
    "study",
    "summary",
]

RADII = 36
"""At how many radii flatness is looked at."""

PASSES = 3 * RADII
"""How often :func:`study` moves each evaluated image: by direction and radius."""

FORMAT: Literal[1] = 1
"""Raised whenever a field changes its meaning, its type or its place."""

TOLERANCE = 0.1
"""How far the first order may be off, as a share, before it counts as off."""

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


@dataclass(frozen=True)
class _Examples:
    """How the prediction moves from each image to its adversarial example; nan where there is none.

    Attributes:
        displacement: the Fisher–Rao distance between the two predictions.
        first_order: ``‖J_μ (x' - x)‖``.
    """

    displacement: Float[Tensor, "images"]
    first_order: Float[Tensor, "images"]


@dataclass(frozen=True)
class Study:
    """What was measured at one classifier.

    Attributes:
        result: for ``simplifications.json``.
        samples: by split, the images with the displacements of their adversarial examples.
        off: by direction, the radius from which the first order is off at each evaluated image.
    """

    result: ModelSimplifications
    samples: dict[Split, tuple[Sample, _Examples]]
    off: dict[str, Float[Tensor, "images"]]


def distribution(values: Float[Tensor, "n"]) -> Distribution | None:
    """Return the quantiles of the finite values, or ``None`` if there are none."""
    finite = values[values.isfinite()].double()
    if not len(finite):
        return None
    levels = torch.tensor([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], dtype=torch.float64, device=finite.device)
    smallest, q05, q25, median, q75, q95, largest = finite.quantile(levels).tolist()
    return Distribution(
        images=len(finite), smallest=smallest, q05=q05, q25=q25, median=median, q75=q75, q95=q95, largest=largest
    )


def agreements(radii: Radii, budgets: Sequence[float]) -> list[Agreement]:
    """Return how many images satisfy the condition with δ and with d_B, by radius and norm."""
    found = []
    for eps, norm in product(budgets, JACOBIAN_NORMS):
        center, boundary = (radii.satisfy(bound=bound, norm=norm, eps=eps) for bound in DISTANCES)
        found.append(
            Agreement(
                eps=eps,
                norm=norm,
                both=int((center & boundary).sum()),
                center_only=int((center & ~boundary).sum()),
                boundary_only=int((~center & boundary).sum()),
                neither=int((~center & ~boundary).sum()),
            )
        )
    return found


def _probabilities(model: nn.Module, images: Float[Tensor, "images *shape"]) -> Float[Tensor, "images classes"]:
    """Return the predictions in float64: a confident one's distances need the digits."""
    with torch.no_grad():
        return torch.cat([model(chunk).double().softmax(-1) for chunk in images.split(100)])


def displacements(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    directions: Float[Tensor, "images *shape"],
    radii: Sequence[float],
    progress: Callable[[int], None] = lambda images: None,
) -> Float[Tensor, "radii images"]:
    """Return the Fisher–Rao distances ``d(F(x), F(x + rv))``, in float64 and in ``[0, π]``.

    The points are not clipped to the box of pixels: the note's input space is all of ``R^n``.

    Args:
        model: returns logits, in evaluation mode.
        images: the points ``x``.
        directions: unit vectors ``v``.
        radii: Euclidean lengths ``r``.
        progress: called with the number of images after each radius.
    """
    clean = _probabilities(model, images)
    found = []
    for radius in radii:
        found.append(fisher_rao_distance(clean, _probabilities(model, images + radius * directions)))
        progress(len(images))
    return torch.stack(found)


def directions(
    model: nn.Module, sample: Sample
) -> tuple[Float[Tensor, "images *shape"], Float[Tensor, "images *shape"], Float[Tensor, "images"]]:
    """Return the worst direction at each image, that to its adversarial example, and ``‖J_μ v‖`` of the latter.

    Directions are unit vectors; those of images without an adversarial example are 0.
    """
    change = (sample.nearest.examples - sample.images).flatten(1)
    to_example = nn.functional.normalize(change, dim=-1).view_as(sample.images)
    worst, rates = [], []
    for chunk, direction in zip(sample.images.split(50), to_example.split(50), strict=True):
        inputs = chunk.clone().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            logits = model(inputs)
            worst.append(worst_direction(logits, inputs))
            rates.append(stretch(logits, inputs, direction))
    return torch.cat(worst), to_example, torch.cat(rates)


def off_by(
    ratio: Float[Tensor, "radii images"], radii: Sequence[float], tolerance: float = TOLERANCE
) -> tuple[Float[Tensor, "images"], Bool[Tensor, "images"]]:
    """Return the radius at which each image's ratio first leaves ``1 ± tolerance``, and whether it does so upwards.

    Between two radii the ratio is taken to be linear; the first radius stands for all below it. The radius is infinite
    where the ratio never leaves the band, and nan where it is not a number.

    Args:
        ratio: of the true displacement and its first order.
        radii: in ascending order.
        tolerance: half the width of the band, above 0.
    """
    r = torch.tensor(radii, dtype=ratio.dtype, device=ratio.device)
    outside = (ratio - 1).abs() >= tolerance
    first = outside.int().argmax(0)
    before = (first - 1).clamp_min(0)
    columns = torch.arange(ratio.shape[1], device=ratio.device)
    low, high = ratio[before, columns], ratio[first, columns]
    over = high > 1
    crossed = 1 + tolerance * (high - 1).sign()
    share = torch.where(first > 0, (crossed - low) / (high - low), torch.zeros_like(low))
    radius = r[before] + share * (r[first] - r[before])
    radius = torch.where(outside.any(0), radius, torch.inf)
    return torch.where(ratio.isfinite().all(0), radius, torch.nan), over & outside.any(0)


def _off(radius: Float[Tensor, "images"], over: Bool[Tensor, "images"]) -> OffBy:
    return OffBy(
        images=int((~radius.isnan()).sum()),
        over=int((radius.isfinite() & over).sum()),
        under=int((radius.isfinite() & ~over).sum()),
        never=int(radius.isinf().sum()),
        radius=distribution(radius),
    )


def _radii_of(images: Float[Tensor, "images *shape"]) -> list[float]:
    """Return the radii at which flatness is looked at: up to 4, or to the box's diagonal if less, from a 400th on."""
    largest = min(4.0, math.sqrt(images[0].numel()))
    return torch.logspace(math.log10(largest / 400), math.log10(largest), RADII, dtype=torch.float64).tolist()


def _outside_box(points: Float[Tensor, "images *shape"]) -> Bool[Tensor, "images"]:
    pixels = points.flatten(1)
    return (pixels.amin(-1) < 0) | (pixels.amax(-1) > 1)


def _flatness(
    model: nn.Module, sample: Sample, progress: Callable[[int], None]
) -> tuple[Flatness, dict[str, Float[Tensor, "images"]], _Examples]:
    """Return how far the first order holds, the radii at which it is off, and the way to the adversarial examples."""
    radii = _radii_of(sample.images)
    lengths = torch.tensor(radii, dtype=torch.float64, device=sample.images.device)[:, None]
    worst, to_example, rate = directions(model, sample)
    found = sample.nearest.length.isfinite()
    ratios = [
        displacements(model, sample.images, sign * worst, radii, progress) / (sample.radii.spectral.double() * lengths)
        for sign in (1, -1)
    ]
    known = torch.where(found, rate.double(), torch.nan)
    along = displacements(model, sample.images, to_example, radii, progress) / (known * lengths)
    (plus, plus_over), (minus, minus_over) = (off_by(ratio, radii) for ratio in ratios)
    sooner = torch.minimum(plus, minus)
    attack, attack_over = off_by(along, radii)
    either = torch.maximum(*ratios)
    points = []
    for number, radius in enumerate(radii):
        outside = _outside_box(sample.images + radius * worst) | _outside_box(sample.images - radius * worst)
        attacked = _outside_box(sample.images + radius * to_example)[found]
        points.append(
            FlatnessPoint(
                radius=radius,
                worst=distribution(either[number]),
                worst_outside=float(outside.double().mean()),
                attack=distribution(along[number]),
                attack_outside=float(attacked.double().mean()) if len(attacked) else None,
            )
        )
    flatness = Flatness(
        points=points,
        worst=_off(sooner, torch.where(plus <= minus, plus_over, minus_over)),
        attack=_off(attack, attack_over),
        alignment=distribution(known / sample.radii.spectral),
    )
    return flatness, {"worst": sooner, "attack": attack}, _examples(model, sample, rate)


def _examples(model: nn.Module, sample: Sample, rate: Float[Tensor, "images"]) -> _Examples:
    found = sample.nearest.length.isfinite()
    moved = fisher_rao_distance(_probabilities(model, sample.images), _probabilities(model, sample.nearest.examples))
    first_order = rate.double() * sample.nearest.length.double()
    return _Examples(*(torch.where(found, value, torch.nan) for value in (moved, first_order)))


def falls(sample: Sample, examples: _Examples, budgets: Sequence[float], *, split: Split) -> list[Falls]:
    """Return what the condition promised and what fell, by radius and variant.

    Args:
        sample: the images.
        examples: their adversarial examples.
        budgets: the radii ε.
        split: which images they are.
    """
    radii, correct = sample.radii, sample.correct
    allowed = radii.spectral.double() * sample.nearest.length.double()
    reached = (1 + TOLERANCE) * examples.first_order >= radii.boundary.double()
    too_near = examples.displacement < radii.boundary.double() * (1 - 1e-4)  # d_B is kept in float32
    found = []
    for eps, (bound, norm) in product(budgets, VARIANTS):
        fell = correct & (sample.smallest <= eps)
        stood = correct & ~fell
        kept = correct & radii.satisfy(bound=bound, norm=norm, eps=eps)
        exact = radii.satisfy(bound="boundary", norm="spectral", eps=eps)
        spectral = radii.satisfy(bound=bound, norm="spectral", eps=eps)
        center, curvature = kept & fell & ~exact, kept & fell & exact
        at_hand = sample.nearest.length <= eps
        found.append(
            Falls(
                split=split,
                eps=eps,
                bound=bound,
                norm=norm,
                images=int(correct.sum()),
                fell=int(fell.sum()),
                satisfied=int(kept.sum()),
                satisfied_fell=int((kept & fell).sum()),
                by_center=int(center.sum()),
                by_center_examples=int((center & at_hand).sum()),
                by_center_alone=int((center & at_hand & reached).sum()),
                by_curvature=int(curvature.sum()),
                by_curvature_examples=int((curvature & at_hand).sum()),
                contradictions=int((kept & fell & at_hand & too_near).sum()),
                overshoot=distribution((examples.displacement / allowed)[kept & fell & at_hand]),
                violated_fell=int((fell & ~kept).sum()),
                violated_stood=int((stood & ~kept).sum()),
                strict_stood=int((stood & ~kept & spectral).sum()),
            )
        )
    return found


def _share(satisfied: Bool[Tensor, "images"]) -> float:
    return float(satisfied.double().mean())


def study(
    name: str,
    model: nn.Module,
    evaluated: Sample,
    training: Sample | None,
    *,
    budgets: Sequence[float],
    condition: tuple[float, Bound] | None,
    rows: Sequence[Mapping[str, float | int]],
    progress: Callable[[int], None] = lambda images: None,
) -> Study:
    """Return the six simplifications of one classifier.

    Args:
        name: of the classifier.
        model: returns logits, in evaluation mode.
        evaluated: images that it was not trained on.
        training: images that it was trained on, where they are known.
        budgets: the Euclidean radii ε at which attacks are compared with the condition.
        condition: the ε and the bound with which its training recorded eq. 14, where they are known.
        rows: the rows of its training's ``metrics.csv``, as far as they are known.
        progress: called with a number of images, again and again, :data:`PASSES` times the evaluated ones in all.
    """
    flatness, off, examples = _flatness(model, evaluated, progress)
    samples: dict[Split, tuple[Sample, _Examples]] = {"evaluated": (evaluated, examples)}
    if training is not None:
        samples["training"] = training, _examples(model, training, directions(model, training)[2])
    radii = evaluated.radii
    shown = sorted({*budgets, *([condition[0]] if condition else [])})
    result = ModelSimplifications(
        name=name,
        images=len(evaluated.images),
        training_images=len(training.images) if training is not None else None,
        condition_eps=condition[0] if condition else None,
        condition_bound=condition[1] if condition else None,
        center_over_boundary=distribution(radii.center / radii.boundary),
        agreements=agreements(radii, shown),
        flatness=flatness,
        frobenius_over_spectral=distribution(radii.frobenius / radii.spectral),
        satisfied=[
            Satisfied(
                eps=eps,
                bound=bound,
                norm=norm,
                evaluated=_share(radii.satisfy(bound=bound, norm=norm, eps=eps)),
                training=_share(training.radii.satisfy(bound=bound, norm=norm, eps=eps))
                if training is not None
                else None,
            )
            for eps, (bound, norm) in product(shown, VARIANTS)
        ],
        epochs=[
            Epoch(
                epoch=int(row["epoch"]),
                train=row.get("train_condition_satisfied"),
                validation=row.get("validation_condition_satisfied"),
            )
            for row in rows
            if "train_condition_satisfied" in row
        ],
        falls=[fall for split, known in samples.items() for fall in falls(*known, budgets, split=split)],
    )
    return Study(result, samples, off)


def image_rows(studies: Sequence[Study]) -> Iterator[list[str | int]]:
    """Return a heading, and a row for each model, split and image, for ``simplifications.csv``."""
    measured = ["delta", "boundary", "jacobian_frobenius", "jacobian_spectral", "smallest_known_l2", "fab_l2"]
    yield ["name", "split", "image", "correct", *measured, "displacement", "first_order", "off_worst", "off_attack"]
    for one in studies:
        for split, (sample, examples) in one.samples.items():
            radii = sample.radii
            columns = [radii.center, radii.boundary, radii.frobenius, radii.spectral, sample.smallest]
            columns += [sample.nearest.length, examples.displacement, examples.first_order]
            texts = [[f"{v:.6g}" if math.isfinite(v) else "" for v in column.tolist()] for column in columns]
            for key in ("worst", "attack"):
                off = one.off[key].tolist() if split == "evaluated" else [math.nan] * len(sample.images)
                texts.append([f"{v:.6g}" if math.isfinite(v) else "" for v in off])
            for image, (correct, *row) in enumerate(zip(sample.correct.int().tolist(), *texts, strict=True)):
                yield [one.result.name, split, image, correct, *row]


def _spread(found: Distribution | None) -> str:
    return "–" if found is None else f"median {found.median:.3g} (5% to 95%: {found.q05:.3g} to {found.q95:.3g})"


def _moment(found: OffBy) -> str:
    radius = found.radius
    when = f"r = {radius.median:.2g} (quartiles {radius.q25:.2g}, {radius.q75:.2g})" if radius else "never"
    return (
        f"{when}, of both signs the first: the prediction then moves more at {found.over} images, less at "
        f"{found.under}, never off at {found.never}"
    )


def summary(model: ModelSimplifications) -> list[tuple[str, str]]:
    """Return for each simplification its number and name, and what was measured, in a line of text each."""
    shares = [s for s in model.satisfied if s.norm == "spectral" and s.bound == "center"]
    generalised = "; ".join(
        f"ε = {s.eps:g}: {s.evaluated:.1%}" + (f" (training {s.training:.1%})" if s.training is not None else "")
        for s in (shares[0], shares[-1])
    )
    known = [epoch for epoch in model.epochs if epoch.train is not None]
    during = "not recorded in the checkpoint"
    if known:
        shares_of = [1 - epoch.train for epoch in known if epoch.train is not None]
        during = (
            f"of the training images the run watched, {shares_of[0]:.1%} violate eq. 14 after epoch {known[0].epoch}, "
            f"{shares_of[-1]:.1%} after epoch {known[-1].epoch}"
        )
        if model.condition_eps is not None:
            during += f" (ε = {model.condition_eps:g})"
    return [
        ("1: δ for d_B", f"δ/d_B: {_spread(model.center_over_boundary)}"),
        ("2: flat metric", f"first order off by 10% along the worst direction at {_moment(model.flatness.worst)}"),
        ("3: eq. 10 for eq. 9", "equivalent, both sides being homogeneous: costs nothing"),
        ("4: Frobenius for spectral", f"‖J‖_F/‖J‖₂: {_spread(model.frobenius_over_spectral)}"),
        ("5: unseen images", f"share satisfying ‖J‖₂ ≤ δ/ε at {generalised}"),
        ("6: violations", during),
    ]


FALL_COLUMNS = ("ε", "d", "norm", "satisfied", "fell", "by 1", "by 2", "violated", "fell", "stood")
"""Of a table whose rows are those of :func:`fall_rows`."""


def fall_rows(falls: Sequence[Falls]) -> list[tuple[str, ...]]:
    """Return what the condition promised and what fell, a row for each radius and variant."""
    return [
        (
            f"{fall.eps:g}",
            DISTANCES[fall.bound],
            JACOBIAN_NORMS[fall.norm],
            *map(str, (fall.satisfied, fall.satisfied_fell, fall.by_center, fall.by_curvature)),
            *map(str, (fall.images - fall.satisfied, fall.violated_fell, fall.violated_stood)),
        )
        for fall in falls
    ]


if __name__ == "__main__":
    print(json.dumps(Simplifications.model_json_schema(), indent=2))

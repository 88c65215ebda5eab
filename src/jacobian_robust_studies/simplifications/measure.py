"""Measure the six simplifications of one classifier."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jacobian_robust.geometry import fisher_rao_distance
from jacobian_robust.jacobian import stretch, worst_direction
from jacobian_robust.penalties import Bound
from jacobian_robust.robustness.prediction import Radii, Sample
from jacobian_robust_studies.simplifications.schema import (
    DISTANCES,
    JACOBIAN_NORMS,
    VARIANTS,
    Agreement,
    Distribution,
    Epoch,
    Falls,
    Flatness,
    FlatnessPoint,
    ModelSimplifications,
    OffBy,
    Satisfied,
    Split,
)

__all__ = ["PASSES", "RADII", "TOLERANCE", "Displacements", "Study", "agreements", "directions", "displacements"]
__all__ += ["distribution", "falls", "off_by", "study"]

RADII = 36
"""At how many radii flatness is measured."""

PASSES = 3 * RADII
"""How often :func:`study` moves each evaluated image: by direction and radius."""

TOLERANCE = 0.1
"""How far the first order may be off, as a share, before it counts as off."""


@dataclass(frozen=True)
class Displacements:
    """How the prediction moves from each image to its adversarial example; nan where there is none."""

    displacement: Float[Tensor, "images"]  # Fisher–Rao distance between the two predictions
    first_order: Float[Tensor, "images"]  # ‖J_μ (x' - x)‖


@dataclass(frozen=True)
class Study:
    """The measurements at one classifier."""

    result: ModelSimplifications  # for simplifications.json
    samples: dict[Split, tuple[Sample, Displacements]]  # the images, and the way to their adversarial examples
    off: dict[str, Float[Tensor, "images"]]  # by direction, the radius from which the first order is off


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


def _count(images: Bool[Tensor, "images"]) -> int:
    return int(images.sum())


def agreements(radii: Radii, budgets: Sequence[float]) -> list[Agreement]:
    """Return how many images satisfy the condition with δ and with d_B, by radius and norm."""
    found = []
    for eps, norm in product(budgets, JACOBIAN_NORMS):
        center, boundary = (radii.satisfy(bound=bound, norm=norm, eps=eps) for bound in DISTANCES)
        found.append(
            Agreement(
                eps=eps,
                norm=norm,
                both=_count(center & boundary),
                center_only=_count(center & ~boundary),
                boundary_only=_count(~center & boundary),
                neither=_count(~center & ~boundary),
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
        images: ``x``.
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
        images=_count(~radius.isnan()),
        over=_count(radius.isfinite() & over),
        under=_count(radius.isfinite() & ~over),
        never=_count(radius.isinf()),
        radius=distribution(radius),
    )


def _radii_of(images: Float[Tensor, "images *shape"]) -> list[float]:
    """Return the radii at which flatness is measured: up to 4, or to the box's diagonal if less, from a 400th on."""
    largest = min(4.0, math.sqrt(images[0].numel()))
    return torch.logspace(math.log10(largest / 400), math.log10(largest), RADII, dtype=torch.float64).tolist()


def _outside_box(points: Float[Tensor, "images *shape"]) -> Bool[Tensor, "images"]:
    pixels = points.flatten(1)
    return (pixels.amin(-1) < 0) | (pixels.amax(-1) > 1)


def _flatness(
    model: nn.Module, sample: Sample, progress: Callable[[int], None]
) -> tuple[Flatness, dict[str, Float[Tensor, "images"]], Displacements]:
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


def _examples(model: nn.Module, sample: Sample, rate: Float[Tensor, "images"]) -> Displacements:
    found = sample.nearest.length.isfinite()
    moved = fisher_rao_distance(_probabilities(model, sample.images), _probabilities(model, sample.nearest.examples))
    first_order = rate.double() * sample.nearest.length.double()
    return Displacements(*(torch.where(found, value, torch.nan) for value in (moved, first_order)))


def falls(sample: Sample, examples: Displacements, budgets: Sequence[float], *, split: Split) -> list[Falls]:
    """Return what the condition promised and the falls, by radius ε and variant."""
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
                images=_count(correct),
                fell=_count(fell),
                satisfied=_count(kept),
                satisfied_fell=_count(kept & fell),
                by_center=_count(center),
                by_center_examples=_count(center & at_hand),
                by_center_alone=_count(center & at_hand & reached),
                by_curvature=_count(curvature),
                by_curvature_examples=_count(curvature & at_hand),
                contradictions=_count(kept & fell & at_hand & too_near),
                overshoot=distribution((examples.displacement / allowed)[kept & fell & at_hand]),
                violated_fell=_count(fell & ~kept),
                violated_stood=_count(stood & ~kept),
                strict_stood=_count(stood & ~kept & spectral),
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
    samples: dict[Split, tuple[Sample, Displacements]] = {"evaluated": (evaluated, examples)}
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

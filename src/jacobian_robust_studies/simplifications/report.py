"""The tables of the six simplifications."""

import math
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table

from jacobian_robust_studies.simplifications.measure import Study
from jacobian_robust_studies.simplifications.schema import (
    DISTANCES,
    JACOBIAN_NORMS,
    Distribution,
    Falls,
    ModelSimplifications,
    OffBy,
    Simplifications,
)

__all__ = ["FALL_COLUMNS", "FALL_NOTE", "fall_rows", "image_rows", "print_simplifications", "summary"]

FALL_COLUMNS = ("ε", "d", "norm", "satisfied", "falls", "by 1", "by 2", "violated", "falls", "robust")
"""Of a table whose rows are those of :func:`fall_rows`."""

FALL_NOTE = "Falls by 1: δ instead of d_B; by 2: the metric is not flat; the others were promised nothing (5, 6)."


def image_rows(studies: Sequence[Study]) -> Iterator[list[str | int]]:
    """Return a heading, and a row for each model, split and image, for ``simplifications.csv``."""
    measured = ["delta", "boundary", "jacobian_frobenius", "jacobian_spectral", "smallest_known_l2", "fab_l2"]
    yield ["name", "split", "image", "correct", *measured, "displacement", "first_order", "off_worst", "off_attack"]
    for one in studies:
        for split, (sample, examples) in one.samples.items():
            radii, nothing = sample.radii, torch.full_like(sample.smallest, math.nan)
            columns = [radii.center, radii.boundary, radii.frobenius, radii.spectral, sample.smallest]
            columns += [sample.nearest.length, examples.displacement, examples.first_order]
            columns += [one.off[key] if split == "evaluated" else nothing for key in ("worst", "attack")]
            texts = [[f"{v:.6g}" if math.isfinite(v) else "" for v in column.tolist()] for column in columns]
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


def fall_rows(falls: Sequence[Falls]) -> list[tuple[str, ...]]:
    """Return what the condition promised and the falls, a row for each radius and variant."""
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


def print_simplifications(simplified: Simplifications) -> None:
    """Print the six simplifications and, below them, what accounts for each fall."""
    for model in simplified.models:
        title = f"{model.name}: the note's six simplifications on {model.images} {simplified.split} images"
        measured = Table("simplification", "measured", title=title, title_justify="left")
        for row in summary(model):
            measured.add_row(*row)
        title = f"{model.name}: what the condition ‖J‖ ≤ d/ε promised, and the falls, of the correct images"
        falls = Table(title=title, caption=FALL_NOTE, title_justify="left", caption_justify="left")
        for column in FALL_COLUMNS:
            falls.add_column(column, justify="right")
        for cells in fall_rows(model.falls_of("evaluated")):
            falls.add_row(*cells)
        Console().print(measured, falls)

"""The files of an evaluation: tables, figures and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jacobian_robust.reporting import figures as plots
from jacobian_robust.reporting.gallery import tiles_of
from jacobian_robust.reporting.html import Section, write_report
from jacobian_robust.robustness.results import Details, write_tables
from jacobian_robust.robustness.schema import Group, Results

__all__ = ["Written", "write_evaluation"]


@dataclass(frozen=True)
class Written:
    """What was written, for a logger.

    Attributes:
        rows: of ``robustness.csv``.
        points: the predicted radii and the perturbations found, by model.
        figures: the files of the figures, by name.
    """

    rows: list[dict[str, Any]]
    points: plots.Points
    figures: dict[str, Path] = field(default_factory=dict)


def write_evaluation(
    results: Results,
    alike: Sequence[Group],
    details: Sequence[Details],
    directory: Path,
    *,
    config: Mapping[str, Any],
    figures: Mapping[str, Figure] | None = None,
    section: Section | None = None,
) -> Written:
    """Write ``robustness.csv``, ``images.csv``, the figures and ``report.html``.

    Args:
        results: the evaluation.
        alike: models that differ in their training seed alone.
        details: what is known of each image, model by model.
        directory: which is there.
        config: what was asked for, as plain containers.
        figures: further figures, by name.
        section: a further section of the report.
    """
    points = points_of(details)
    saved = plots.save(figures_of(results, alike, details, points) | dict(figures or {}), directory)
    rows = write_tables(results, details, directory)
    write_report(directory / "report.html", results, alike, saved, config, section, tiles=tiles_of(details))
    return Written(rows, points, saved)


def points_of(details: Sequence[Details]) -> plots.Points:
    """Return, by model, the predicted radii and the smallest ℓ2 perturbations known."""
    return {d.name: (d.radii.predicted, d.smallest) for d in details if d.radii and d.smallest is not None}


def figures_of(
    results: Results, alike: Sequence[Group], details: Sequence[Details], points: plots.Points
) -> dict[str, Figure]:
    """Return the figures by name, in the order in which a report shows them."""
    figures = plots.comparison(results, alike)
    if points:
        figures["first_order"] = plots.predicted_against_found(points)
    names = plots.in_words([model.name for model in results.models])
    for model, name, detail in zip(results.models, names, details, strict=True):
        suffix = plots.suffix_of(model.name, len(details))
        for swept in detail.sweeps if detail.pictures else ():
            examples = {b.eps: e for b, e in zip(swept.budgets, swept.examples, strict=True)}
            title = f"{name}: images broken in {plots.NORMS[swept.norm]}"
            of: dict[str, Any] = {"norm": swept.norm, "title": title, "family": detail.family, "unit": detail.unit}
            figures[f"examples_{swept.norm}{suffix}"] = plots.adversarial_examples(
                examples, **of, class_names=detail.class_names
            )
            if swept.norm in detail.pictured:
                of["title"] = f"{name} under attack, {plots.NORMS[swept.norm]}"
                picture = plots.attack_picture(*detail.pictured[swept.norm], **of)
                figures[f"attack_{swept.norm}{suffix}"] = picture
    return figures

"""The figures that the results of an evaluation are enough for."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from jacobian_robust.reporting.figures.accuracy import (
    accuracy_curves,
    class_accuracy,
    group_curves,
    noise_curves,
    reliability_diagram,
)
from jacobian_robust.reporting.figures.certified import certified_curves
from jacobian_robust.reporting.figures.overview import overview
from jacobian_robust.reporting.figures.style import suffix_of, unmet_note
from jacobian_robust.robustness.schema import Group, Results

__all__ = ["comparison"]


def comparison(results: Results, alike: Sequence[Group]) -> dict[str, Figure]:
    """Return the figures of an evaluation that its results alone are enough for, by name.

    Args:
        results: the evaluation.
        alike: models that differ in their training seed alone.
    """
    figures = {}
    for norm in results.norms:
        note = unmet_note(results, norm)
        figures[f"overview_{norm}"] = overview(results, norm=norm, note=note)
        figures[f"accuracy_{norm}"] = accuracy_curves(results.models, norm=norm, split=results.split, note=note)
        if (certified := certified_curves(results, norm=norm, note=note)) is not None:
            figures[f"certified_{norm}"] = certified
        if alike:
            images = f"{results.models[0].images:,} {results.split} images"
            figures[f"seeds_{norm}"] = group_curves(alike, norm=norm, images=images, note=note)
    if any(model.calibration for model in results.models):
        figures["calibration"] = reliability_diagram(results.models, split=results.split)
        figures["noise"] = noise_curves(results.models, split=results.split)
    for model in results.models:
        if not model.classes:
            continue
        suffix = suffix_of(model.name, len(results.models))
        figures[f"classes{suffix}"] = class_accuracy(model)
    return figures

"""Figures of trainings and evaluations."""

from jacobian_robust.reporting.figures.accuracy import (
    accuracy_curves,
    class_accuracy,
    group_curves,
    noise_curves,
    reliability_diagram,
    trade_off,
)
from jacobian_robust.reporting.figures.certified import certified_curves
from jacobian_robust.reporting.figures.comparison import comparison
from jacobian_robust.reporting.figures.examples import adversarial_examples, attack_picture
from jacobian_robust.reporting.figures.geometry import on_log_axes, predicted_against_found
from jacobian_robust.reporting.figures.overview import overview
from jacobian_robust.reporting.figures.style import (
    BUDGET_LABELS,
    NORMS,
    PALETTE,
    SYMBOLS,
    Points,
    Rows,
    headline,
    in_words,
    line_style,
    name_lines,
    name_points,
    percent,
    save,
    suffix_of,
    unmet_note,
    wilson_bars,
    write_note,
    write_picture,
)
from jacobian_robust.reporting.figures.training import progress, training_curves

__all__ = [
    "BUDGET_LABELS",
    "NORMS",
    "PALETTE",
    "SYMBOLS",
    "Points",
    "Rows",
    "accuracy_curves",
    "adversarial_examples",
    "attack_picture",
    "certified_curves",
    "class_accuracy",
    "comparison",
    "group_curves",
    "headline",
    "in_words",
    "line_style",
    "name_lines",
    "name_points",
    "noise_curves",
    "on_log_axes",
    "overview",
    "percent",
    "predicted_against_found",
    "progress",
    "reliability_diagram",
    "save",
    "suffix_of",
    "trade_off",
    "training_curves",
    "unmet_note",
    "wilson_bars",
    "write_note",
    "write_picture",
]

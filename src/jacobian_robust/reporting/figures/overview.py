"""The one picture of an evaluation: clean, under attack and certified, model by model."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting.figures.style import (
    NORMS,
    PALETTE,
    SYMBOLS,
    headline,
    in_words,
    wilson_bars,
    write_note,
)
from jacobian_robust.robustness.schema import Model, Results

__all__ = ["overview"]

_ATTACKED, _CERTIFIED, _PANELS = PALETTE[5], PALETTE[0], 4


def overview(results: Results, *, norm: Norm, note: str = "") -> Figure:
    """Return bars of every model: accuracy on clean images and, for the first budgets, under attack and certified.

    The certified part of a bar is dark. The lines are Wilson's 95% intervals.

    Args:
        results: the evaluation.
        norm: of the budgets.
        note: below the axes.
    """
    models = results.models
    budgets = next(threat.budgets for threat in models[0].threats if threat.norm == norm)[: _PANELS - 1]
    figure = Figure(figsize=(2.6 + 2.0 * (len(budgets) + 1), 1.6 + 0.42 * len(models)), layout="constrained")
    panels = figure.subplots(1, len(budgets) + 1, sharey=True, squeeze=False)[0]
    _bars(panels[0], models, [model.clean_accuracy for model in models], [None] * len(models))
    panels[0].set_title("clean")
    panels[0].set_yticks(range(len(models)), in_words([model.name for model in models]))
    for axes, budget in zip(panels[1:], budgets, strict=True):
        at = [
            next(b for threat in model.threats if threat.norm == norm for b in threat.budgets if b.eps == budget.eps)
            for model in models
        ]
        _bars(axes, models, [b.robust_accuracy for b in at], [b.certified_accuracy for b in at])
        axes.set_title(f"{NORMS[norm]} {SYMBOLS[norm]} = {results.budget(norm, budget.eps)}")
    certified = "; dark and in brackets: certified" if any(model.certificates for model in models) else ""
    figure.suptitle(f"{headline(results.right)} on {models[0].images:,} {results.split} images{certified}")
    write_note(figure, note)
    return figure


def _bars(axes: Axes, models: list[Model], shares: list[float], certified: list[float | None]) -> None:
    places = np.arange(len(models))
    errors = wilson_bars(shares, [model.images for model in models])
    axes.barh(places, shares, xerr=errors, height=0.7, color=_ATTACKED, error_kw={"lw": 0.8, "capsize": 2})
    axes.barh(places, [share or 0 for share in certified], height=0.7, color=_CERTIFIED)
    for place, share, proven, below, above in zip(places, shares, certified, *errors, strict=True):
        said = f"{share:.1%}" + (f" ({proven:.1%})" if proven else "")
        inside = share > 0.6
        axes.text(
            share - below - 0.02 if inside else share + above + 0.02,
            float(place),
            said,
            ha="right" if inside else "left",
            va="center",
            fontsize="small",
            color="white" if inside and proven else "black",
        )
    axes.set(xlim=(0, 1.05), ylim=(len(models) - 0.4, -0.6), xticks=[0, 0.5, 1], xticklabels=["0", "50%", "100%"])
    axes.grid(axis="x", alpha=0.3)

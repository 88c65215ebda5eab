"""Figures of the comparison of defences."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobian_robust.reporting.figures.style import NORMS, line_style
from jacobian_robust_studies.defences.plan import Trial

__all__ = ["methods_under_attack", "trials_by_method"]

LEAST_ACCURACY = 0.9
"""Clean accuracy below which a trial is left out of the picture and listed in a corner: it would squeeze the rest."""


def trials_by_method(trials: Mapping[str, Sequence[Trial]], *, robust: str) -> Figure:
    """Return clean against robust accuracy of trials, a panel for each method, the others' behind it in grey.

    A line joins a method's trials in their order; failed ones are left out. ``robust`` names the objective.
    """
    columns = min(len(trials), 5)
    rows = math.ceil(len(trials) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    every = [trial for found in trials.values() for trial in found if trial.finished]
    shown = [trial for trial in every if trial.clean >= LEAST_ACCURACY] or every
    clean, attacked = [trial.clean for trial in shown], [trial.robust for trial in shown]
    for axes, (name, found) in zip(panels, trials.items(), strict=False):
        axes.plot(clean, attacked, linestyle="", marker=".", color="0.8", zorder=1)
        _trials(axes, [trial for trial in found if trial.finished], shown)
        options = dict.fromkeys(option.partition("=")[0] for trial in found for option in trial.overrides)
        axes.set_title(f"{name}\n{' '.join(options)}", fontsize="small")
        axes.grid(alpha=0.3)
    for limits, values in ((panels[0].set_xlim, clean), (panels[0].set_ylim, attacked)):
        margin = 0.12 * (max(values) - min(values)) or 0.01
        limits(min(values) - margin, max(values) + 2 * margin)  # room for the numbers
    for axes in panels[len(trials) :]:
        axes.set_visible(False)
    for axes in panels[len(trials) - columns : len(trials)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("clean accuracy, validation images", fontsize="medium")
    objective = robust.replace("_", " ").replace("linf", NORMS["linf"]).replace("l2", NORMS["l2"])
    figure.supylabel(objective, fontsize="medium")
    return figure


def _trials(axes: Axes, trials: Sequence[Trial], shown: Sequence[Trial]) -> None:
    """Draw a method's trials with their values; those that are not shown are listed in a corner."""
    inside = sorted((trial for trial in trials if trial in shown), key=lambda trial: trial.robust)
    outside = ["further left, clean / robust:"]
    for trial in trials:
        value = " ".join(option.partition("=")[2] for option in trial.overrides)
        if trial not in inside:
            outside.append(f"{value}: {trial.clean:.0%} / {trial.robust:.0%}")
            continue
        if trial == inside[-1]:  # neighbours' numbers keep apart
            offset, ha, va = (0, 5), "center", "bottom"
        elif trial == inside[0]:
            offset, ha, va = (0, -5), "center", "top"
        elif trial.clean < fmean(other.clean for other in inside):
            offset, ha, va = (-6, 0), "right", "center"
        else:
            offset, ha, va = (6, 0), "left", "center"
        point = trial.clean, trial.robust
        axes.annotate(value, point, xytext=offset, ha=ha, va=va, textcoords="offset points", fontsize="small")
    if trials:
        line = zip(*((trial.clean, trial.robust) for trial in trials), strict=True)
        axes.plot(*line, **line_style(0) | {"zorder": 2})
    if outside[1:]:
        axes.text(0.04, 0.96, "\n".join(outside), va="top", transform=axes.transAxes, fontsize="x-small")


def methods_under_attack(accuracy: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Return the accuracy of methods, clean and within each budget, a line each, the best of each panel on top.

    ``accuracy`` has shares of the images by panel, method and budget; the budgets of all methods are the same.
    """
    heights = [len(methods) for methods in accuracy.values()]
    figure = Figure(figsize=(8, 0.24 * sum(heights) + 0.5 * len(heights) + 0.9), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False).flatten()
    for axes, (title, methods) in zip(panels, accuracy.items(), strict=True):
        names = sorted(methods, key=lambda name: fmean(methods[name].values()))
        shares = [list(methods[name].values()) for name in names]
        axes.hlines(names, [min(row) for row in shares], [max(row) for row in shares], color="0.85", zorder=1)
        for i, budget in enumerate(methods[names[0]]):
            axes.plot([row[i] for row in shares], names, **line_style(i) | {"linestyle": "", "label": budget})
        axes.set_title(title, fontsize="medium")
        axes.margins(y=0.6 / len(names))
        axes.set_xlim(-0.03, 1.03)
        axes.grid(alpha=0.3, axis="x")
    panels[-1].set(xlabel="share of the images that are right")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(handles[0]), fontsize="small")
    return figure

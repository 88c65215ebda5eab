"""Figures of the comparison of defences."""

import math
from collections.abc import Mapping
from statistics import fmean

from matplotlib.figure import Figure

from jacobian_robust.reporting.figures.style import NORMS, line_style

__all__ = ["ROUGHLY_RIGHT", "methods_under_attack", "trials_by_method"]

ROUGHLY_RIGHT = 0.9
"""Clean accuracy below which a trial has no place in a picture of trials: it would squeeze all others."""


def trials_by_method(trials: Mapping[str, Mapping[str, tuple[float, float]]], *, robust: str) -> Figure:
    """Return clean against robust accuracy of trials, a panel for each method, the others' behind it in grey.

    Args:
        trials: by method and by what was tried, ``option=value``, pairs (clean accuracy, robust accuracy); those with
            nan are left out. The line joins them in their order.
        robust: what the robust accuracy is.
    """
    columns = min(len(trials), 5)
    rows = math.ceil(len(trials) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    known = {
        name: {what: point for what, point in points.items() if not any(map(math.isnan, point))}
        for name, points in trials.items()
    }
    every = [point for points in known.values() for point in points.values()]
    shown = [point for point in every if point[0] >= ROUGHLY_RIGHT] or every
    for axes, (name, points) in zip(panels, known.items(), strict=False):
        axes.plot(*zip(*shown, strict=True), linestyle="", marker=".", color="0.8", zorder=1)
        outside = ["further left, clean / robust:"]
        inside = [point for point in points.values() if point in shown]
        for what, point in points.items():
            value = " ".join(option.partition("=")[2] for option in what.split())
            if point not in shown:
                outside.append(f"{value}: {point[0]:.0%} / {point[1]:.0%}")
                continue
            if point == max(inside, key=lambda p: p[1]):  # neighbours' numbers keep apart
                offset, ha, va = (0, 5), "center", "bottom"
            elif point == min(inside, key=lambda p: p[1]):
                offset, ha, va = (0, -5), "center", "top"
            elif point[0] < fmean(p[0] for p in inside):
                offset, ha, va = (-6, 0), "right", "center"
            else:
                offset, ha, va = (6, 0), "left", "center"
            axes.annotate(value, point, xytext=offset, ha=ha, va=va, textcoords="offset points", fontsize="small")
        if points:
            axes.plot(*zip(*points.values(), strict=True), **line_style(0) | {"zorder": 2})
        if outside[1:]:
            axes.text(0.04, 0.96, "\n".join(outside), va="top", transform=axes.transAxes, fontsize="x-small")
        options = dict.fromkeys(option.partition("=")[0] for what in trials[name] for option in what.split())
        axes.set_title(f"{name}\n{' '.join(options)}", fontsize="small")
        axes.grid(alpha=0.3)
    for limits, values in ((panels[0].set_xlim, [c for c, _ in shown]), (panels[0].set_ylim, [r for _, r in shown])):
        margin = 0.12 * (max(values) - min(values)) or 0.01
        limits(min(values) - margin, max(values) + 2 * margin)  # room for the numbers
    for axes in panels[len(trials) :]:
        axes.set_visible(False)
    for axes in panels[len(trials) - columns : len(trials)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("clean accuracy, validation images", fontsize="medium")
    figure.supylabel(
        robust.replace("_", " ").replace("linf", NORMS["linf"]).replace("l2", NORMS["l2"]), fontsize="medium"
    )
    return figure


def methods_under_attack(accuracy: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Return the accuracy of methods, clean and within each budget, a line each, the best of each panel on top.

    Args:
        accuracy: by panel and by method, shares of the images by what they met, the same for all.
    """
    heights = [len(methods) for methods in accuracy.values()]
    figure = Figure(figsize=(8, 0.24 * sum(heights) + 0.5 * len(heights) + 0.9), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False).flatten()
    for axes, (title, methods) in zip(panels, accuracy.items(), strict=True):
        names = sorted(methods, key=lambda name: fmean(methods[name].values()))
        shares = [list(methods[name].values()) for name in names]
        axes.hlines(names, [min(row) for row in shares], [max(row) for row in shares], color="0.85", zorder=1)
        for i, met in enumerate(methods[names[0]]):
            axes.plot([row[i] for row in shares], names, **line_style(i) | {"linestyle": "", "label": met})
        axes.set_title(title, fontsize="medium")
        axes.margins(y=0.6 / len(names))
        axes.set_xlim(-0.03, 1.03)
        axes.grid(alpha=0.3, axis="x")
    panels[-1].set(xlabel="share of the images that are right")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(handles[0]), fontsize="small")
    return figure

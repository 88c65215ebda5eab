"""The picture of the study: accuracy against robustness, and the front of what nothing else beats in both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jacobian_robust_studies.frontier.plan import Published

__all__ = ["Point", "frontier", "pareto"]

MARKERS = "osD^v<>PXh*pd8"
LEAST_ACCURACY = 0.85
"""Clean accuracy below which a network is outside the picture, where others are not: it would squeeze the rest."""


@dataclass(frozen=True)
class Point:
    """A network: its accuracy clean and under attack on so many images, its strength and its length."""

    clean: float
    robust: float
    images: int
    strength: str
    length: int


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other equals in one coordinate and beats in the other, from left to right."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def frontier(panels: Mapping[str, Mapping[str, Sequence[Point]]], published: Sequence[Published]) -> Figure:
    """Return robust against clean accuracy, a panel for each attack, with the Pareto front and binomial error bars.

    Args:
        panels: by title and method the networks. Those of a length are joined in their order.
        published: points of the literature; each goes into the panels whose title ends in its budget.
    """
    rows = ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 4.2 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    methods = list(dict.fromkeys(method for of in panels.values() for method in of))
    for axes, (title, of) in zip(grid, panels.items(), strict=False):
        for method, points in of.items():
            number = methods.index(method)
            style = {"color": colormaps["tab20"](number % 20), "marker": MARKERS[number % len(MARKERS)]}
            _networks(axes, points, style | {"label": method})
        every = [(point.clean, point.robust) for points in of.values() for point in points]
        axes.step(*zip(*pareto(every), strict=True), where="pre", color="0.3", linestyle="--", zorder=1, label="front")
        shown = [point for point in published if title.endswith(f" {point.eps:g}")]
        cleans = [clean for clean, _ in every] + [point.clean for point in shown]
        limits = max(min(cleans) - 0.01, LEAST_ACCURACY), 1.0
        for point in shown:
            axes.plot(point.clean, point.robust, linestyle="", marker="*", color="0.2", markersize=10)
            right = point.clean > sum(limits) / 2  # the label stays inside
            place: dict[str, Any] = {"ha": "right" if right else "left", "xytext": (-7 if right else 7, -3)}
            axes.annotate(
                point.label, (point.clean, point.robust), textcoords="offset points", fontsize="x-small", **place
            )
        axes.set(title=title, xlabel="clean accuracy", ylabel="accuracy under attack", ylim=(-0.03, 1.03))
        if max(cleans) >= LEAST_ACCURACY:
            axes.set_xlim(limits)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=6, fontsize="small")
    return figure


def _networks(axes: Axes, points: Sequence[Point], style: Mapping[str, Any]) -> None:
    """Draw the networks of a method with their standard errors and strengths; those of a length are joined."""
    for length in dict.fromkeys(point.length for point in points):
        joined = [point for point in points if point.length == length]
        clean, robust = [point.clean for point in joined], [point.robust for point in joined]
        errors = [[sqrt(s * (1 - s) / p.images) for s, p in zip(of, joined, strict=True)] for of in (clean, robust)]
        axes.errorbar(clean, robust, errors[1], errors[0], elinewidth=0.6, linewidth=0.8, alpha=0.85, **style)
        for point in joined:
            place: dict[str, Any] = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": "x-small"}
            axes.annotate(f"{point.length}: {point.strength}".rstrip(": "), (point.clean, point.robust), **place)

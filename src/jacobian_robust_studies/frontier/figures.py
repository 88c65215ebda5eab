"""The picture of the study: accuracy against robustness, and the front of what nothing else beats in both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from scipy.special import expit, logit

from jacobian_robust.reporting.figures import PALETTE, in_words, name_points, wilson_bars
from jacobian_robust_studies.frontier.plan import Published

__all__ = ["Point", "frontier", "pareto"]

STYLES = ((PALETTE[6], "o"), (PALETTE[0], "s"), (PALETTE[1], "^"), (PALETTE[2], "D"), (PALETTE[3], "v"))
"""Of the kinds of methods, in the order in which they come."""
INK = "0.25"
TICKS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)
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


def frontier(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], published: Sequence[Published], kinds: Mapping[str, str]
) -> Figure:
    """Return robust against clean accuracy, a panel for each attack, with the Pareto front.

    A method's networks of one length are joined in their order. Its most robust one has its name and Wilson's 95%
    intervals. Networks of shorter trainings than the longest are open. On a logit scale errors of 1% and 2% are as far
    apart as those of 10% and 18%.

    Args:
        panels: by title and method the networks.
        published: points of the literature; each goes into the panels whose title ends in its budget.
        kinds: of the methods, in words: those of a kind have one colour.
    """
    columns = min(len(panels), 2)
    rows = ceil(len(panels) / columns)
    figure = Figure(figsize=(2 + 5.5 * columns, 5.8 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = dict(zip(dict.fromkeys(kinds.values()), STYLES, strict=False))
    for axes, (title, of) in zip(grid, panels.items(), strict=False):
        shown = [point for point in published if title.endswith(f" {point.eps:g}")]
        axes.set(title=title, xlabel="clean accuracy", ylabel="accuracy under attack")
        _scales(axes, [point for points in of.values() for point in points], shown)
        for method, points in of.items():
            _networks(axes, points, *styles[kinds[method]], kinds[method])
        every = [_drawn(point) for points in of.values() for point in points]
        axes.step(*zip(*pareto(every), strict=True), where="pre", color=INK, linestyle="--", zorder=1, label="front")
        for point in shown:
            axes.plot(point.clean, point.robust, "*", color=INK, markersize=11, label="published, other networks")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    lines, labels = list(handles.values()), list(handles)
    legend = figure.legend(handles=lines, labels=labels, loc="outside upper center", ncols=3, fontsize="small")
    legend.set_title("open: shorter trainings")
    for axes, (title, of) in zip(grid, panels.items(), strict=False):
        names = dict(zip(of, in_words(list(of)), strict=True))
        named = [(*_drawn(_best(of[method])), names[method], styles[kinds[method]][0]) for method in of]
        named += [(p.clean, p.robust, p.label, INK) for p in published if title.endswith(f" {p.eps:g}")]
        name_points(figure, axes, [point for point in named if point[0] >= axes.get_xlim()[0]])
    return figure


def _best(points: Sequence[Point]) -> Point:
    return max(points, key=lambda point: point.robust)


def _drawn(point: Point) -> tuple[float, float]:
    """Return where a network is drawn: a logit scale has no place for 0 and 1, which are half an image off."""
    half = 0.5 / point.images
    return min(max(point.clean, half), 1 - half), min(max(point.robust, half), 1 - half)


def _scales(axes: Axes, points: Sequence[Point], published: Sequence[Published]) -> None:
    """Set logit scales, with limits so that no network far from the others squeezes them; say how many are outside."""
    places = [*map(_drawn, points), *((point.clean, point.robust) for point in published)]
    most = max(clean for clean, _ in places)
    left = min(clean for clean, _ in places) if most < LEAST_ACCURACY else LEAST_ACCURACY
    places = [place for place in places if place[0] >= left]
    for axis, values, name in zip((axes.xaxis, axes.yaxis), zip(*places, strict=True), "xy", strict=True):
        ends = expit(logit(min(values)) - 0.25), expit(logit(max(values)) + 0.25)
        axes.set(**{f"{name}scale": "logit", f"{name}lim": ends})
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_major_formatter(FixedFormatter([f"{tick:.0%}" for tick in TICKS]))
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    if outside := sum(point.clean < left for point in points):
        said = f"{outside} more: less than {left:.0%} accurate"
        axes.text(0.02, 0.02, said, transform=axes.transAxes, fontsize="small", color=INK)


def _networks(axes: Axes, points: Sequence[Point], colour: str, marker: str, kind: str) -> None:
    """Draw the networks of a method; those of a length are joined, and the most robust one has error bars."""
    longest = max(point.length for point in points)
    for length in dict.fromkeys(point.length for point in points):
        places = [_drawn(point) for point in points if point.length == length]
        x, y = [x for x, _ in places], [y for _, y in places]
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        label, filled = (kind, colour) if length == longest else (None, "white")
        axes.plot(x, y, marker, color=colour, label=label, markerfacecolor=filled, markersize=5, alpha=0.8)
    best = _best(points)
    across, up = (wilson_bars([share], [best.images]) for share in (best.clean, best.robust))
    x, y = ([place] for place in _drawn(best))
    axes.errorbar(x, y, up, across, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.5)

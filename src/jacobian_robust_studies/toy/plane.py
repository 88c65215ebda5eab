"""Figures of the toy model in the unit square, one classifier beside the other.

Colours are Okabe and Ito's, and classes differ by their mark too. Shades are rounded to a few steps, which keeps the
images inside the SVG files small.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from torch import Tensor

from jacobian_robust.geometry import distance_to_boundary, distance_to_center
from jacobian_robust.geometry.pullback import semi_axes
from jacobian_robust.reporting.figures import PALETTE
from jacobian_robust_studies.toy.schema import Scene

__all__ = ["decision_regions", "heights", "information_balls"]

MARKERS = "os^"
INK = "#222222"
SHADES = 24
"""Steps of a shade."""


def regions(axes: Axes, scene: Scene, *, strength: float = 0.75) -> None:
    """Colour the square by the prediction, paler where it is unsure, with the decision boundary."""
    side = scene.side
    colours = torch.tensor([to_rgb(colour) for colour in PALETTE[:3]], dtype=scene.theta.dtype)
    sure = (((scene.theta.amax(-1) - 1 / 3) * 1.5 * SHADES).round() / SHADES)[:, None] * strength
    shades = sure * colours[scene.theta.argmax(-1)] + (1 - sure)
    axes.imshow(shades.view(side, side, 3).numpy(), origin="lower", extent=(0, 1, 0, 1), interpolation="none")
    _boundary(axes, scene, INK)
    _square(axes)


def _contour(axes: Axes, scene: Scene, heights: Tensor, levels: Sequence[float], **style: Any) -> None:
    axis = np.linspace(0, 1, scene.side)[::3]  # a third of the grid is smooth enough
    axes.contour(axis, axis, heights.view(scene.side, scene.side).numpy()[::3, ::3], levels=levels, **style)


def _boundary(axes: Axes, scene: Scene, colour: str) -> None:
    for k in range(3):
        others = scene.theta[:, [j for j in range(3) if j != k]].amax(-1)
        _contour(axes, scene, scene.theta[:, k] - others, [0.0], colors=colour, linewidths=1.1)


def _square(axes: Axes) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.set(xlabel="$x_1$", ylabel="$x_2$")


def panels(rows: int, scenes: Sequence[Scene], *, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    """Return a figure with rows of panels, a column for each classifier."""
    figure = Figure(figsize=(4.5 * len(scenes) + 0.6, height * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, len(scenes), squeeze=False)
    for column, scene in zip(axes[0], scenes, strict=True):
        column.set_title(scene.title, fontsize=15)
    return figure, axes


def key(label: str, color: str = INK, **style: Any) -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], color=color, label=label, **style)


def legend(figure: Figure, entries: Sequence[Line2D | Patch], columns: int) -> None:
    """Draw a legend below the panels."""
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=11, frameon=False)


def class_keys() -> list[Line2D]:
    """Return the legend's entries of the three classes."""
    return [key(f"class {k}", PALETTE[k], marker=MARKERS[k], linestyle="", markeredgecolor="white") for k in range(3)]


def decision_regions(
    scenes: Sequence[Scene], points: Float[Tensor, "points 2"], labels: Int[Tensor, "points"], eps: float
) -> Figure:
    """Return the predicted classes, the first test points of each class, and a ball of radius ε."""
    figure, grid = panels(1, scenes)
    for axes, scene in zip(grid[0], scenes, strict=True):
        regions(axes, scene, strength=0.5)
        for k in range(3):
            x, y = points[labels == k][:100].unbind(1)
            axes.scatter(x, y, s=22, marker=MARKERS[k], color=PALETTE[k], edgecolors="white", linewidths=0.6)
        axes.add_patch(Circle((0.12, 0.12), eps, facecolor="none", edgecolor=INK, linewidth=1.3, linestyle=":"))
        axes.text(0.12, 0.12, "ε", ha="center", va="center", fontsize=13)
    legend(figure, [*class_keys(), key("decision boundary")], 4)
    return figure


def _ellipses(axes: Axes, centres: Tensor, lengths: Tensor, angles: Tensor, **style: Any) -> None:
    """Draw ellipses; circles of one size as one path, which keeps an SVG file small."""
    circles = (lengths[:, 0] == lengths[:, 1]) & (lengths[:, 0] == lengths.max() if len(lengths) else True)
    for which in (circles, ~circles):
        if not which.any():
            continue
        width, height, angle = 2 * lengths[which, 0], 2 * lengths[which, 1], angles[which]
        if which is circles:
            width, height, angle = width[:1], height[:1], torch.zeros(1)
        style |= {"units": "xy", "offsets": centres[which].numpy(), "offset_transform": axes.transData}
        axes.add_collection(EllipseCollection(width.tolist(), height.tolist(), angle.tolist(), **style))


def information_balls(scenes: Sequence[Scene], eps: float) -> Figure:
    """Return the field of the balls of both radii, their semi-axes on a scale that has room for all.

    A semi-axis ``a`` is drawn as ``a/(a + ε)`` of half a cell: ε is a quarter of a cell, an infinite one fills it.
    """
    figure, grid = panels(2, scenes)
    for row, (name, distance) in enumerate((("δ", distance_to_center), ("$d_B$", distance_to_boundary))):
        for axes, scene in zip(grid[row], scenes, strict=True):
            regions(axes, scene, strength=0.28)
            cell = 1 / math.isqrt(len(scene.field))
            lengths, directions = semi_axes(scene.field_metric, distance(scene.field_theta))
            drawn = 0.49 * cell * lengths / (lengths + eps)
            angles = torch.atan2(directions[:, 1, 0], directions[:, 0, 0]).rad2deg()
            _ellipses(axes, scene.field, torch.full_like(drawn, 0.245 * cell), angles, facecolor="#bbbbbb", zorder=2)
            holds = lengths[:, 0] >= eps
            for which, colour, width in ((holds, PALETTE[0], 1.4), (~holds, PALETTE[1], 2.0)):
                style = {"edgecolor": colour, "facecolor": "none", "linewidth": width, "zorder": 3}
                _ellipses(axes, scene.field[which], drawn[which], angles[which], **style)
        grid[row][0].set_ylabel(f"radius {name}\n$x_2$", fontsize=14)
    entries: list[Line2D | Patch] = [
        Patch(color="#bbbbbb", label=f"Euclidean ball, ε = {eps:g}"),
        key("information ball that contains it", PALETTE[0]),
        key("one that does not", PALETTE[1], linewidth=2),
        key("(semi-axis a drawn as a/(a + ε) of half a cell)", linestyle=""),
    ]
    legend(figure, entries, 2)
    return figure


def heights(scenes: Sequence[Scene]) -> Figure:
    """Return δ and d_B over the square."""
    figure, grid = panels(2, scenes)
    rows: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
        ("δ: distance to the centre", distance_to_center, 2 * math.acos(3**-0.5)),
        ("$d_B$: distance to the boundary", distance_to_boundary, math.pi / 2),
    )
    for row, (name, distance, top) in enumerate(rows):
        colours = Normalize(0, top)
        for axes, scene in zip(grid[row], scenes, strict=True):
            height = distance(scene.theta)
            steps = (height / top * 2 * SHADES).round().view(scene.side, scene.side).numpy() * top / 2 / SHADES
            axes.imshow(steps, origin="lower", extent=(0, 1, 0, 1), cmap="cividis", norm=colours, interpolation="none")
            _contour(axes, scene, height, list(np.arange(0.25, top, 0.25)), colors="white", linewidths=0.6)
            _boundary(axes, scene, PALETTE[1])  # black would be lost where the heights are dark
            _square(axes)
        bar = figure.colorbar(ScalarMappable(colours, "cividis"), ax=list(grid[row]), shrink=0.9)
        bar.set_label(f"{name}\n(lines: every 0.25)", fontsize=13)
    legend(figure, [key("decision boundary", PALETTE[1])], 1)
    return figure

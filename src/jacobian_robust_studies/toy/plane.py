"""Figures of the toy model in the unit square, one classifier beside the other.

Colours are Okabe and Ito's, and classes differ by their mark too. Shades are rounded to a few steps, which keeps the
images inside the SVG files small.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
from matplotlib.ticker import MultipleLocator
from torch import Tensor

from jacobian_robust.geometry import distance_to_boundary, distance_to_center
from jacobian_robust.geometry.pullback import semi_axes
from jacobian_robust.reporting.figures import PALETTE
from jacobian_robust_studies.toy.schema import LEVELS, Ball, Scene, samples

__all__ = ["decision_regions", "geodesic_balls", "heights", "information_balls"]

MARKERS = "os^"
INK = "#222222"
OUTSIDE = "#e4e4e4"
SHADES = 24
"""Steps of a shade."""
SHRUNK = 0.3
"""Scale of the ellipses of the field, which keeps them apart."""
BORDERS: tuple[tuple[float, str, Literal[":", "-.", "-"]], ...] = (
    (LEVELS[0], "a quarter of", ":"),
    (LEVELS[1], "half of", "-."),
    (1.0, "all of", "-"),
)
"""Shares of a geodesic ball's radius, their names, and the line styles of these balls' borders."""


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


def panels(rows: int, scenes: Sequence[Scene], *, height: float = 4.6) -> tuple[Figure, np.ndarray]:
    """Return a figure with rows of panels, a column for each classifier."""
    figure = Figure(figsize=(4.9 * len(scenes) + 0.6, height * rows + 1.0), layout="constrained")
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
    """Return the field of the balls of both radii, shrunk; semi-axes longer than a cell's are cut."""
    figure, grid = panels(2, scenes)
    for row, (name, distance) in enumerate((("δ", distance_to_center), ("$d_B$", distance_to_boundary))):
        for axes, scene in zip(grid[row], scenes, strict=True):
            regions(axes, scene, strength=0.28)
            cell = 1 / math.isqrt(len(scene.field))
            lengths, directions = semi_axes(scene.field_metric, distance(scene.field_theta))
            drawn = (SHRUNK * lengths).clamp_max(0.46 * cell)
            angles = torch.atan2(directions[:, 1, 0], directions[:, 0, 0]).rad2deg()
            _ellipses(axes, scene.field, torch.full_like(drawn, SHRUNK * eps), angles, facecolor="#bbbbbb", zorder=2)
            holds = lengths[:, 0] >= eps
            for which, colour, width in ((holds, PALETTE[0], 1.4), (~holds, PALETTE[1], 2.0)):
                style = {"edgecolor": colour, "facecolor": "none", "linewidth": width, "zorder": 3}
                _ellipses(axes, scene.field[which], drawn[which], angles[which], **style)
        grid[row][0].set_ylabel(f"radius {name}\n$x_2$", fontsize=14)
    entries: list[Line2D | Patch] = [
        Patch(color="#bbbbbb", label=f"Euclidean ball, ε = {eps:g} (all at {SHRUNK:g} of their size)"),
        key("information ball (cut to its cell), contains it", PALETTE[0]),
        key("does not contain it", PALETTE[1], linewidth=2),
    ]
    legend(figure, entries, 3)
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


def _border(ball: Ball, share: float) -> np.ndarray:
    """Return where each ray has a ``share`` of the ball's radius; nan for a ray that ends before."""
    border, length = np.full(ball.rays.ends.shape, np.nan), share * ball.numbers.radius
    for ray, why in enumerate(ball.rays.why):
        places, lengths = (found.numpy() for found in samples(ball.rays, ray))
        if share == 1 and why == "radius":
            border[ray] = places[-1]
        elif length < lengths[-1]:
            border[ray] = [np.interp(length, lengths, column) for column in places.T]
    return border


def geodesic_balls(scenes: Sequence[Scene], eps: float) -> Figure:
    """Return the geodesic balls around a point of each class, a row for each classifier."""
    number = max(len(scene.balls) for scene in scenes)
    figure = Figure(figsize=(4.3 * number + 0.6, 4.3 * len(scenes) + 0.9), layout="constrained")
    grid = figure.subplots(len(scenes), number, squeeze=False)
    for scene, line in zip(scenes, grid, strict=True):
        for axes, ball in zip(line, scene.balls, strict=True):
            regions(axes, scene, strength=0.28)
            _geodesic_ball(axes, ball, eps)
        line[0].set_ylabel(f"{scene.title}\n$x_2$", fontsize=15)
    for axes in grid[-1]:
        axes.set_xlabel("$x_1$")
    entries: list[Line2D | Patch] = [
        *(key(f"geodesic ball, {of} $d_B$", PALETTE[0], linestyle=line, linewidth=2.4) for _, of, line in BORDERS),
        key("geodesics", PALETTE[0], linewidth=0.6),
        key("flat approximation of the whole ball", PALETTE[1], linestyle="--", linewidth=2),
        key(f"Euclidean ball, ε = {eps:g}", linestyle=":", linewidth=1.6),
        key("fold", PALETTE[3], marker="x", linestyle=""),
        Patch(facecolor=OUTSIDE, label="outside the unit square"),
        *(key(f"centre, class {k}", marker=marker, linestyle="") for k, marker in enumerate(MARKERS)),
    ]
    legend(figure, entries, 3)
    return figure


def _geodesic_ball(axes: Axes, ball: Ball, eps: float) -> None:
    """Draw a ball's geodesics, its borders, its flat approximation and the Euclidean ball."""
    (x, y), label, reach = ball.numbers.point, ball.numbers.label, 2.2 * eps
    for path, end in zip(ball.rays.positions, ball.rays.ends, strict=True):
        curve = torch.cat([path[path.isfinite().all(1)], end[None]])
        seen = (curve - curve.new_tensor([x, y])).abs().amax(1) < 1.1 * reach
        axes.plot(*torch.where(seen[:, None], curve, torch.nan).T, color=PALETTE[0], linewidth=0.6, alpha=0.7)
    for share, _, stroke in BORDERS:
        border = _border(ball, share)
        axes.plot(*np.concatenate([border, border[:1]]).T, stroke, color=PALETTE[0], linewidth=2.4)
    folds = ball.rays.ends.numpy()[np.array(ball.rays.why) == "fold"]
    axes.plot(*folds.T, "x", color=PALETTE[3], markersize=6, markeredgewidth=1.6)
    axes.plot(*torch.cat([ball.flat, ball.flat[:1]]).T, "--", color=PALETTE[1], linewidth=2)
    axes.add_patch(Circle((x, y), eps, facecolor="none", edgecolor=INK, linewidth=1.6, linestyle=":"))
    axes.plot(x, y, MARKERS[label], color=INK, markersize=6)
    axes.set_title(f"class {label}, $d_B$ = {ball.numbers.radius:.2f}", fontsize=12)
    axes.set(xlabel="", ylabel="", facecolor=OUTSIDE, xlim=(x - reach, x + reach), ylim=(y - reach, y + reach))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(0.1))

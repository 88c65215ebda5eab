"""Figures of the toy model, one classifier beside the other.

Colours are Okabe and Ito's, and classes differ by their mark too. Shades are rounded to a few steps, which keeps the
images inside the SVG files small.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from jacobian_robust.geometry.pullback import Geodesics, semi_axes
from jacobian_robust.reporting.figures import PALETTE

__all__ = ["Attacked", "Ball", "Scene", "figures"]

MARKERS = "os^"
INK = "#222222"
OUTSIDE = "#e4e4e4"
SHADES = 24
"""Steps of a shade."""
LEVELS = (0.25, 0.5)
"""Shares of a geodesic ball's radius at which smaller balls are drawn in it."""
BORDERS: tuple[tuple[float, str, Literal[":", "-.", "-"]], ...] = (
    (LEVELS[0], "a quarter of", ":"),
    (LEVELS[1], "half of", "-."),
    (1.0, "all of", "-"),
)
"""Shares of it, as they are written, and the strokes of these balls' borders."""
SHRUNK = 0.3
"""By what the ellipses of the field are drawn smaller, so that they stay apart."""


@dataclass(frozen=True)
class Ball:
    """A geodesic ball and its flat approximation.

    Attributes:
        point: its centre ``x``.
        label: the class of ``x``.
        radius: ``d_B(x)``.
        rays: the geodesics to its border.
        flat: ``x + X`` for the tangent vectors ``X`` of that length, in the same directions.
    """

    point: Float[Tensor, "2"]
    label: int
    radius: float
    rays: Geodesics
    flat: Float[Tensor, "rays 2"]


@dataclass(frozen=True)
class Attacked:
    """The path of an attack.

    Attributes:
        label: the class of the first point.
        iterates: from the clean point on.
        theta: the predictions there.
    """

    label: int
    iterates: Float[Tensor, "iterates 2"]
    theta: Float[Tensor, "iterates 3"]


@dataclass(frozen=True)
class Scene:
    """What is drawn of a classifier of the unit square.

    Attributes:
        name: of the classifier.
        theta: the predictions on a square grid of points, row by row from below.
        field: points of a coarser one.
        field_theta: the predictions there.
        field_metric: the pulled-back metric there.
        balls: geodesic balls.
        circles: by class and circle, the predictions on circles of radius ε around test points.
        attacks: paths of attacks.
    """

    name: str
    theta: Float[Tensor, "grid 3"]
    field: Float[Tensor, "field 2"]
    field_theta: Float[Tensor, "field 3"]
    field_metric: Float[Tensor, "field 2 2"]
    balls: Sequence[Ball]
    circles: Sequence[tuple[int, Float[Tensor, "circle 3"]]]
    attacks: Sequence[Attacked]

    @property
    def side(self) -> int:
        """Points along a side of the grid."""
        return math.isqrt(len(self.theta))


def _pair(point: Float[Tensor, "2"]) -> tuple[float, float]:
    return float(point[0]), float(point[1])


def _regions(axes: Axes, scene: Scene, *, strength: float = 0.75) -> None:
    """Colour the square by the prediction, paler where it is unsure, with the decision boundary."""
    side = scene.side
    colours = torch.tensor([to_rgb(colour) for colour in PALETTE[:3]], dtype=scene.theta.dtype)
    sure = (((scene.theta.amax(-1) - 1 / 3) * 1.5 * SHADES).round() / SHADES)[:, None] * strength
    shades = sure * colours[scene.theta.argmax(-1)] + (1 - sure)
    axes.imshow(shades.view(side, side, 3).numpy(), origin="lower", extent=(0, 1, 0, 1), interpolation="none")
    _boundary(axes, scene, INK)
    _square(axes)


def _contour(axes: Axes, scene: Scene, heights: Tensor, levels: Sequence[float], *, step: int, **style: Any) -> None:
    axis = np.linspace(0, 1, scene.side)[::step]
    shown = heights.view(scene.side, scene.side).numpy()[::step, ::step]
    axes.contour(axis, axis, shown, levels=levels, **style)


def _boundary(axes: Axes, scene: Scene, colour: str) -> None:
    for k in range(3):
        others = scene.theta[:, [j for j in range(3) if j != k]].amax(-1)
        _contour(axes, scene, scene.theta[:, k] - others, [0.0], step=3, colors=colour, linewidths=1.1)


def _square(axes: Axes) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.set(xlabel="$x_1$", ylabel="$x_2$")


def _grid(rows: int, scenes: Sequence[Scene], *, height: float = 4.6) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.9 * len(scenes) + 0.6, height * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, len(scenes), squeeze=False)
    for column, scene in zip(axes[0], scenes, strict=True):
        column.set_title(scene.name, fontsize=15)
    return figure, axes


def _legend(figure: Figure, entries: Sequence[Line2D | Patch], columns: int) -> None:
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=11, frameon=False)


def _classes() -> list[Line2D]:
    return [
        Line2D([], [], marker=MARKERS[k], color=PALETTE[k], linestyle="", markeredgecolor="white", label=f"class {k}")
        for k in range(3)
    ]


def _decision_regions(scenes: Sequence[Scene], points: Tensor, labels: Tensor, eps: float) -> Figure:
    figure, grid = _grid(1, scenes)
    for axes, scene in zip(grid[0], scenes, strict=True):
        _regions(axes, scene, strength=0.5)
        for k in range(3):
            x, y = points[labels == k][:100].unbind(1)
            axes.scatter(x, y, s=22, marker=MARKERS[k], color=PALETTE[k], edgecolors="white", linewidths=0.6)
        axes.add_patch(Circle((0.12, 0.12), eps, facecolor="none", edgecolor=INK, linewidth=1.3, linestyle=":"))
        axes.text(0.12, 0.12, "ε", ha="center", va="center", fontsize=13)
    _legend(figure, [*_classes(), Line2D([], [], color=INK, label="decision boundary")], 4)
    return figure


def _ellipses(axes: Axes, centres: Tensor, lengths: Tensor, angles: Tensor, **style: Any) -> None:
    """Draw ellipses; those that are circles of one size as one path, for which an SVG file has few words."""
    round_ = (lengths[:, 0] == lengths[:, 1]) & (lengths[:, 0] == lengths.max() if len(lengths) else True)
    for which in (round_, ~round_):
        if not which.any():
            continue
        width, height, angle = 2 * lengths[which, 0], 2 * lengths[which, 1], angles[which]
        if which is round_:
            width, height, angle = width[:1], height[:1], torch.zeros(1)
        axes.add_collection(
            EllipseCollection(
                width.tolist(),
                height.tolist(),
                angle.tolist(),
                units="xy",
                offsets=centres[which].numpy(),
                offset_transform=axes.transData,
                **style,
            )
        )


def _information_balls(scenes: Sequence[Scene], eps: float) -> Figure:
    """Return the field of the balls of both radii, shrunk; semi-axes longer than a cell's are cut."""
    figure, grid = _grid(2, scenes)
    for row, (name, distance) in enumerate((("δ", distance_to_center), ("d_B", distance_to_boundary))):
        for axes, scene in zip(grid[row], scenes, strict=True):
            _regions(axes, scene, strength=0.28)
            cell = 1 / math.isqrt(len(scene.field))
            lengths, directions = semi_axes(scene.field_metric, distance(scene.field_theta))
            drawn = (SHRUNK * lengths).clamp_max(0.46 * cell)
            angles = torch.atan2(directions[:, 1, 0], directions[:, 0, 0]).rad2deg()
            _ellipses(axes, scene.field, torch.full_like(drawn, SHRUNK * eps), angles, facecolor="#bbbbbb", zorder=2)
            holds = lengths[:, 0] >= eps
            for which, colour, width in ((holds, PALETTE[0], 1.4), (~holds, PALETTE[1], 2.0)):
                style = {"edgecolor": colour, "facecolor": "none", "linewidth": width, "zorder": 3}
                _ellipses(axes, scene.field[which], drawn[which], angles[which], **style)
        grid[row][0].set_ylabel(f"radius {'δ' if name == 'δ' else '$d_B$'}\n$x_2$", fontsize=14)
    _legend(
        figure,
        [
            Patch(color="#bbbbbb", label=f"Euclidean ball, ε = {eps:g} (all at {SHRUNK:g} of their size)"),
            Line2D([], [], color=PALETTE[0], label="information ball (cut to its cell), contains it"),
            Line2D([], [], color=PALETTE[1], linewidth=2, label="does not contain it"),
        ],
        3,
    )
    return figure


def _heights(scenes: Sequence[Scene]) -> Figure:
    figure, grid = _grid(2, scenes)
    rows: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
        ("δ: distance to the centre", distance_to_center, 2 * math.acos(3**-0.5)),
        ("$d_B$: distance to the boundary", distance_to_boundary, math.pi / 2),
    )
    for row, (name, distance, top) in enumerate(rows):
        colours = Normalize(0, top)
        for axes, scene in zip(grid[row], scenes, strict=True):
            heights = distance(scene.theta)
            steps = (heights / top * 2 * SHADES).round().view(scene.side, scene.side).numpy() * top / 2 / SHADES
            axes.imshow(steps, origin="lower", extent=(0, 1, 0, 1), cmap="cividis", norm=colours, interpolation="none")
            _contour(axes, scene, heights, list(np.arange(0.25, top, 0.25)), step=3, colors="white", linewidths=0.6)
            _boundary(axes, scene, PALETTE[1])  # black would be lost where the heights are dark
            _square(axes)
        bar = figure.colorbar(ScalarMappable(colours, "cividis"), ax=list(grid[row]), shrink=0.9)
        bar.set_label(f"{name}\n(lines: every 0.25)", fontsize=13)
    _legend(figure, [Line2D([], [], color=PALETTE[1], label="decision boundary")], 1)
    return figure


def _border(ball: Ball, share: float) -> np.ndarray:
    """Return where each ray has a ``share`` of the ball's radius; nan for a ray that ends before."""
    border = np.full(ball.rays.ends.shape, np.nan)
    for ray, why in enumerate(ball.rays.why):
        known = ball.rays.lengths[ray].isfinite()
        lengths = np.append(ball.rays.lengths[ray, known], ball.rays.radius[ray])
        places = np.concatenate([ball.rays.positions[ray, known], ball.rays.ends[[ray]]])
        if share == 1 and why == "radius":
            border[ray] = places[-1]
        elif share * ball.radius < lengths[-1]:
            border[ray] = [np.interp(share * ball.radius, lengths, column) for column in places.T]
    return border


def _geodesic_balls(scenes: Sequence[Scene], eps: float) -> Figure:
    number = max(len(scene.balls) for scene in scenes)
    figure = Figure(figsize=(4.3 * number + 0.6, 4.3 * len(scenes) + 0.9), layout="constrained")
    grid = figure.subplots(len(scenes), number, squeeze=False)
    for scene, line in zip(scenes, grid, strict=True):
        for axes, ball in zip(line, scene.balls, strict=True):
            _regions(axes, scene, strength=0.28)
            axes.set(xlabel="", ylabel="")
            centre, reach = _pair(ball.point), 2.2 * eps
            for path, end in zip(ball.rays.positions, ball.rays.ends, strict=True):
                curve = torch.cat([path[path.isfinite().all(1)], end[None]])
                seen = (curve - ball.point).abs().amax(1) < 1.1 * reach
                axes.plot(*torch.where(seen[:, None], curve, torch.nan).T, color=PALETTE[0], linewidth=0.6, alpha=0.7)
            why, ends = np.array(ball.rays.why), ball.rays.ends.numpy()
            for share, _, stroke in BORDERS:
                border = _border(ball, share)
                axes.plot(*np.concatenate([border, border[:1]]).T, stroke, color=PALETTE[0], linewidth=2.4)
            axes.plot(*ends[why == "fold"].T, "x", color=PALETTE[3], markersize=6, markeredgewidth=1.6)
            axes.plot(*torch.cat([ball.flat, ball.flat[:1]]).T, "--", color=PALETTE[1], linewidth=2)
            axes.add_patch(Circle(centre, eps, facecolor="none", edgecolor=INK, linewidth=1.6, linestyle=":"))
            axes.plot(*centre, MARKERS[ball.label], color=INK, markersize=6)
            axes.set_title(f"class {ball.label}, $d_B$ = {ball.radius:.2f}", fontsize=12)
            axes.set(xlim=(centre[0] - reach, centre[0] + reach), ylim=(centre[1] - reach, centre[1] + reach))
            axes.set(facecolor=OUTSIDE)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MultipleLocator(0.1))
        line[0].set_ylabel(f"{scene.name}\n$x_2$", fontsize=15)
    for axes in grid[-1]:
        axes.set_xlabel("$x_1$")
    _legend(
        figure,
        [
            *(
                Line2D([], [], color=PALETTE[0], linestyle=stroke, linewidth=2.4, label=f"geodesic ball, {share} $d_B$")
                for _, share, stroke in BORDERS
            ),
            Line2D([], [], color=PALETTE[0], linewidth=0.6, label="geodesics"),
            Line2D([], [], color=PALETTE[1], linestyle="--", linewidth=2, label="flat approximation of the whole ball"),
            Line2D([], [], color=INK, linestyle=":", linewidth=1.6, label=f"Euclidean ball, ε = {eps:g}"),
            Line2D([], [], color=PALETTE[3], marker="x", linestyle="", label="fold"),
            Patch(facecolor=OUTSIDE, label="outside the unit square"),
            *(
                Line2D([], [], color=INK, marker=marker, linestyle="", label=f"centre, class {label}")
                for label, marker in enumerate(MARKERS)
            ),
        ],
        3,
    )
    return figure


def _row_titles(grid: np.ndarray, titles: Sequence[str]) -> None:
    """Say at the left of each row what it shows; axes that are off have no label."""
    for axes, title in zip(grid[:, 0], titles, strict=True):
        axes.text(-0.06, 0.5, title, transform=axes.transAxes, rotation=90, ha="right", va="center", fontsize=14)


_BOUNDARY = Line2D([], [], color=INK, linewidth=0.8, linestyle="--", label="decision boundary in the simplex")

_CORNERS = np.array([[-math.sqrt(3) / 2, -0.5], [math.sqrt(3) / 2, -0.5], [0.0, 1.0]])


def _in_triangle(theta: Float[Tensor, "n 3"]) -> np.ndarray:
    """Return barycentric coordinates as points of the plane."""
    result: np.ndarray = theta.numpy() @ _CORNERS
    return result


def _on_sphere(theta: Float[Tensor, "n 3"]) -> np.ndarray:
    """Return ``μ = 2√θ`` as seen from far along (1, 1, 1), in which the three classes look alike."""
    result: np.ndarray = 2 * theta.sqrt().numpy() @ (_CORNERS * math.sqrt(2 / 3))
    return result


def _edges(project: Callable[[Tensor], np.ndarray], axes: Axes) -> None:
    """Draw the simplex, its decision boundary and its labels."""
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    nothing = torch.zeros_like(share)
    for k in range(3):
        edge = torch.stack([share, 1 - share, nothing], dim=1).roll(k, dims=1)
        axes.plot(*project(edge).T, color=INK, linewidth=1.4)
        tie = torch.stack([share / 3, 0.5 - share / 6, 0.5 - share / 6], dim=1).roll(k, dims=1)
        axes.plot(*project(tie).T, color=INK, linewidth=0.8, linestyle="--")
        x, y = project(torch.eye(3, dtype=torch.float64)[[k]])[0]
        if project is _in_triangle:
            x, y = (1 + 0.16 / math.hypot(x, y)) * np.array([x, y])
        else:  # inside the sphere's outline, and away from the edges and from what ends in the corner
            x, y = (0.97 * x, 1.37 * y) if y < 0 else (x, 1.13 * y)
        axes.text(x, y, f"class {k}", color=PALETTE[k], ha="center", va="center", fontsize=12)
    if project is _in_triangle:
        axes.set(xlim=(-1.25, 1.25), ylim=(-0.75, 1.3))
    else:
        axes.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1))
    axes.set_axis_off()
    axes.set_aspect("equal")


def _sphere(axes: Axes) -> None:
    axes.add_patch(Circle((0, 0), 2, facecolor="#f2f2f2", edgecolor="#999999", linewidth=0.8, zorder=0))


def _circles(scenes: Sequence[Scene], eps: float) -> Figure:
    """Return the circles' images, of each class thinner than of the one below, which could not be seen otherwise."""
    widths = (4.4, 2.7, 1.2)
    figure, grid = _grid(2, scenes, height=4.4)
    for column, scene in zip(grid.T, scenes, strict=True):
        _sphere(column[1])
        for axes, project in zip(column, (_in_triangle, _on_sphere), strict=True):
            _edges(project, axes)
            for label, theta in scene.circles:
                outline = project(torch.cat([theta, theta[:1]]))
                style = {"facecolor": (PALETTE[label], 0.18), "edgecolor": PALETTE[label], "linewidth": widths[label]}
                axes.fill(*outline.T, **style, joinstyle="round", zorder=3 + label)
    entries = [Line2D([], [], linestyle="", label=f"radius ε = {eps:g} around points of")]
    entries += [Line2D([], [], color=PALETTE[k], linewidth=width, label=f"class {k}") for k, width in enumerate(widths)]
    _row_titles(grid, ("in the simplex", "on the sphere"))
    _legend(figure, [*entries, _BOUNDARY], 5)
    return figure


def _attacks(scenes: Sequence[Scene], eps: float) -> Figure:
    figure, grid = _grid(2, scenes)
    for column, scene in zip(grid.T, scenes, strict=True):
        _regions(column[0], scene, strength=0.28)
        _sphere(column[1])
        _edges(_on_sphere, column[1])
        for path in scene.attacks:
            broken = int(path.theta[-1].argmax()) != path.label
            colour, stroke = PALETTE[path.label], "-" if broken else ":"
            column[0].add_patch(Circle(_pair(path.iterates[0]), eps, facecolor="none", edgecolor=INK, linewidth=0.7))
            for axes, curve in zip(column, (path.iterates.numpy(), _on_sphere(path.theta)), strict=True):
                axes.plot(*curve.T, color="white", linewidth=3.6, zorder=3)
                axes.plot(*curve.T, stroke, color=colour, linewidth=2, zorder=4)
                axes.plot(*curve[0], MARKERS[path.label], color=colour, markeredgecolor="white", markersize=9, zorder=5)
                axes.plot(
                    *curve[-1], "X" if broken else "P", color=INK, markeredgecolor="white", markersize=10, zorder=6
                )
    _row_titles(grid, ("", "on the sphere"))
    _legend(
        figure,
        [
            *_classes(),
            Line2D([], [], color=INK, marker="X", label="ends in another class"),
            Line2D([], [], color=INK, marker="P", linestyle=":", label="ends in its own"),
            Line2D([], [], color=INK, marker="o", fillstyle="none", linestyle="", label=f"ball of radius ε = {eps:g}"),
            _BOUNDARY,
        ],
        3,
    )
    return figure


def figures(
    scenes: Sequence[Scene], points: Float[Tensor, "points 2"], labels: Int[Tensor, "points"], eps: float
) -> dict[str, Figure]:
    """Return the figures by name.

    Args:
        scenes: what to draw of each classifier.
        points: test points.
        labels: their classes.
        eps: Euclidean radius of the balls.
    """
    return {
        "decision_regions": _decision_regions(scenes, points, labels, eps),
        "information_balls": _information_balls(scenes, eps),
        "heights": _heights(scenes),
        "geodesic_balls": _geodesic_balls(scenes, eps),
        "circles": _circles(scenes, eps),
        "attacks": _attacks(scenes, eps),
    }

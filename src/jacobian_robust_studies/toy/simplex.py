"""Figures of the toy model in the simplex and on the sphere, one classifier beside the other."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from jacobian_robust.reporting.figures import PALETTE
from jacobian_robust_studies.toy.plane import INK, MARKERS, class_keys, key, legend, panels, regions
from jacobian_robust_studies.toy.schema import Scene

__all__ = ["attacks", "circles", "edges", "in_triangle"]


def _row_titles(grid: np.ndarray, titles: Sequence[str]) -> None:
    """Say at the left of each row what it shows; axes that are off have no label."""
    for axes, title in zip(grid[:, 0], titles, strict=True):
        axes.text(-0.06, 0.5, title, transform=axes.transAxes, rotation=90, ha="right", va="center", fontsize=14)


_BOUNDARY = key("decision boundary in the simplex", linewidth=0.8, linestyle="--")

_CORNERS = np.array([[-math.sqrt(3) / 2, -0.5], [math.sqrt(3) / 2, -0.5], [0.0, 1.0]])


def in_triangle(theta: Float[Tensor, "n 3"]) -> np.ndarray:
    """Return barycentric coordinates as points of the plane."""
    result: np.ndarray = theta.numpy() @ _CORNERS
    return result


def on_sphere(theta: Float[Tensor, "n 3"]) -> np.ndarray:
    """Return ``μ = 2√θ`` as seen from far along (1, 1, 1), in which the three classes look alike."""
    result: np.ndarray = 2 * theta.sqrt().numpy() @ (_CORNERS * math.sqrt(2 / 3))
    return result


def edges(project: Callable[[Tensor], np.ndarray], axes: Axes) -> None:
    """Draw the simplex, its decision boundary and its labels."""
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    nothing = torch.zeros_like(share)
    for k in range(3):
        edge = torch.stack([share, 1 - share, nothing], dim=1).roll(k, dims=1)
        axes.plot(*project(edge).T, color=INK, linewidth=1.4)
        tie = torch.stack([share / 3, 0.5 - share / 6, 0.5 - share / 6], dim=1).roll(k, dims=1)
        axes.plot(*project(tie).T, color=INK, linewidth=0.8, linestyle="--")
        x, y = project(torch.eye(3, dtype=torch.float64)[[k]])[0]
        if project is in_triangle:
            x, y = (1 + 0.16 / math.hypot(x, y)) * np.array([x, y])
        else:  # inside the sphere's outline, and away from the edges and from what ends in the corner
            x, y = (0.9 * x, 1.5 * y) if y < 0 else (x, 1.13 * y)
        axes.text(x, y, f"class {k}", color=PALETTE[k], ha="center", va="center", fontsize=12)
    if project is in_triangle:
        axes.set(xlim=(-1.25, 1.25), ylim=(-0.75, 1.3))
    else:
        axes.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1))
    axes.set_axis_off()
    axes.set_aspect("equal")


def sphere(axes: Axes) -> None:
    axes.add_patch(Circle((0, 0), 2, facecolor="#f2f2f2", edgecolor="#999999", linewidth=0.8, zorder=0))


def circles(scenes: Sequence[Scene], eps: float) -> Figure:
    """Return circles in the square, and their images on the sphere."""
    figure, grid = panels(2, scenes)
    for column, scene in zip(grid.T, scenes, strict=True):
        regions(column[0], scene, strength=0.28)
        sphere(column[1])
        edges(on_sphere, column[1])
        for label, centre, theta in scene.circles:
            style: dict[str, Any] = {"facecolor": (PALETTE[label], 0.22), "edgecolor": PALETTE[label], "linewidth": 1.6}
            column[0].add_patch(Circle((float(centre[0]), float(centre[1])), eps, **style))
            column[0].plot(*centre, MARKERS[label], color=PALETTE[label], markeredgecolor="white", markersize=7)
            column[1].fill(*on_sphere(theta).T, **style, joinstyle="round", zorder=3)
    entries = [key(f"radius ε = {eps:g} around test points of class {k}", PALETTE[k]) for k in range(3)]
    _row_titles(grid, ("", "on the sphere"))
    legend(figure, [*entries, _BOUNDARY], 2)
    return figure


def attacks(scenes: Sequence[Scene], eps: float) -> Figure:
    """Return the paths of attacks in the square and on the sphere."""
    figure, grid = panels(2, scenes)
    for column, scene in zip(grid.T, scenes, strict=True):
        regions(column[0], scene, strength=0.28)
        sphere(column[1])
        edges(on_sphere, column[1])
        for path in scene.attacks:
            (x, y), label = path.numbers.point, path.numbers.label
            colour, stroke, mark = PALETTE[label], *(("-", "X") if path.numbers.broken else (":", "P"))
            column[0].add_patch(Circle((x, y), eps, facecolor="none", edgecolor=INK, linewidth=0.7))
            for axes, curve in zip(column, (path.iterates.numpy(), on_sphere(path.theta)), strict=True):
                axes.plot(*curve.T, color="white", linewidth=3.6, zorder=3)
                axes.plot(*curve.T, stroke, color=colour, linewidth=2, zorder=4)
                axes.plot(*curve[0], MARKERS[label], color=colour, markeredgecolor="white", markersize=9, zorder=5)
                axes.plot(*curve[-1], mark, color=INK, markeredgecolor="white", markersize=10, zorder=6)
    _row_titles(grid, ("", "on the sphere"))
    entries = [
        *class_keys(),
        key("ends in another class", marker="X"),
        key("ends in its own", marker="P", linestyle=":"),
        key(f"ball of radius ε = {eps:g}", marker="o", fillstyle="none", linestyle=""),
        _BOUNDARY,
    ]
    legend(figure, entries, 3)
    return figure

"""The figure of the geodesic balls: those that are balls, and folds."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from matplotlib.ticker import MaxNLocator

from jacobian_robust.reporting.figures import PALETTE
from jacobian_robust_studies.toy.plane import INK, MARKERS, key, legend, regions
from jacobian_robust_studies.toy.schema import LEVELS, Ball, Scene, samples

__all__ = ["geodesic_balls"]

OUTSIDE = "#e4e4e4"
BORDERS: tuple[tuple[float, str, Literal[":", "-.", "-"]], ...] = (
    (LEVELS[0], "a quarter of r", ":"),
    (LEVELS[1], "half of r", "-."),
    (1.0, "radius r", "-"),
)
"""Shares of a geodesic ball's radius, their names, and the line styles of these balls' borders."""


def geodesic_balls(scenes: Sequence[Scene], eps: float) -> Figure:
    """Return the largest geodesic balls that are balls, of the classifier with most of them, and a panel with folds."""
    best = max(scenes, key=lambda scene: len(scene.closed))
    folded = [(scene, ball) for scene in scenes for ball in scene.balls if _folds_seen(ball, eps)]
    shown = [(best, ball, max(_reach(ball), 1.1 * eps)) for ball in best.closed]
    shown += [(*max(folded, key=lambda pair: _folds_seen(pair[1], eps)), 1.6 * eps)] if folded else []
    shown = shown or [(best, best.balls[0], 1.6 * eps)]
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.5 * columns + 0.4, 4.4 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (scene, ball, reach) in zip(panels, shown, strict=False):
        regions(axes, scene, strength=0.28)
        _geodesic_ball(axes, ball, eps, reach)
        whole = ball.numbers.reached == ball.numbers.rays
        told = f"r = {ball.numbers.radius:.2f}, {_share(ball.numbers.share)}$d_B$" if whole else "a ball with folds"
        axes.set_title(f"{scene.title}, class {ball.numbers.label}: {told}", fontsize=12)
    for axes in panels[len(shown) :]:
        axes.remove()
    _keys(figure, eps)
    return figure


def _share(share: float) -> str:
    return {1.0: "", 0.75: "¾ ", 0.5: "½ ", 0.25: "¼ "}.get(share, f"{share:g} ")


def _reach(ball: Ball) -> float:
    """Return half the side of a panel with room for a ball."""
    centre = ball.rays.ends.new_tensor(ball.numbers.point)
    return 1.25 * float((ball.rays.ends - centre).abs().max())


def _folds_seen(ball: Ball, eps: float) -> float:
    """Return how far the folds spread that a panel would show."""
    centre = ball.rays.ends.new_tensor(ball.numbers.point)
    folds = ball.rays.ends[torch.tensor([why == "fold" for why in ball.rays.why])]
    near = folds[(folds - centre).abs().amax(1) < 1.6 * eps]
    return float(near.std(0).norm()) if len(near) > 1 else 0.0


def _keys(figure: Figure, eps: float) -> None:
    entries: list[Line2D | Patch] = [
        *(key(f"geodesic ball, {of}", PALETTE[0], linestyle=line, linewidth=2.2) for _, of, line in BORDERS[::-1]),
        key("geodesics", PALETTE[0], linewidth=0.6),
        key("flat approximation, radius r", PALETTE[1], linestyle="--", linewidth=2),
        key(f"Euclidean ball, ε = {eps:g}", linestyle=":", linewidth=1.6),
        key("a geodesic ends at a fold", PALETTE[3], marker="x", linestyle=""),
        key("decision boundary"),
    ]
    legend(figure, entries, 3)


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


def _geodesic_ball(axes: Axes, ball: Ball, eps: float, reach: float) -> None:
    """Draw a ball's geodesics, its borders, its flat approximation and the Euclidean ball."""
    (x, y), label = ball.numbers.point, ball.numbers.label
    for path, end in zip(ball.rays.positions, ball.rays.ends, strict=True):
        curve = torch.cat([path[path.isfinite().all(1)], end[None]])
        seen = (curve - curve.new_tensor([x, y])).abs().amax(1) < 1.1 * reach
        axes.plot(*torch.where(seen[:, None], curve, torch.nan).T, color=PALETTE[0], linewidth=0.6, alpha=0.7)
    if ball.numbers.reached == ball.numbers.rays:
        for share, _, stroke in BORDERS:
            border = _border(ball, share)
            axes.plot(*np.concatenate([border, border[:1]]).T, stroke, color=PALETTE[0], linewidth=2.2)
        axes.plot(*torch.cat([ball.flat, ball.flat[:1]]).T, "--", color=PALETTE[1], linewidth=2)
    folds = ball.rays.ends.numpy()[np.array(ball.rays.why) == "fold"]
    axes.plot(*folds.T, "x", color=PALETTE[3], markersize=6, markeredgewidth=1.6)
    axes.add_patch(Circle((x, y), eps, facecolor="none", edgecolor=INK, linewidth=1.6, linestyle=":"))
    axes.plot(x, y, MARKERS[label], color=INK, markersize=6)
    axes.set(facecolor=OUTSIDE, xlim=(x - reach, x + reach), ylim=(y - reach, y + reach), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))

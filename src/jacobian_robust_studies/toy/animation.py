"""An attack that walks through the square and through the simplex, step by step, as a GIF."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from PIL import Image

from jacobian_robust.reporting.figures import PALETTE
from jacobian_robust.reporting.figures.style import few_colours
from jacobian_robust_studies.toy.plane import INK, MARKERS, regions
from jacobian_robust_studies.toy.schema import Scene
from jacobian_robust_studies.toy.simplex import edges, in_triangle

__all__ = ["write_attack"]

STEPS = (*range(13), 15, 20, 30, 40)
"""Steps of the attack that are shown: it moves fast at first."""

MILLISECONDS, LAST = 220, 2500
"""How long a frame is shown, and the last one."""


def write_attack(scenes: Sequence[Scene], eps: float, path: Path) -> None:
    """Write the attacks of all classifiers as a GIF, a frame a step, which plays for ever."""
    figure = Figure(figsize=(3.1 * len(scenes), 6.1), layout="constrained")
    grid = figure.subplots(2, len(scenes), squeeze=False)
    for column, scene in zip(grid.T, scenes, strict=True):
        column[0].set_title(scene.title)
        regions(column[0], scene, strength=0.28)
        column[0].set(xlabel="", ylabel="", xticks=(), yticks=())
        edges(in_triangle, column[1])
        for attack in scene.attacks:
            x, y = attack.numbers.point
            column[0].add_patch(Circle((x, y), eps, facecolor="none", edgecolor=INK, linewidth=0.7))
    frames = []
    for step in STEPS:
        figure.suptitle(f"PGD within ε = {eps:g}, step {step} of {STEPS[-1]}")
        drawn = [line for column, scene in zip(grid.T, scenes, strict=True) for line in _walk(column, scene, step)]
        frames.append(_rendered(figure))
        for line in drawn:
            line.remove()
    palette = few_colours(frames[-1])
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [MILLISECONDS] * len(others) + [LAST]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def _walk(column: Sequence[Axes], scene: Scene, step: int) -> list[Line2D]:
    """Draw the attacks up to a step, in the square and in the simplex; return what was drawn."""
    drawn: list[Line2D] = []
    for attack in scene.attacks:
        label, far = attack.numbers.label, min(step, len(attack.iterates) - 1)
        for axes, curve in zip(column, (attack.iterates.numpy(), in_triangle(attack.theta)), strict=True):
            wrong = int(attack.theta[far].argmax()) != label
            drawn += axes.plot(*curve[: far + 1].T, color=PALETTE[label], linewidth=1.8, zorder=4)
            drawn += axes.plot(*curve[0], MARKERS[label], color=PALETTE[label], markeredgecolor="white", zorder=5)
            mark = "X" if wrong else "P"
            drawn += axes.plot(*curve[far], mark, color=INK, markeredgecolor="white", markersize=9, zorder=6)
    return drawn


def _rendered(figure: Figure) -> Image.Image:
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=90)
    return Image.fromarray(np.asarray(Image.open(pixels).convert("RGB")))

"""Sheets of adversarial examples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from jacobian_robust.attacks import Norm
from jacobian_robust.geometry.families import CATEGORICAL, Family, PixelCategorical
from jacobian_robust.reporting.figures.style import PALETTE, SYMBOLS, shortened
from jacobian_robust.robustness.examples import Examples

__all__ = ["adversarial_examples", "attack_picture"]

_GREY = {"cmap": "gray", "vmin": 0, "vmax": 1}
_CHANGE = {"cmap": "PuOr_r", "vmin": -1, "vmax": 1}
_ANGLE = "°"

RIGHT, OTHER, LOST, BACKGROUND = PALETTE[0], PALETTE[1], "#999999", "#FFFFFF"
"""Colours of a mask's pixels: right, of another class, taken for background, and background that is taken for it."""


@dataclass(frozen=True)
class _Row:
    """A row of pictures.

    Attributes:
        label: beside it.
        images: ``(n, channels, height, width)``.
        captions: above each; none leaves them out.
        colours: of images with one channel.
        angles: true and predicted ones, in degrees anticlockwise, to be drawn.
        scale: the change in a pixel that the colours end at, for a colour scale beside the row; none without one.
    """

    label: str
    images: Tensor
    captions: Sequence[str] = ()
    colours: Mapping[str, Any] | None = None
    colour: str = PALETTE[0]
    angles: Sequence[tuple[float, float]] = ()
    scale: float | None = None


def adversarial_examples(
    examples: Mapping[float, Examples],
    *,
    norm: Norm,
    title: str,
    family: Family = CATEGORICAL,
    unit: str = "",
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Return a sheet of broken images: for each budget rows of clean images, of attacked ones and of the change.

    Args:
        examples: by budget; images ``(n, channels, height, width)`` with pixels in [0, 1].
        norm: of the budgets.
        title: of the sheet.
        family: of the distribution that the model's outputs describe.
        unit: of the targets, if they have one.
        class_names: what the classes are called; ``None`` for their numbers.
    """
    shown = {eps: e for eps, e in examples.items() if len(e.adversarial)}
    blocks = [
        [*_pair(e, f"{SYMBOLS[norm]} = {eps:g}", family, unit, class_names), _difference(e)] for eps, e in shown.items()
    ]
    return _sheet(blocks, title)


def attack_picture(eps: float, examples: Examples, *, norm: Norm, title: str, family: Family, unit: str = "") -> Figure:
    """Return a picture of what an attack does to a few images and to what is predicted of them.

    Args:
        eps: the budget.
        examples: the images, broken or not.
        norm: of the budget.
        title: of the picture.
        family: of the distribution that the model's outputs describe.
        unit: of the targets, if they have one.
    """
    return _sheet([_pair(examples, f"{SYMBOLS[norm]} = {eps:g}", family, unit)], title)


def _pair(e: Examples, label: str, family: Family, unit: str, class_names: Sequence[str] | None = None) -> list[_Row]:
    """Return the rows of clean and of attacked images, with what is predicted for them."""
    if e.predicted is None:
        clean = _confident(e.clean_class, e.clean_confidence, class_names)
        attacked = _confident(e.adversarial_class, e.adversarial_confidence, class_names)
        return [_Row("clean", e.clean, clean, _GREY), _Row(label, e.adversarial, attacked, _GREY, PALETTE[1])]
    targets, *predictions = (value.cpu() for value in e.predicted)
    rows = []
    for name, images, said, colour in zip(
        ("clean", label), (e.clean, e.adversarial), predictions, PALETTE[:2], strict=True
    ):
        if isinstance(family, PixelCategorical):
            right = (said == targets).flatten(1).double().mean(-1)
            captions = [f"{share:.0%} right" for share in right.tolist()]
            rows += [_Row(name, images, colours=_GREY), _Row("mask", _masks(said, targets), captions, colour=colour)]
            continue
        captions = [f"{family.words(entry)}{unit}" for entry in said]
        angles = list(zip(targets.flatten().tolist(), said.flatten().tolist(), strict=True)) if unit == _ANGLE else []
        rows.append(_Row(name, images, captions, _GREY, colour, angles))
    return rows


def _confident(classes: Tensor, confidence: Tensor, names: Sequence[str] | None) -> list[str]:
    """Return the predicted classes with their probabilities."""
    return [
        f"{shortened(names[label]) if names else label}: {probability:.0%}"
        for label, probability in zip(classes.tolist(), confidence.tolist(), strict=True)
    ]


def _masks(said: Tensor, targets: Tensor) -> Tensor:
    """Return masks in the colours of what is right; the most frequent class is the background."""
    background = int(targets.flatten().mode().values)
    masks = torch.ones(*said.shape, 3)
    for colour, where in (
        (RIGHT, (said == targets) & (targets != background)),
        (OTHER, (said != targets) & (said != background)),
        (LOST, (said != targets) & (said == background)),
    ):
        masks[where] = torch.tensor(to_rgb(colour))
    return masks.movedim(-1, 1)


def _difference(e: Examples) -> _Row:
    """Return the row of the changes; those of colours around grey."""
    change = (e.adversarial - e.clean).cpu()
    scale = max(float(change.abs().max()), 1e-9)
    if change.shape[1] == 3:
        return _Row("change", change / scale / 2 + 0.5, colours={"cmap": "gray"}, scale=scale)
    return _Row("change", change / scale, colours=_CHANGE, scale=scale)


def _sheet(blocks: Sequence[Sequence[_Row]], title: str) -> Figure:
    """Return a sheet with blocks of rows, one below the other."""
    columns = max((len(row.images) for rows in blocks for row in rows), default=1)
    rows_in_all = sum(map(len, blocks)) or 3
    figure = Figure(figsize=(max(1.25 * columns + 1.2, 6), 1.3 * rows_in_all + 0.5), layout="constrained")
    figure.suptitle(title)
    if not blocks:
        figure.text(0.5, 0.4, "no image was broken", ha="center")
        return figure
    axes = figure.subplots()  # one for all images: an axes for each would take seconds to lay out
    top = 0.0
    for rows in blocks:
        for row in rows:
            top += 0.17 if row.captions else 0.06
            top += _draw(axes, row, top)
        top += 0.08
    beside = 0.55 if any(row.scale for rows in blocks for row in rows) else 0.0
    axes.set(xlim=(0, 1.1 * columns - 0.1 + beside), ylim=(top, 0), aspect="equal")
    axes.set_axis_off()
    return figure


def _draw_scale(axes: Axes, row: _Row, left: float, top: float, height: float) -> None:
    """Draw the colour scale of a row of changes."""
    shades = torch.linspace(1, -1, 64)[:, None].numpy()
    colours: dict[str, Any] = {"cmap": (row.colours or {}).get("cmap"), "vmin": -1, "vmax": 1}
    axes.imshow(shades, extent=(left, left + 0.1, top + height, top), aspect="auto", **colours)
    for place, change in ((0.0, row.scale), (0.5, 0.0), (1.0, -(row.scale or 0))):
        aligned = {0.0: "top", 0.5: "center", 1.0: "bottom"}[place]
        axes.text(left + 0.14, top + place * height, f"{change:+.2g}" if change else "0", fontsize=8, va=aligned)


def _draw(axes: Axes, row: _Row, top: float) -> float:
    """Draw a row below a line, and return its height."""
    *_, height_in_pixels, width_in_pixels = row.images.shape
    height = height_in_pixels / width_in_pixels
    axes.text(-0.12, top + height / 2, row.label, ha="right", va="center")
    if row.scale is not None:
        _draw_scale(axes, row, 1.1 * len(row.images), top, height)
    for column, image in enumerate(row.images.cpu()):
        seen = image if len(image) in (1, 3) else image.mean(0, keepdim=True)  # others have no colour
        left = 1.1 * column
        pixels = seen.movedim(0, -1).squeeze(-1).numpy()
        axes.imshow(pixels, extent=(left, left + 1, top + height, top), **dict(row.colours or {}))
        if row.captions:
            axes.text(
                left + 0.5, top - 0.02, row.captions[column], fontsize=9, color=row.colour, ha="center", va="bottom"
            )
        for angle, colour, stroke in _needles(row, column):
            across, up = -0.45 * math.sin(math.radians(angle)), 0.45 * math.cos(math.radians(angle))
            x, y = left + 0.5, top + height / 2
            axes.plot((x - across, x + across), (y + up, y - up), color=colour, linestyle=stroke, linewidth=1.8)
    return height


def _needles(row: _Row, column: int) -> Iterator[tuple[float, str, str]]:
    """Yield the angles of an image, in degrees anticlockwise from upright, with a colour and a stroke."""
    if row.angles:
        true, said = row.angles[column]
        yield true, "white", ":"
        yield said, row.colour, "-"

"""Sheets of adversarial examples."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting.figures.style import PALETTE, SYMBOLS, shortened
from jacobian_robust.robustness.budgets import Examples

__all__ = ["adversarial_examples"]


def adversarial_examples(
    examples: Mapping[float, Examples], *, norm: Norm, title: str, class_names: Sequence[str] | None = None
) -> Figure:
    """Return a sheet of broken images: for each budget rows of clean images, of attacked ones and of the difference.

    Args:
        examples: by budget; images ``(n, channels, height, width)`` with pixels in [0, 1].
        norm: of the budgets.
        title: of the sheet.
        class_names: what the classes are called; ``None`` for their numbers.
    """
    shown = {eps: e for eps, e in examples.items() if len(e.adversarial)}
    columns = max((len(e.adversarial) for e in shown.values()), default=1)
    figure = Figure(figsize=(max(1.25 * columns + 1.2, 6), 3.9 * max(len(shown), 1) + 0.5), layout="constrained")
    figure.suptitle(title)
    if not shown:
        figure.text(0.5, 0.4, "no image was broken", ha="center")
        return figure
    axes = figure.subplots()  # one for all images: an axes for each would take seconds to lay out
    *_, rows_of_pixels, columns_of_pixels = next(iter(shown.values())).clean.shape
    height, top = rows_of_pixels / columns_of_pixels, 0.0
    for eps, e in shown.items():
        clean = _captions(e.clean_class, e.clean_confidence, class_names)
        found = _captions(e.adversarial_class, e.adversarial_confidence, class_names)
        rows: tuple[tuple[str, Tensor, list[str], dict[str, Any]], ...] = (
            ("clean", e.clean, clean, {"cmap": "gray", "vmin": 0, "vmax": 1}),
            (f"{SYMBOLS[norm]} = {eps:g}", e.adversarial, found, {"cmap": "gray", "vmin": 0, "vmax": 1}),
            ("difference", e.adversarial - e.clean, [""] * len(found), {"cmap": "PuOr_r", "vmin": -1, "vmax": 1}),
        )
        scale = max(float((e.adversarial - e.clean).abs().max()), 1e-9)
        for offset, (label, images, captions, colours) in enumerate(rows):
            top += 0.17 if offset < 2 else 0.06
            axes.text(-0.12, top + height / 2, label, ha="right", va="center")
            for column, (image, caption) in enumerate(zip(images.cpu(), captions, strict=True)):
                seen = image if len(image) in (1, 3) else image.mean(0, keepdim=True)  # others have no colour
                pixels = seen.movedim(0, -1).squeeze(-1).numpy() / (scale if offset == 2 else 1)
                left = 1.1 * column
                axes.imshow(
                    pixels if pixels.ndim == 2 or offset < 2 else pixels / 2 + 0.5,
                    extent=(left, left + 1, top + height, top),
                    **colours,
                )
                colour = PALETTE[min(offset, 1)]
                axes.text(left + 0.5, top - 0.02, caption, fontsize=9, color=colour, ha="center", va="bottom")
            top += height
        top += 0.08
    axes.set(xlim=(0, 1.1 * columns - 0.1), ylim=(top, 0))
    axes.set_axis_off()
    return figure


def _captions(classes: Tensor, confidence: Tensor, names: Sequence[str] | None) -> list[str]:
    """Return the predicted classes with their probabilities."""
    return [
        f"{shortened(names[label]) if names else label}: {probability:.0%}"
        for label, probability in zip(classes.tolist(), confidence.tolist(), strict=True)
    ]

"""Predicted radii against attacks."""

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from jacobian_robust.reporting.figures.style import PALETTE, Points, in_words

__all__ = ["on_log_axes", "predicted_against_found"]


def predicted_against_found(points: Points) -> Figure:
    """Return the predicted radius against the smallest ℓ2 perturbation found, an image a point."""
    columns = min(len(points), 3)
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(5.6 * columns, 5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[len(points) :]:
        unused.set_axis_off()
    lengths = []
    for axes, name, (predicted, found) in zip(panels, in_words(list(points)), points.values(), strict=False):
        known = on_log_axes(predicted, found)
        x, y = predicted[known].cpu(), found[known].cpu()
        unsafe = y < x
        for which, colour, marker, label in (
            (~unsafe, PALETTE[0], "D", "not broken inside the radius"),
            (unsafe, PALETTE[1], "o", "broken inside it"),
        ):
            if which.any():
                style = {"s": 18, "alpha": 0.5, "color": colour, "marker": marker, "linewidths": 0}
                axes.scatter(x[which], y[which], label=f"{label}: {int(which.sum())}", **style)
        low, high = (float(f(torch.cat([x, y]))) if len(x) else 1.0 for f in (torch.min, torch.max))
        axes.plot([low, high], [low, high], color="black", linewidth=0.8, label="as predicted")
        axes.set(xscale="log", yscale="log", title=f"{name}, {len(x)} images")
        axes.set_xlabel("predicted radius")
        axes.set_ylabel("smallest ℓ2 perturbation found")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        lengths += y.tolist()
    if lengths:
        for axes in panels[: len(points)]:
            axes.set_ylim(0.7 * min(lengths), 1.5 * max(lengths))
    figure.suptitle("Radius that the geometry predicts, against attacks")
    return figure


def on_log_axes(predicted: Float[Tensor, "n"], found: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Return which points the prediction scatter can show: both lengths positive and finite."""
    return found.isfinite() & predicted.isfinite() & (predicted > 0) & (found > 0)

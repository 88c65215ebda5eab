"""Predicted radii against attacks."""

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from jacobian_robust.reporting.figures.style import PALETTE, Points

__all__ = ["on_log_axes", "predicted_against_found"]


def predicted_against_found(points: Points) -> Figure:
    """Return the predicted radius against the smallest ℓ2 perturbation found, an image a point."""
    columns = min(len(points), 3)
    rows = -(-len(points) // columns)
    figure = Figure(figsize=(5.6 * columns, 5 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[len(points) :]:
        unused.set_axis_off()
    for axes, (name, (predicted, found)) in zip(panels, points.items(), strict=False):
        known = on_log_axes(predicted, found)
        x, y = predicted[known].cpu(), found[known].cpu()
        unsafe = y < x
        for which, colour, label in ((~unsafe, PALETTE[0], "held"), (unsafe, PALETTE[1], "broken inside it")):
            if not which.any():
                continue
            axes.scatter(x[which], y[which], s=16, alpha=0.6, color=colour, linewidths=0, label=label)
        low, high = (float(f(torch.cat([x, y]))) if len(x) else 1.0 for f in (torch.min, torch.max))
        axes.plot([low, high], [low, high], color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=f"{name}, {len(x)} images")
        axes.set_xlabel("predicted radius")
        axes.set_ylabel("smallest ℓ2 perturbation found")
        axes.grid(alpha=0.3, which="both")
        if known.any():
            axes.set_ylim(0.7 * float(y.min()), 1.5 * float(y.max()))
            axes.legend()
    figure.suptitle("Radius that the geometry predicts, against attacks")
    return figure


def on_log_axes(predicted: Float[Tensor, "n"], found: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Return which points the prediction scatter can show: both lengths positive and finite."""
    return found.isfinite() & predicted.isfinite() & (predicted > 0) & (found > 0)

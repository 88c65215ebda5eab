"""Figures. Colours are Okabe and Ito's, which readers with any colour vision tell apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jacobian_robust.robustness import Examples

__all__ = ["accuracy_curve", "accuracy_curves", "adversarial_examples", "training_curves"]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Rows = Sequence[Mapping[str, float | int]]


def _curve(axes: Axes, rows: Rows, metric: str, splits: Mapping[str, str]) -> None:
    for color, (stage, label) in zip(PALETTE, splits.items(), strict=False):
        points = [(row["epoch"], row[name]) for row in rows if (name := f"{stage}_{metric}") in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)


def training_curves(rows: Rows, *, twin: Rows | None = None, penalised: bool, validation_name: str) -> Figure:
    """Return the four panels of the note's Figure 1 for one run.

    Args:
        rows: the rows of ``metrics.csv``.
        twin: those of the undefended twin, for the first panel; without one that panel shows the accuracy.
        penalised: whether the run had a penalty.
        validation_name: what the validation columns were measured on.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    (first, loss), (cross_entropy, penalty) = figure.subplots(2, 2)
    splits = {"train": "training", "validation": validation_name}
    if twin is not None:
        _curve(first, twin, "cross_entropy", splits)
        first.set(title="(a) Cross-entropy of the undefended twin", ylabel="nats")
    else:
        _curve(first, rows, "accuracy", splits)
        first.set(title="(a) Accuracy", ylabel="share of images")
    _curve(loss, rows, "loss", splits)
    loss.set(title="(b) Loss (eq. 16)" if penalised else "(b) Loss: cross-entropy alone")
    _curve(cross_entropy, rows, "cross_entropy", splits)
    cross_entropy.set(title="(c) Cross-entropy", ylabel="nats")
    if penalised:
        _curve(penalty, rows, "penalty", splits)
        penalty.set(title="(d) Penalty α, mean (eq. 15)")
    else:
        _curve(penalty, rows, "jacobian_norm", splits)
        penalty.set(title="(d) No penalty: mean Jacobian norm ‖J‖ (Frobenius)")
    for axes in figure.axes:
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def accuracy_curve(model: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the points ``(budget, accuracy on all images)`` of one model of ``robustness.json``, from budget 0 on."""
    points = {0.0: model["clean_accuracy"]} | {b["eps"]: b["robust_accuracy"] for b in model["budgets"]}
    return sorted(points.items())


def accuracy_curves(models: Sequence[Mapping[str, Any]], *, norm: str, split: str) -> Figure:
    """Return accuracy against budget, one line a model.

    Args:
        models: the ``models`` of ``robustness.json``.
        norm: of the ball, for the axis.
        split: whose images were attacked, for the title.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    markers = "osD^vPX"
    for i, model in enumerate(models):
        axes.plot(
            *zip(*accuracy_curve(model), strict=True),
            color=PALETTE[i % len(PALETTE)],
            marker=markers[i % len(markers)],
            linestyle=("-", "--", ":")[i // len(PALETTE) % 3],
            label=model["name"],
        )
    axes.set(
        xlabel=f"budget ε ({'ℓ∞' if norm == 'linf' else 'ℓ2'}, pixels in [0, 1])",
        ylabel="accuracy on all images",
        ylim=(-0.02, 1.02),
        title=f"Accuracy under attack, {models[0]['images']} {split} images",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def adversarial_examples(examples: Mapping[float, Examples], *, title: str) -> Figure:
    """Return a sheet of broken images: for each budget a row of clean images above a row of attacked ones.

    Args:
        examples: by budget; images ``(n, channels, height, width)`` with pixels in [0, 1].
        title: of the sheet.
    """
    shown = {eps: e for eps, e in examples.items() if len(e.adversarial)}
    columns = max((len(e.adversarial) for e in shown.values()), default=1)
    figure = Figure(figsize=(1.15 * columns + 1.2, 2.6 * max(len(shown), 1) + 0.5), layout="constrained")
    figure.suptitle(title)
    if not shown:
        figure.text(0.5, 0.4, "no image was broken", ha="center")
        return figure
    grid = figure.subplots(2 * len(shown), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for pair, (eps, e) in enumerate(shown.items()):
        rows = (("clean", e.clean, e.clean_class), (f"ε = {eps:g}", e.adversarial, e.adversarial_class))
        for offset, (label, images, classes) in enumerate(rows):
            line = grid[2 * pair + offset]
            line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
            for axes, image, predicted in zip(line, images.cpu(), classes.tolist(), strict=False):
                pixels = image.movedim(0, -1).squeeze(-1).numpy()
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
                axes.set_title(f"→ {predicted}", fontsize=9, color=PALETTE[offset], pad=2)
    return figure

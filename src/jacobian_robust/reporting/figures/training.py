"""Figures of a training."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jacobian_robust.reporting.figures.style import PALETTE, Rows, line_style

__all__ = ["progress", "training_curves"]


def _curve(axes: Axes, rows: Rows, metric: str, splits: Mapping[str, str]) -> None:
    for color, (stage, label) in zip(PALETTE, splits.items(), strict=False):
        points = [(row["epoch"], row[name]) for row in rows if (name := f"{stage}_{metric}") in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=label)


def training_curves(rows: Rows, *, twin: Rows | None = None, penalised: bool, validation_name: str) -> Figure:
    """Return the four panels of the note's Figure 1 for one run.

    Args:
        rows: the rows of ``metrics.csv``.
        twin: those of an undefended (vanilla) network, for the first panel; without one that panel shows the accuracy.
        penalised: whether the run had a penalty.
        validation_name: what the validation columns were measured on.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    (first, loss), (cross_entropy, penalty) = figure.subplots(2, 2)
    splits = {"train": "training", "validation": validation_name}
    of = "" if twin is None else ", with the penalty"
    if twin is not None:
        _curve(first, twin, "cross_entropy", splits)
        first.set(title="(a) Cross-entropy, undefended", ylabel="nats")
    else:
        _curve(first, rows, "accuracy", splits)
        first.set(title="(a) Accuracy", ylabel="share of images")
    _curve(loss, rows, "loss", splits)
    loss.set(title=f"(b) Loss{of} (eq. 16)", ylabel="loss")
    if not penalised:
        loss.set(title="(b) Loss, without a penalty", ylabel="nats")
    _curve(cross_entropy, rows, "cross_entropy", splits)
    cross_entropy.set(title=f"(c) Cross-entropy{of}", ylabel="nats")
    if penalised:
        _curve(penalty, rows, "penalty", splits)
        penalty.set(title="(d) Mean penalty α (eq. 15)", ylabel="penalty α")
        known = [row[key] for row in rows for key in ("train_penalty", "validation_penalty") if row.get(key, 0) > 0]
        if known and max(known) > 30 * min(known):
            penalty.set_yscale("log")  # one epoch far above the others would flatten them
    else:
        _curve(penalty, rows, "jacobian_norm", splits)
        penalty.set(title="(d) No penalty: mean Jacobian norm ‖J‖ (Frobenius)", ylabel="‖J‖")
    for axes in figure.axes:
        axes.set(xlabel="epoch")
        axes.title.set_fontsize("medium")  # the longest has to fit above its panel
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def progress(runs: Mapping[str, Rows]) -> Figure:
    """Return cross-entropy and error on the validation split over the epochs, one line a run.

    Args:
        runs: the rows of ``metrics.csv`` of each run, by its name.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    cross_entropy, error = figure.subplots(1, 2)
    for i, (name, rows) in enumerate(runs.items()):
        measured = [row for row in rows if "validation_accuracy" in row]
        epochs = [row["epoch"] for row in measured]
        drawn = {"markersize": 3, "label": name, **line_style(i)}
        cross_entropy.plot(epochs, [row["validation_cross_entropy"] for row in measured], **drawn)
        error.plot(epochs, [1 - row["validation_accuracy"] for row in measured], **drawn)
    cross_entropy.set(title="Cross-entropy on the test images", ylabel="nats")
    error.set(title="Test images that are wrong", ylabel="share of images (1 − accuracy)")
    for axes in figure.axes:
        axes.set(xlabel="epoch", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*cross_entropy.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure

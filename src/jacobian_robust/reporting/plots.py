"""Figures. Colours are Okabe and Ito's, which readers with any colour vision tell apart."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from jacobian_robust.attacks import Norm
from jacobian_robust.files import file_name
from jacobian_robust.robustness.budgets import Examples
from jacobian_robust.robustness.schema import Group, Model, Results
from jacobian_robust_studies.simplifications import DISTANCES, JACOBIAN_NORMS, VARIANTS, Study

__all__ = [
    "NORMS",
    "SYMBOLS",
    "Points",
    "Rows",
    "accuracy_curves",
    "adversarial_examples",
    "class_accuracy",
    "comparison",
    "group_curves",
    "methods_under_attack",
    "noise_curves",
    "on_log_axes",
    "predicted_against_found",
    "progress",
    "reliability_diagram",
    "six_simplifications",
    "suffix_of",
    "trade_off",
    "training_curves",
    "trials_by_method",
    "unmet_note",
]

ROUGHLY_RIGHT = 0.9
"""Clean accuracy below which a trial has no place in a picture of trials: it would squeeze all others."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Rows = Sequence[Mapping[str, float | int]]

Points = Mapping[str, tuple[Float[Tensor, "n"], Float[Tensor, "n"]]]
"""By the name of the model, the predicted radii and the lengths found, infinite where nothing was."""


def save(figures: Mapping[str, Figure], directory: Path) -> dict[str, Path]:
    """Write figures as ``NAME.png`` into a directory and return the files by name."""
    files = {name: directory / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(files[name], dpi=120)
    return files


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
    of = "" if twin is None else " of the regularised network"
    if twin is not None:
        _curve(first, twin, "cross_entropy", splits)
        first.set(title="(a) Cross-entropy of the vanilla network", ylabel="nats")
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
        penalty.set(title=f"(d) Mean penalty α{of} (eq. 15)", ylabel="penalty α")
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
        drawn = {"markersize": 3, "label": name, **_style(i)}
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


NORMS: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2", "gaussian": "Gaussian noise"}
"""As they are written for a reader."""

SYMBOLS: dict[Norm, str] = {"linf": "ε", "l2": "ε", "gaussian": "σ"}
"""What their budgets are called."""

_BUDGETS: dict[Norm, str] = {
    "linf": f"budget {SYMBOLS['linf']} (ℓ∞, pixels in [0, 1])",
    "l2": f"budget {SYMBOLS['l2']} (ℓ2, pixels in [0, 1])",
    "gaussian": f"standard deviation {SYMBOLS['gaussian']} (pixels in [0, 1])",
}
_MARKERS = "osD^vPX"


def _style(i: int) -> dict[str, Any]:
    """Return how the line of the i-th model looks: told apart by colour, marker and stroke."""
    return {
        "color": PALETTE[i % len(PALETTE)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[i // len(PALETTE) % 3],
    }


def unmet_note(results: Results, norm: Norm) -> str:
    """Return in words which budgets of a norm some of its attacks did not meet, or nothing where each met all."""
    budgets: dict[str, list[str]] = {}
    for eps, names in results.unmet(norm).items():
        budgets.setdefault(", ".join(names), []).append(f"{eps:g}")
    return "; ".join(f"{SYMBOLS[norm]} = {', '.join(eps)} without {names}" for names, eps in budgets.items())


def _note(figure: Figure, text: str) -> None:
    """Write a note below a figure: pictures are shown without their report, too."""
    if text:
        figure.supxlabel(textwrap.fill(text, 95), fontsize="small")


def accuracy_curves(models: Sequence[Model], *, norm: Norm, split: str, note: str = "") -> Figure:
    """Return accuracy against budget, one line a model.

    Args:
        models: the models of an evaluation.
        norm: of the budgets.
        split: whose images were attacked, for the title.
        note: below the axes.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(models):
        axes.plot(*zip(*model.accuracy(norm), strict=True), **_style(i), label=model.name)
    axes.set(
        xlabel=_BUDGETS[norm],
        ylabel="accuracy on all images",
        ylim=(-0.02, 1.02),
        title=f"Accuracy under attack, {models[0].images} {split} images",
    )
    _note(figure, note)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Name the lines: inside the axes, or above where many names would cover them (below is a note's place)."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 6:
        axes.legend()
    else:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(names))
        figure.legend(handles, names, loc="outside upper center", fontsize="small")


def group_curves(found: Sequence[Group], *, norm: Norm, images: str, note: str = "") -> Figure:
    """Return the mean accuracy against budget of models trained with several seeds, with their standard deviation.

    Args:
        found: the models.
        norm: of the budgets.
        images: how many of which were attacked, for the title, as ``500 test images``.
        note: below the axes.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(found):
        eps, means, spreads = zip(*sorted({(0.0, *group.clean), *group.robust[norm]}), strict=True)
        label = f"{group.name} ({len(group.seeds)} seeds)"
        axes.errorbar(eps, means, spreads, **_style(i), capsize=3, label=label)
    axes.set(
        xlabel=_BUDGETS[norm],
        ylabel="accuracy on all images",
        ylim=(-0.02, 1.02),
        title=f"Mean and standard deviation over the seeds, {images}",
    )
    _note(figure, note)
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def trade_off(results: Results, options: Sequence[Mapping[str, Any]], over: str) -> Figure:
    """Return the accuracies of runs over an option that was varied, and clean accuracy against robust accuracy.

    Args:
        results: the evaluation of the runs, of whose first norm the budgets are shown.
        options: by model, the options in which the runs differ.
        over: one of them, a number.
    """
    norm = results.norms[0]
    budgets = [eps for eps, _ in results.models[0].accuracy(norm) if eps]
    lines: dict[str, dict[float, list[Model]]] = {}  # by the other options, by the value: a model a seed
    for model, row in zip(results.models, options, strict=True):
        name = " ".join(f"{key}={value}" for key, value in row.items() if key not in (over, "seed"))
        lines.setdefault(name, {}).setdefault(row[over], []).append(model)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(f"Accuracy under attack, {results.models[0].images} {results.split} images")
    accuracy, against = figure.subplots(1, 2)
    for i, (name, by_value) in enumerate(lines.items()):
        values = sorted(by_value)
        curves = [[dict(model.accuracy(norm)) for model in by_value[value]] for value in values]
        for j, eps in enumerate((0.0, *budgets)):
            found = [[curve[eps] for curve in seeds] for seeds in curves]
            style = {**_style(j), "linestyle": ("-", "--", ":", "-.")[i % 4]}
            label = " ".join(filter(None, (name, f"{NORMS[norm]} {eps:g}" if eps else "clean")))
            accuracy.plot(values, [sum(seeds) / len(seeds) for seeds in found], **style, label=label)
            accuracy.fill_between(
                values, list(map(min, found)), list(map(max, found)), color=style["color"], alpha=0.15
            )
        clean, robust = ([sum(c[eps] for c in seeds) / len(seeds) for seeds in curves] for eps in (0.0, budgets[0]))
        against.plot(clean, robust, **_style(i), label=name or over)
        for value, x, y in zip(values, clean, robust, strict=True):
            against.annotate(f"{value:g}", (x, y), xytext=(5, 4), textcoords="offset points", fontsize="small")
    every = [value for by_value in lines.values() for value in by_value]
    if min(every) > 0 and max(every) > 10 * min(every):
        accuracy.set_xscale("log")
    accuracy.set(xlabel=over, ylabel="accuracy on all images", ylim=(-0.02, 1.02))
    accuracy.set_title(f"Over {over}: mean of the seeds, smallest to largest")
    against.set(xlabel="clean accuracy", ylabel=f"accuracy at {NORMS[norm]} {budgets[0]:g}")
    against.set_title(f"Clean against robust; numbers are {over}")
    for axes in (accuracy, against):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def trials_by_method(trials: Mapping[str, Mapping[str, tuple[float, float]]], *, robust: str) -> Figure:
    """Return clean against robust accuracy of trials, a panel for each method, the others' behind it in grey.

    Args:
        trials: by method and by what was tried, ``option=value``, pairs (clean accuracy, robust accuracy); those with
            nan are left out. The line joins them in their order.
        robust: what the robust accuracy is.
    """
    columns = min(len(trials), 5)
    rows = math.ceil(len(trials) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    known = {
        name: {what: point for what, point in points.items() if not any(map(math.isnan, point))}
        for name, points in trials.items()
    }
    every = [point for points in known.values() for point in points.values()]
    shown = [point for point in every if point[0] >= ROUGHLY_RIGHT] or every
    for axes, (name, points) in zip(panels, known.items(), strict=False):
        axes.plot(*zip(*shown, strict=True), linestyle="", marker=".", color="0.8", zorder=1)
        outside = ["further left, clean / robust:"]
        inside = [point for point in points.values() if point in shown]
        for what, point in points.items():
            value = " ".join(option.partition("=")[2] for option in what.split())
            if point not in shown:
                outside.append(f"{value}: {point[0]:.0%} / {point[1]:.0%}")
                continue
            if point == max(inside, key=lambda p: p[1]):  # neighbours' numbers keep apart
                offset, ha, va = (0, 5), "center", "bottom"
            elif point == min(inside, key=lambda p: p[1]):
                offset, ha, va = (0, -5), "center", "top"
            elif point[0] < fmean(p[0] for p in inside):
                offset, ha, va = (-6, 0), "right", "center"
            else:
                offset, ha, va = (6, 0), "left", "center"
            axes.annotate(value, point, xytext=offset, ha=ha, va=va, textcoords="offset points", fontsize="small")
        if points:
            axes.plot(*zip(*points.values(), strict=True), **_style(0) | {"zorder": 2})
        if outside[1:]:
            axes.text(0.04, 0.96, "\n".join(outside), va="top", transform=axes.transAxes, fontsize="x-small")
        options = dict.fromkeys(option.partition("=")[0] for what in trials[name] for option in what.split())
        axes.set_title(f"{name}\n{' '.join(options)}", fontsize="small")
        axes.grid(alpha=0.3)
    for limits, values in ((panels[0].set_xlim, [c for c, _ in shown]), (panels[0].set_ylim, [r for _, r in shown])):
        margin = 0.12 * (max(values) - min(values)) or 0.01
        limits(min(values) - margin, max(values) + 2 * margin)  # room for the numbers
    for axes in panels[len(trials) :]:
        axes.set_visible(False)
    for axes in panels[len(trials) - columns : len(trials)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.supxlabel("clean accuracy, validation images", fontsize="medium")
    figure.supylabel(
        robust.replace("_", " ").replace("linf", NORMS["linf"]).replace("l2", NORMS["l2"]), fontsize="medium"
    )
    return figure


def methods_under_attack(accuracy: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Return the accuracy of methods, clean and within each budget, a line each, the best of each panel on top.

    Args:
        accuracy: by panel and by method, shares of the images by what they met, the same for all.
    """
    heights = [len(methods) for methods in accuracy.values()]
    figure = Figure(figsize=(8, 0.24 * sum(heights) + 0.5 * len(heights) + 0.9), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False).flatten()
    for axes, (title, methods) in zip(panels, accuracy.items(), strict=True):
        names = sorted(methods, key=lambda name: fmean(methods[name].values()))
        shares = [list(methods[name].values()) for name in names]
        axes.hlines(names, [min(row) for row in shares], [max(row) for row in shares], color="0.85", zorder=1)
        for i, met in enumerate(methods[names[0]]):
            axes.plot([row[i] for row in shares], names, **_style(i) | {"linestyle": "", "label": met})
        axes.set_title(title, fontsize="medium")
        axes.margins(y=0.6 / len(names))
        axes.set_xlim(-0.03, 1.03)
        axes.grid(alpha=0.3, axis="x")
    panels[-1].set(xlabel="share of the images that are right")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(handles[0]), fontsize="small")
    return figure


def adversarial_examples(examples: Mapping[float, Examples], *, norm: Norm, title: str) -> Figure:
    """Return a sheet of broken images: for each budget rows of clean images, of attacked ones and of the difference.

    Args:
        examples: by budget; images ``(n, channels, height, width)`` with pixels in [0, 1].
        norm: of the budgets.
        title: of the sheet.
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
        clean = [f"{c}: {p:.0%}" for c, p in zip(e.clean_class.tolist(), e.clean_confidence.tolist(), strict=True)]
        found = [
            f"{c}: {p:.0%}"
            for c, p in zip(e.adversarial_class.tolist(), e.adversarial_confidence.tolist(), strict=True)
        ]
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
                pixels = image.movedim(0, -1).squeeze(-1).numpy() / (scale if offset == 2 else 1)
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


def class_accuracy(model: Model) -> Figure:
    """Return the accuracy by true class, clean and at each budget, as a table of colours."""
    columns = [("clean", [c.clean_correct for c in model.classes])]
    for threat in model.threats:
        for i, budget in enumerate(threat.budgets):
            counts = [c.robust_correct[threat.norm][i] for c in model.classes]
            columns.append((f"{NORMS[threat.norm]} {budget.eps:g}".replace(" ", "\n"), counts))
    shares = [[count[row] / max(c.images, 1) for _, count in columns] for row, c in enumerate(model.classes)]
    figure = Figure(figsize=(0.75 * len(columns) + 1.6, 0.36 * len(model.classes) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            axes.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", color="white" if share < 0.6 else "black"
            )
    axes.set_xticks(range(len(columns)), [name for name, _ in columns], fontsize=8)
    axes.set_yticks(range(len(shares)), [f"{c.label}  ({c.images})" for c in model.classes], fontsize=8)
    axes.set(title=f"{model.name}: accuracy by class, %", ylabel="class (images)")
    return figure


def predicted_against_found(points: Points) -> Figure:
    """Return the first-order radius against the smallest ℓ2 perturbation found, an image a point."""
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
        axes.set_xlabel("predicted: d_B / ‖J_μ‖₂")
        axes.set_ylabel("smallest ℓ2 perturbation found")
        axes.grid(alpha=0.3, which="both")
        if known.any():
            axes.set_ylim(0.7 * float(y.min()), 1.5 * float(y.max()))
            axes.legend()
    figure.suptitle("Fisher–Rao radius to first order, against attacks")
    return figure


def on_log_axes(predicted: Float[Tensor, "n"], found: Float[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Return which points the prediction scatter can show: both lengths positive and finite."""
    return found.isfinite() & predicted.isfinite() & (predicted > 0) & (found > 0)


def six_simplifications(study: Study, *, split: str) -> Figure:
    """Return the note's six simplifications in a panel each, but for the third, and what the condition promised.

    Args:
        study: what was measured at one classifier.
        split: whose images were evaluated, for the legends.
    """
    figure = Figure(figsize=(13, 13.5), layout="constrained")
    things = _things(study)
    figure.suptitle(
        f"{study.result.name}: the note's simplifications, {study.result.images} {split} {things}; "
        "(3) has no panel: eqs. 9 and 10 are equivalent"
    )
    panels = figure.subplot_mosaic(
        [["1", "1", "2", "2", "4", "4"], ["5", "5", "5", "6", "6", "6"], ["falls"] * 6], height_ratios=(1, 1, 1.15)
    )
    names = {"evaluated": f"{split} {things}", "training": f"training {things}"}
    for key, title, label in (
        ("1", "(1) δ in place of $d_B$", "δ / $d_B$: distance to the centre / to the boundary"),
        ("4", "(4) Frobenius norm in place of the spectral one", "‖J‖$_F$ / ‖J‖₂"),
    ):
        for colour, stroke, (place, (sample, _)) in zip(PALETTE, ("-", "--"), study.samples.items(), strict=False):
            radii = sample.radii
            ratio = radii.center / radii.boundary if key == "1" else radii.frobenius / radii.spectral
            ratio = ratio[ratio.isfinite()].cpu()
            if len(ratio):
                panels[key].ecdf(ratio, color=colour, linestyle=stroke, label=names[place])
        panels[key].set(xlabel=label, ylabel=f"share of {things} below")
        panels[key].set_title(title, fontsize=11)
        panels[key].legend(loc="lower right")  # the curves rise at the left
    panels["1"].set_xscale("log")
    spread = panels["1"].get_xlim()[1] / panels["1"].get_xlim()[0]
    panels["1"].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 300 else (1,)))
    panels["1"].xaxis.set_major_formatter("{x:g}")
    panels["1"].xaxis.set_minor_formatter(NullFormatter())
    _flatness(panels["2"], study)
    _conditions(panels["5"], study, names)
    _epochs(panels["6"], study)
    _falls(panels["falls"], study, split)
    for axes in panels.values():
        axes.grid(alpha=0.3)
    return figure


def _things(study: Study) -> str:
    """Return what a reader calls the samples: those of height 1, as the toy model's, are no pictures."""
    return "points" if all(sample.images.shape[-2] == 1 for sample, _ in study.samples.values()) else "images"


def _typeset(text: str) -> str:
    """Return a text with its subscripts set below the line."""
    return text.replace("d_B", "$d_B$").replace("‖_F", "‖$_F$")


def _flatness(axes: Axes, study: Study) -> None:
    """Draw the true displacement over its first order against the radius: medians and quartiles."""
    points = study.result.flatness.points
    lines = {
        "along J's worst direction, the faster of its signs": [(p.radius, p.worst) for p in points],
        "along the nearest adversarial example": [(p.radius, p.attack) for p in points],
    }
    for colour, stroke, (label, line) in zip(PALETTE, ("-", "--"), lines.items(), strict=False):
        known = [(radius, found) for radius, found in line if found is not None]
        if not known:
            continue
        r = [radius for radius, _ in known]
        axes.fill_between(r, [d.q25 for _, d in known], [d.q75 for _, d in known], color=colour, alpha=0.2, linewidth=0)
        axes.plot(r, [d.median for _, d in known], color=colour, linestyle=stroke, label=label)
    axes.axhspan(0.9, 1.1, color="black", alpha=0.15, linewidth=0, label="within 10%")
    axes.set(xscale="log", yscale="log", xlabel="radius r (ℓ2)", ylabel="d(F(x), F(x + rv)) / (‖Jv‖ r)")
    axes.set_title("(2) Flat metric: median and quartiles", fontsize=11)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    axes.legend(loc="upper left", fontsize=9)


def _conditions(axes: Axes, study: Study, names: Mapping[str, str]) -> None:
    """Draw the share of images that satisfy the condition against its radius, for the spectral norm."""
    for stroke, (place, (sample, _)) in zip(("-", "--"), study.samples.items(), strict=False):
        for colour, (bound, distance) in zip(PALETTE, DISTANCES.items(), strict=False):
            longest = (sample.radii.center if bound == "center" else sample.radii.boundary) / sample.radii.spectral
            longest = longest[~longest.isnan()].cpu()
            if len(longest):
                label = f"‖J‖₂ ≤ {_typeset(distance)}/ε, {names[place]}"
                axes.ecdf(longest, complementary=True, color=colour, linestyle=stroke, label=label)
    if study.result.condition_eps is not None:
        axes.axvline(study.result.condition_eps, color="black", linewidth=0.8, label="ε of (6)")
    axes.set(xscale="log", xlabel="ε (ℓ2)", ylabel="share that satisfies the condition")
    axes.set_title(f"(5) Condition on {names['training']} and on others", fontsize=11)
    axes.legend()


def _epochs(axes: Axes, study: Study) -> None:
    """Draw the share of images that violate the condition after each epoch of the training."""
    things = _things(study)
    epochs = [epoch for epoch in study.result.epochs if epoch.train is not None]
    for colour, stroke, label in zip(
        PALETTE, ("-", "--"), (f"training {things}", f"{things} of its validation curves"), strict=False
    ):
        shares = [
            (e.epoch, 1 - share)
            for e in epochs
            if (share := e.train if label == f"training {things}" else e.validation) is not None
        ]
        if shares:
            axes.plot(*zip(*shares, strict=True), color=colour, linestyle=stroke, marker="o", markersize=3, label=label)
    axes.set(xlabel="epoch", ylabel="share that violates eq. 14", ylim=(-0.05, 1.05))
    eps = study.result.condition_eps
    axes.set_title(f"(6) Violations during training{f', at ε = {eps:.4g}' if eps is not None else ''}", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center")


def _falls(axes: Axes, study: Study, split: str) -> None:
    """Draw what became of the correct images, by whether the condition held there, at each radius and variant."""
    falls = study.result.falls_of("evaluated")
    parts = (
        ("condition held, stood", PALETTE[2], "", [f.satisfied - f.satisfied_fell for f in falls]),
        ("held, fell by 1: $d_B$ denies it", PALETTE[4], "//", [f.by_center for f in falls]),
        ("held, fell by 2: not flat", PALETTE[1], "xx", [f.by_curvature for f in falls]),
        ("violated, fell (5, 6)", "#BBBBBB", "", [f.violated_fell for f in falls]),
        ("violated, stood", PALETTE[5], "..", [f.violated_stood for f in falls]),
    )
    gap = len(VARIANTS) + 1
    places = [number // len(VARIANTS) * gap + number % len(VARIANTS) for number in range(len(falls))]
    bottom = [0.0] * len(falls)
    for label, colour, hatch, counts in parts:
        shares = [count / max(fall.images, 1) for count, fall in zip(counts, falls, strict=True)]
        axes.bar(places, shares, bottom=bottom, width=0.9, color=colour, hatch=hatch, edgecolor="white", label=label)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    ticks = [_typeset(f"{DISTANCES[f.bound]}\n{JACOBIAN_NORMS[f.norm]}") for f in falls]
    for number in range(0, len(falls), len(VARIANTS)):
        middle = places[number] + (len(VARIANTS) - 1) / 2
        axes.text(middle, 1.02, f"ε = {falls[number].eps:g}", ha="center", va="bottom")
    axes.set_xticks(places, ticks, fontsize=8)
    things = _things(study)
    axes.set(ylabel=f"share of the correct {things}", ylim=(0, 1.08))
    axes.set_title(f"What ‖J‖ ≤ d/ε promised, and what fell to ℓ2 attacks ({split} {things})", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(parts), frameon=False)


def reliability_diagram(models: Sequence[Model], *, split: str) -> Figure:
    """Return accuracy against confidence: the diagonal is a model that can be taken at its word.

    Args:
        models: the models of an evaluation.
        split: whose images they saw, for the title.
    """
    figure = Figure(figsize=(5.4, 4.8 + 0.2 * len(models)), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for i, model in enumerate(models):
        if model.calibration is not None and model.calibration.bins:
            confidence, accuracy, images = zip(*model.calibration.bins, strict=True)
            style = _style(i)
            ece = model.calibration.ece
            # A bin of a few images says little: its mark is small.
            sizes = [12 + 40 * math.log10(n) for n in images]
            axes.plot(confidence, accuracy, color=style["color"], linestyle=style["linestyle"], alpha=0.3)
            axes.scatter(
                confidence,
                accuracy,
                s=sizes,
                color=style["color"],
                marker=style["marker"],
                label=f"{model.name}: ECE {'–' if ece is None else f'{ece:.3f}'}",
            )
    axes.set(
        xlabel="mean confidence of the bin",
        ylabel="accuracy",
        title=f"Calibration, {models[0].images} clean {split} images\n(larger marks: more images)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")  # marks can be anywhere in the square
    return figure


def noise_curves(models: Sequence[Model], *, split: str) -> Figure:
    """Return the accuracy under Gaussian noise of growing strength.

    Args:
        models: the models of an evaluation.
        split: whose images they saw, for the title.
    """
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(models):
        if not model.noise:
            continue
        axes.plot(
            [point.sigma for point in model.noise],
            [point.accuracy for point in model.noise],
            **_style(i),
            label=model.name,
        )
    axes.set(xlabel=_BUDGETS["gaussian"], ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_title(f"Accuracy under noise, {models[0].images} {split} images")
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def suffix_of(model: str, models: int) -> str:
    """Return what the name of a model's own figure ends in, if there are several models."""
    return f"_{file_name(model.replace('/', '_'))}" if models > 1 else ""


def comparison(results: Results, alike: Sequence[Group]) -> dict[str, Figure]:
    """Return the figures of an evaluation that its results alone are enough for, by name.

    Args:
        results: the evaluation.
        alike: models that differ in their training seed alone.
    """
    figures = {}
    for norm in results.norms:
        note = unmet_note(results, norm)
        figures[f"accuracy_{norm}"] = accuracy_curves(results.models, norm=norm, split=results.split, note=note)
        if alike:
            images = f"{results.models[0].images} {results.split} images"
            figures[f"seeds_{norm}"] = group_curves(alike, norm=norm, images=images, note=note)
    if any(model.calibration for model in results.models):
        figures["calibration"] = reliability_diagram(results.models, split=results.split)
        figures["noise"] = noise_curves(results.models, split=results.split)
    for model in results.models:
        suffix = suffix_of(model.name, len(results.models))
        figures[f"classes{suffix}"] = class_accuracy(model)
    return figures

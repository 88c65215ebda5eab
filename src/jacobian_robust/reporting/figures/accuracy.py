"""Accuracy against budgets, options, noise, confidence and classes."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from jacobian_robust.attacks import Norm
from jacobian_robust.reporting.figures.style import (
    BUDGET_LABELS,
    NORMS,
    headline,
    in_words,
    line_style,
    name_lines,
    shortened,
    wilson_bars,
    write_note,
)
from jacobian_robust.robustness.schema import Group, Model, Results

__all__ = ["accuracy_curves", "class_accuracy", "group_curves", "noise_curves", "reliability_diagram", "trade_off"]


def accuracy_curves(models: Sequence[Model], *, norm: Norm, split: str, note: str = "") -> Figure:
    """Return accuracy against budget, one line a model, with Wilson's 95% intervals.

    Args:
        models: the models of an evaluation.
        norm: of the budgets.
        split: whose images were attacked, for the title.
        note: below the axes.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    names = in_words([model.name for model in models])
    for i, (model, name) in enumerate(zip(models, names, strict=True)):
        eps, shares = zip(*model.accuracy(norm), strict=True)
        axes.plot(eps, shares, **line_style(i), label=name)
        bars = wilson_bars(shares, [model.images] * len(shares))
        axes.errorbar(eps, shares, bars, fmt="none", ecolor=line_style(i)["color"])
    axes.set(
        xlabel=BUDGET_LABELS[norm],
        ylabel=f"{models[0].right} on all images",
        ylim=(-0.02, 1.02),
        title=f"{headline(models[0].right)} under attack, {models[0].images:,} {split} images",
    )
    write_note(figure, note)
    axes.grid(alpha=0.3)
    name_lines(figure, axes)
    return figure


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
    names = in_words([group.name for group in found])
    for i, (group, name) in enumerate(zip(found, names, strict=True)):
        eps, means, spreads = zip(*sorted({(0.0, *group.clean), *group.robust[norm]}), strict=True)
        label = f"{name} ({len(group.seeds)} seeds)"
        axes.errorbar(eps, means, spreads, **line_style(i), capsize=3, label=label)
    axes.set(
        xlabel=BUDGET_LABELS[norm],
        ylabel="accuracy on all images",
        ylim=(-0.02, 1.02),
        title=f"Mean and standard deviation over the seeds, {images}",
    )
    write_note(figure, note)
    axes.grid(alpha=0.3)
    name_lines(figure, axes)
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
    figure.suptitle(f"{headline(results.right)} under attack, {results.models[0].images:,} {results.split} images")
    accuracy, against = figure.subplots(1, 2)
    for i, (name, by_value) in enumerate(lines.items()):
        values = sorted(by_value)
        curves = [[dict(model.accuracy(norm)) for model in by_value[value]] for value in values]
        for j, eps in enumerate((0.0, *budgets)):
            found = [[curve[eps] for curve in seeds] for seeds in curves]
            style = {**line_style(j), "linestyle": ("-", "--", ":", "-.")[i % 4]}
            label = " ".join(filter(None, (name, f"{NORMS[norm]} {eps:g}" if eps else "clean")))
            accuracy.plot(values, [sum(seeds) / len(seeds) for seeds in found], **style, label=label)
            accuracy.fill_between(
                values, list(map(min, found)), list(map(max, found)), color=style["color"], alpha=0.15
            )
        clean, robust = ([sum(c[eps] for c in seeds) / len(seeds) for seeds in curves] for eps in (0.0, budgets[0]))
        against.plot(clean, robust, **line_style(i), label=name or over)
        for value, x, y in zip(values, clean, robust, strict=True):
            against.annotate(f"{value:g}", (x, y), xytext=(5, 4), textcoords="offset points", fontsize="small")
    every = [value for by_value in lines.values() for value in by_value]
    if min(every) > 0 and max(every) > 10 * min(every):
        accuracy.set_xscale("log")
    accuracy.set(xlabel=over, ylabel=f"{results.right} on all images", ylim=(-0.02, 1.02))
    accuracy.set_title(f"Over {over}: mean of the seeds, smallest to largest")
    against.set(xlabel="clean accuracy", ylabel=f"accuracy at {NORMS[norm]} {budgets[0]:g}")
    against.set_title(f"Clean against robust; numbers are {over}")
    for axes in (accuracy, against):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
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
    axes.set_yticks(range(len(shares)), [f"{shortened(c.called)}  ({c.images})" for c in model.classes], fontsize=8)
    axes.set_ylabel("class (images)")
    name = textwrap.fill(in_words([model.name])[0], 9 * len(columns) + 12)
    figure.suptitle(f"{name}\naccuracy by class, %", fontsize="medium")
    return figure


def reliability_diagram(models: Sequence[Model], *, split: str) -> Figure:
    """Return accuracy against confidence: the diagonal is a model that can be taken at its word.

    Args:
        models: the models of an evaluation.
        split: whose images they saw, for the title.
    """
    figure = Figure(figsize=(5.4, 4.8 + 0.2 * len(models)), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    names = in_words([model.name for model in models])
    for i, (model, name) in enumerate(zip(models, names, strict=True)):
        if model.calibration is not None and model.calibration.bins:
            confidence, accuracy, images = zip(*model.calibration.bins, strict=True)
            style = line_style(i)
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
                label=f"{name}: ECE {'–' if ece is None else f'{ece:.3f}'}",
            )
    axes.set(
        xlabel="mean confidence of the bin",
        ylabel="accuracy",
        title=f"Calibration, {models[0].images:,} clean {split} images\n(larger marks: more images)",
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
    names = in_words([model.name for model in models])
    for i, (model, name) in enumerate(zip(models, names, strict=True)):
        if not model.noise:
            continue
        axes.plot(
            [point.sigma for point in model.noise],
            [point.accuracy for point in model.noise],
            **line_style(i),
            label=name,
        )
    axes.set(xlabel=BUDGET_LABELS["gaussian"], ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_title(f"Accuracy under noise, {models[0].images:,} {split} images")
    axes.grid(alpha=0.3)
    name_lines(figure, axes)
    return figure

"""The figure of the six simplifications."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from jacobian_robust.reporting.figures import PALETTE, in_words
from jacobian_robust.robustness.prediction import Radii
from jacobian_robust_studies.simplifications.schema import (
    DISTANCES,
    VARIANTS,
    ModelSimplifications,
    Split,
)

__all__ = ["six_simplifications"]


def six_simplifications(
    result: ModelSimplifications, radii: Mapping[Split, Radii], *, split: str, things: str = "images"
) -> Figure:
    """Return the note's six simplifications in a panel each, but for the third, and what the condition promised.

    Args:
        result: what was measured at one classifier.
        radii: of the evaluated images, and of training images where there are some.
        split: whose images were evaluated, for the legends.
        things: what the samples are called: those of the toy model are points.
    """
    figure = Figure(figsize=(11, 12.5), layout="constrained")
    figure.suptitle(
        f"{in_words([result.name])[0]}: the note's simplifications, {result.images:,} {split} {things}\n"
        "(3) has no panel: eqs. 9 and 10 are equivalent"
    )
    panels = figure.subplot_mosaic(
        [["1", "1", "2", "2", "4", "4"], ["5", "5", "5", "6", "6", "6"], ["falls"] * 6], height_ratios=(1, 1, 1.15)
    )
    names = {"evaluated": f"{split} {things}", "training": f"training {things}"}
    for key, title, label in (
        ("1", "(1) δ in place of $d_B$", "δ / $d_B$: to the centre / to the boundary"),
        ("4", "(4) Frobenius norm for spectral", "‖J‖$_F$ / ‖J‖₂"),
    ):
        for colour, stroke, (place, of) in zip(PALETTE, ("-", "--"), radii.items(), strict=False):
            ratio = of.center / of.boundary if key == "1" else of.frobenius / of.spectral
            ratio = ratio[ratio.isfinite()].cpu()
            _shares(panels[key], ratio, color=colour, linestyle=stroke, label=names[place])
        panels[key].set(xlabel=label, ylabel=f"share of {things} below")
        panels[key].set_title(title, fontsize=11)
        panels[key].legend(loc="lower right")  # the curves rise at the left
    panels["1"].set_xscale("log")
    spread = panels["1"].get_xlim()[1] / panels["1"].get_xlim()[0]
    panels["1"].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 300 else (1,)))
    panels["1"].xaxis.set_major_formatter("{x:g}")
    panels["1"].xaxis.set_minor_formatter(NullFormatter())
    _flatness(panels["2"], result)
    _conditions(panels["5"], result, radii, names)
    _epochs(panels["6"], result, things)
    _falls(panels["falls"], result, f"{split} {things}")
    for axes in panels.values():
        axes.grid(alpha=0.3)
    return figure


def _shares(axes: Axes, values: Float[Tensor, "n"], **style: Any) -> None:
    """Draw the distribution function of values, from 201 quantiles: more make the file large, not the line finer."""
    if len(values):
        axes.ecdf(values.quantile(torch.linspace(0, 1, 201, dtype=values.dtype)), **style)


def _typeset(text: str) -> str:
    """Return a text with its subscripts set below the line."""
    return text.replace("d_B", "$d_B$").replace("‖_F", "‖$_F$")


def _flatness(axes: Axes, result: ModelSimplifications) -> None:
    """Draw the true displacement over its first order against the radius: medians and quartiles."""
    points = result.flatness.points
    lines = {
        "along J's worst direction": [(p.radius, p.worst) for p in points],
        "to the nearest example": [(p.radius, p.attack) for p in points],
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
    axes.legend(loc="upper left")


def _conditions(
    axes: Axes, result: ModelSimplifications, radii: Mapping[Split, Radii], names: Mapping[str, str]
) -> None:
    """Draw the share of images that satisfy the condition against its radius, for the spectral norm."""
    for stroke, (place, of) in zip(("-", "--"), radii.items(), strict=False):
        for colour, (bound, distance) in zip(PALETTE, DISTANCES.items(), strict=False):
            longest = (of.center if bound == "center" else of.boundary) / of.spectral
            longest = longest[~longest.isnan()].cpu()
            label = f"‖J‖₂ ≤ {_typeset(distance)}/ε, {names[place]}"
            _shares(axes, longest, complementary=True, color=colour, linestyle=stroke, label=label)
    if result.condition_eps is not None:
        axes.axvline(result.condition_eps, color="black", linewidth=0.8, label="ε of (6)")
    axes.set(xscale="log", xlabel="ε (ℓ2)", ylabel="share that satisfies the condition")
    axes.set_title(f"(5) Condition on {names['training']} and on others", fontsize=11)
    axes.legend()


def _epochs(axes: Axes, result: ModelSimplifications, things: str) -> None:
    """Draw the share of images that violate the condition after each epoch of the training."""
    epochs = [epoch for epoch in result.epochs if epoch.train is not None]
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
    eps = result.condition_eps
    axes.set_title(f"(6) Violations during training{f', at ε = {eps:.4g}' if eps is not None else ''}", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center")


def _falls(axes: Axes, result: ModelSimplifications, sample: str) -> None:
    """Draw the correct images by whether the condition holds and whether they are robust, by radius and variant."""
    falls = result.falls_of("evaluated")
    parts = (
        ("promised, robust", PALETTE[2], "", [f.satisfied - f.satisfied_fell for f in falls]),
        ("promised, broken: by 1, with $d_B$ not promised", PALETTE[4], "//", [f.by_center for f in falls]),
        ("promised, broken: by 2, the metric is not flat", PALETTE[1], "xx", [f.by_curvature for f in falls]),
        ("not promised, broken (5, 6)", "#BBBBBB", "", [f.violated_fell for f in falls]),
        ("not promised, robust", PALETTE[5], "..", [f.violated_stood for f in falls]),
    )
    gap = len(VARIANTS) + 1
    places = [number // len(VARIANTS) * gap + number % len(VARIANTS) for number in range(len(falls))]
    bottom = [0.0] * len(falls)
    for label, colour, hatch, counts in parts:
        shares = [count / max(fall.images, 1) for count, fall in zip(counts, falls, strict=True)]
        axes.bar(places, shares, bottom=bottom, width=0.9, color=colour, hatch=hatch, edgecolor="white", label=label)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    ticks = [_typeset(f"{DISTANCES[f.bound]}\n{f.norm[:4]}.") for f in falls]
    for number in range(0, len(falls), len(VARIANTS)):
        middle = places[number] + (len(VARIANTS) - 1) / 2
        axes.text(middle, 1.02, f"ε = {falls[number].eps:g}", ha="center", va="bottom")
    axes.set_xticks(places, ticks, fontsize="small")
    axes.set(ylabel=f"share of the correct {sample}", ylim=(0, 1.08), xlabel="distance d and norm of the condition")
    axes.set_title("What the condition ‖J‖ ≤ d/ε promised, and what ℓ2 attacks broke", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)

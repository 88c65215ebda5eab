"""The figure of the six simplifications."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from jacobian_robust.reporting.figures.style import PALETTE
from jacobian_robust_studies.simplifications.measure import Study
from jacobian_robust_studies.simplifications.schema import DISTANCES, JACOBIAN_NORMS, VARIANTS

__all__ = ["six_simplifications"]


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
    """Return the name of the samples: those of height 1, as the toy model's, are no pictures."""
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
    """Draw the correct images by whether the condition holds and whether they are robust, by radius and variant."""
    falls = study.result.falls_of("evaluated")
    parts = (
        ("condition holds, robust", PALETTE[2], "", [f.satisfied - f.satisfied_fell for f in falls]),
        ("holds, fall by 1: $d_B$ denies it", PALETTE[4], "//", [f.by_center for f in falls]),
        ("holds, fall by 2: not flat", PALETTE[1], "xx", [f.by_curvature for f in falls]),
        ("violated, fall (5, 6)", "#BBBBBB", "", [f.violated_fell for f in falls]),
        ("violated, robust", PALETTE[5], "..", [f.violated_stood for f in falls]),
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
    axes.set_title(f"What ‖J‖ ≤ d/ε promised, and the falls under ℓ2 attacks ({split} {things})", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(parts), frameon=False)

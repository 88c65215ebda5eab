"""How figures look. The colours are those of Okabe and Ito, distinct for any colour vision."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox, BboxBase, ScaledTranslation
from PIL import Image
from torch import Tensor

from jacobian_robust.attacks import Norm
from jacobian_robust.files import file_name
from jacobian_robust.robustness.schema import Results
from jacobian_robust.robustness.statistics import wilson_interval

__all__ = [
    "BUDGET_LABELS",
    "NORMS",
    "PALETTE",
    "SYMBOLS",
    "Points",
    "Rows",
    "few_colours",
    "headline",
    "in_words",
    "line_style",
    "name_lines",
    "name_points",
    "percent",
    "save",
    "shortened",
    "suffix_of",
    "unmet_note",
    "wilson_bars",
    "write_note",
    "write_picture",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


Rows = Sequence[Mapping[str, float | int]]


Points = Mapping[str, tuple[Float[Tensor, "n"], Float[Tensor, "n"]]]
"""By the name of the model, the predicted radii and the lengths found, infinite where nothing was."""


def save(figures: Mapping[str, Figure], directory: Path) -> dict[str, Path]:
    """Write figures as ``NAME.png``, all but sheets of images as ``NAME.svg`` too; return the PNG files by name."""
    files = {name: directory / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(files[name], dpi=120)
        if not name.startswith("examples"):
            figure.savefig(files[name].with_suffix(".svg"))
    return files


def few_colours(picture: Image.Image) -> Image.Image:
    """Return an image whose palette has 128 colours of a picture, those of :data:`PALETTE` and white among them."""
    sure = (*PALETTE, "#FFFFFF")
    kept = 128 - len(sure)
    found = (picture.quantize(kept, dither=Image.Dither.NONE).getpalette() or [])[: 3 * kept]
    # Pillow takes colours so near as one, and white paper would be drawn in the greyer.
    near = [min(found[i : i + 3]) >= 246 for i in range(0, len(found), 3)]
    colours = [255 if near[i // 3] else value for i, value in enumerate(found)]
    result = Image.new("P", (1, 1))
    result.putpalette(colours + [int(colour[i : i + 2], 16) for colour in sure for i in (1, 3, 5)])
    return result


def write_picture(figure: Figure, path: Path, *, dpi: int = 90) -> None:
    """Write a figure for a document, as small files: ``path`` with the endings ``.png`` and ``.svg``.

    The PNG has 128 colours. The SVG has coordinates to a hundredth of a point. Equal figures give equal files.
    """
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=dpi)
    picture = Image.open(pixels).convert("RGB")
    picture.quantize(palette=few_colours(picture), dither=Image.Dither.NONE).save(
        path.with_suffix(".png"), optimize=True
    )
    text = io.StringIO()
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    lean = re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text.getvalue())
    path.with_suffix(".svg").write_text(lean, encoding="utf-8")


NORMS: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2", "gaussian": "Gaussian noise"}
"""As they are written for a reader."""


SYMBOLS: dict[Norm, str] = {"linf": "ε", "l2": "ε", "gaussian": "σ"}
"""What their budgets are called."""


BUDGET_LABELS: dict[Norm, str] = {
    "linf": f"budget {SYMBOLS['linf']} (ℓ∞, pixels in [0, 1])",
    "l2": f"budget {SYMBOLS['l2']} (ℓ2, pixels in [0, 1])",
    "gaussian": f"standard deviation {SYMBOLS['gaussian']} (pixels in [0, 1])",
}


def percent(share: float | None) -> str:
    """Return a share in percent, with one digit after the point; a dash for none."""
    return "–" if share is None else f"{share:.1%}"


def wilson_bars(shares: Sequence[float], images: Sequence[int]) -> list[list[float]]:
    """Return how far Wilson's 95% intervals reach below and above shares of so many images."""
    ends = [wilson_interval(share, of) for share, of in zip(shares, images, strict=True)]
    below = [max(share - low, 0) for share, (low, _) in zip(shares, ends, strict=True)]
    return [below, [max(high - share, 0) for share, (_, high) in zip(shares, ends, strict=True)]]


def headline(words: str) -> str:
    """Return words that begin with a capital."""
    return words[:1].upper() + words[1:]


WORDS = {
    "note_vanilla": "undefended",
    "note_regularized": "the note's penalty",
    "note_isometry": "isometry",
    "note_constant_eta": "the note's penalty, constant η",
    "inner_softmax": "inner softmax",
    "double_softmax": "two softmaxes",
    "vanilla": "undefended",
    "frobenius_sphere": "Frobenius penalty, sphere",
    "frobenius": "Frobenius penalty",
    "spectral": "spectral penalty",
    "linear_margin": "linear margin",
    "certified_margin": "certified margin",
    "input_gradient": "input gradient",
    "fgsm": "FGSM training",
    "pgd_3": "PGD training, 3 steps",
    "pgd_10": "PGD training, 10 steps",
    "pgd_40": "PGD training, 40 steps",
    "mtl_ibp": "MTL-IBP",
    "pgd": "PGD training",
    "trades": "TRADES",
    "vat": "VAT",
    "hoffman": "Hoffman's penalty",
    "lagrangian": "Lagrangian",
    "margin": "first-order margin",
    "curvature": "curvature penalty",
    "parseval": "Parseval networks",
    "free": "free adversarial training",
    "averaged": "linear margin + noise + averaged weights",
}
"""What parts of a run's name mean; other parts are taken as they are."""

_PARTS = re.compile("|".join([r"seed[=_-]?(?P<seed>\d+)", *map(re.escape, WORDS), r"[a-z0-9]+"]))


def in_words(names: Sequence[str]) -> list[str]:
    """Return what runs are called in a figure: ``linear_margin_noise`` is *linear margin + noise*.

    Of ``DIRECTORY/NAME`` the name alone is said, if it has words and these tell all apart. Names that say their options
    (``eta.max=0.1``) or hold a capital or an unusual sign stay as they are. So do all names if two would become the
    same.
    """
    last = [name.rpartition("/")[2] for name in names]
    short = [_in_words(name) if _in_words(name) != name else whole for name, whole in zip(last, names, strict=True)]
    for said in (short, [_in_words(name) for name in names]):
        if len(set(said)) == len(set(names)):
            return said
    return list(names)


def _in_words(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_/+-]+", name):
        return name
    found = list(_PARTS.finditer(name))
    words = [WORDS.get(part[0], part[0]) for part in found if not part["seed"]]
    seeds = [f", seed {part['seed']}" for part in found if part["seed"]]
    return " + ".join(dict.fromkeys(words)) + "".join(seeds) if any(part[0] in WORDS for part in found) else name


_MARKERS = "osD^vPX"


def line_style(i: int) -> dict[str, Any]:
    """Return how the line of the i-th model looks: told apart by colour, marker and stroke."""
    return {
        "color": PALETTE[i % len(PALETTE)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[i // len(PALETTE) % 3],
    }


def unmet_note(results: Results, norm: Norm) -> str:
    """Return in words which budgets of a norm some of its attacks did not have; nothing where each had all."""
    budgets: dict[str, list[str]] = {}
    for eps, names in results.unmet(norm).items():
        budgets.setdefault(", ".join(names), []).append(f"{eps:g}")
    return "; ".join(f"{SYMBOLS[norm]} = {', '.join(eps)} without {names}" for names, eps in budgets.items())


def write_note(figure: Figure, text: str) -> None:
    """Write a note below a figure: pictures are shown without their report, too."""
    if text:
        figure.supxlabel(textwrap.fill(text, 95), fontsize="small")


def name_lines(figure: Figure, axes: Axes) -> None:
    """Name the lines: beside one or two, inside the axes, or above where many names would cover the lines.

    Below is a note's place.
    """
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 2:
        _label_lines(axes, [next(iter(handle.get_children()), handle) for handle in handles], names)
    elif len(names) <= 6:
        axes.legend(labelcolor="linecolor")
    else:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(names))
        figure.legend(handles, names, loc="outside upper center", fontsize="small")


def _label_lines(axes: Axes, lines: Sequence[Any], names: Sequence[str]) -> None:
    """Write the name of one line or two beside it, where the two are furthest apart."""
    xs = np.linspace(*axes.get_xlim(), 200)
    data = [(np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in lines]
    heights = [np.interp(xs, x, y) for x, y in data]
    low, high = axes.get_ylim()
    gap = np.abs(heights[0] - heights[-1]) if len(lines) == 2 else np.ones(len(xs))
    inside = (xs > np.quantile(xs, 0.15)) & (xs < np.quantile(xs, 0.6))
    place = int(np.where(inside, gap, -1).argmax())
    for line, height, name in zip(lines, heights, names, strict=True):
        upper = height[place] >= max(h[place] for h in heights)
        room = (height[place] - low) / (high - low)
        axes.annotate(
            name,
            (xs[place], height[place]),
            xytext=(8, 6) if upper else (-8, -6),
            textcoords="offset points",
            ha="left" if upper or room < 0.1 else "right",
            va="bottom" if upper or room < 0.1 else "top",
            color=line.get_color(),
            fontweight="bold",
        )


def name_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of points beside them, where they cover neither another point nor another name.

    A name that finds no room near its point is joined to it by a line. The limits of the axes are to be set before.

    Args:
        figure: with the axes.
        axes: with the points.
        points: their coordinates, names and colours.
    """
    figure.draw_without_rendering()  # only then is the place of the axes known
    frame, dot = axes.get_window_extent(), figure.dpi / 72
    marks = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x - 5 * dot, y - 5 * dot, 10 * dot, 10 * dot) for x, y in marks]
    directions = [(1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)]
    places = [(far, far * across, far * up) for far in (8, 16, 26, 38, 52, 68) for across, up in directions]
    for x, y, name, colour in points:
        tried: list[tuple[float, Text, Bbox, tuple[float, float]]] = []
        for far, across, up in places:
            shifted = axes.transData + ScaledTranslation(across / 72, up / 72, figure.dpi_scale_trans)
            aligned: dict[str, Any] = {"ha": "left" if across > 0 else "right" if across < 0 else "center"}
            aligned["va"] = "center" if abs(up) < far / 2 else "bottom" if up > 0 else "top"
            text = axes.text(x, y, name, fontsize="small", color=colour, transform=shifted, **aligned)
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable across lines
            box = text.get_window_extent()
            covered = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, frame)
            tried.append((covered + far, text, box, (across, up)))
            if covered < 1:
                break
        best = min(tried, key=lambda place: place[0])
        for place in tried:
            if place is not best:
                place[1].remove()
        taken.append(best[2])
        if math.hypot(*best[3]) > 12:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6}
            axes.annotate("", (x, y), best[3], textcoords="offset points", arrowprops=line)


def _overlap(one: BboxBase, other: BboxBase) -> float:
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


def shortened(name: str) -> str:
    """Return the name of a class as a figure has room for it; a dollar sign would begin a formula."""
    return (name if len(name) <= 12 else f"{name[:11]}…").replace("$", r"\$")


def suffix_of(model: str, models: int) -> str:
    """Return what the name of a model's own figure ends in, if there are several models."""
    return f"_{file_name(model.replace('/', '_'))}" if models > 1 else ""

"""How figures look. The colours are those of Okabe and Ito, distinct for any colour vision."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from jacobian_robust.attacks import Norm
from jacobian_robust.files import file_name
from jacobian_robust.robustness.schema import Results

__all__ = [
    "BUDGET_LABELS",
    "NORMS",
    "PALETTE",
    "SYMBOLS",
    "Points",
    "Rows",
    "headline",
    "line_style",
    "name_lines",
    "save",
    "shortened",
    "suffix_of",
    "unmet_note",
    "write_note",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


Rows = Sequence[Mapping[str, float | int]]


Points = Mapping[str, tuple[Float[Tensor, "n"], Float[Tensor, "n"]]]
"""By the name of the model, the predicted radii and the lengths found, infinite where nothing was."""


def save(figures: Mapping[str, Figure], directory: Path) -> dict[str, Path]:
    """Write figures as ``NAME.png``, those for a talk as ``NAME.svg`` too, and return the PNG files by name."""
    files = {name: directory / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(files[name], dpi=120)
        if name.startswith("attack"):
            figure.savefig(files[name].with_suffix(".svg"))
    return files


NORMS: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2", "gaussian": "Gaussian noise"}
"""As they are written for a reader."""


SYMBOLS: dict[Norm, str] = {"linf": "ε", "l2": "ε", "gaussian": "σ"}
"""What their budgets are called."""


BUDGET_LABELS: dict[Norm, str] = {
    "linf": f"budget {SYMBOLS['linf']} (ℓ∞, pixels in [0, 1])",
    "l2": f"budget {SYMBOLS['l2']} (ℓ2, pixels in [0, 1])",
    "gaussian": f"standard deviation {SYMBOLS['gaussian']} (pixels in [0, 1])",
}


def headline(words: str) -> str:
    """Return words that begin with a capital."""
    return words[:1].upper() + words[1:]


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
    """Name the lines: inside the axes, or above where many names would cover them (below is a note's place)."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 6:
        axes.legend()
    else:
        figure.set_figheight(figure.get_figheight() + 0.2 * len(names))
        figure.legend(handles, names, loc="outside upper center", fontsize="small")


def shortened(name: str) -> str:
    """Return the name of a class as a figure has room for it; a dollar sign would begin a formula."""
    return (name if len(name) <= 12 else f"{name[:11]}…").replace("$", r"\$")


def suffix_of(model: str, models: int) -> str:
    """Return what the name of a model's own figure ends in, if there are several models."""
    return f"_{file_name(model.replace('/', '_'))}" if models > 1 else ""

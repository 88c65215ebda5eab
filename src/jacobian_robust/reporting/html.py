"""The report of an evaluation: one HTML file that needs nothing else, neither a network nor a script."""

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf

from jacobian_robust.attacks import Norm
from jacobian_robust.files import write_atomically
from jacobian_robust.provenance import run_url
from jacobian_robust.reporting import figures as plots
from jacobian_robust.reporting.certificates import certified_table
from jacobian_robust.reporting.figures import NORMS, SYMBOLS, unmet_note
from jacobian_robust.reporting.gallery import Tile
from jacobian_robust.reporting.summary import summarised
from jacobian_robust.robustness.schema import Group, Results

__all__ = ["Section", "Sheet", "write_report"]

CAPTIONS = {
    "overview": "Each model on clean images and, within each budget, under attack; certified is dark and in brackets. "
    "Lines are Wilson's 95% intervals.",
    "accuracy": "Share of all images that are robust under the attacks of each budget, with Wilson's 95% intervals.",
    "certified": "Accuracy under attack (solid) and certified accuracy (dashed): the network's robust accuracy is "
    "in the shaded area.",
    "seeds": "Mean and standard deviation over training seeds.",
    "trade_off": "Runs over the option that was varied: mean over the seeds, and their smallest and largest value.",
    "first_order": "An image a point: the radius that the geometry predicts against the smallest ℓ2 "
    "perturbation that an attack found. Below the line the prediction erred on the unsafe side.",
    "calibration": "Accuracy against confidence on the clean images; on the diagonal they are equal.",
    "noise": "Accuracy under Gaussian noise, one draw an image.",
    "classes": "Accuracy by true class, clean and at each budget.",
    "attack": "What PGD does to the first images that are right: its last iterates, whether they break them or not. "
    "A needle is a predicted angle, a dotted one the true angle; pixels of a mask are blue where they are right, "
    "orange where another class is predicted, grey where they are taken for background.",
    "examples": "Images broken within the budget, first those that no smaller one broke: clean, attacked and the "
    "difference, with the predicted class and its probability. They are a random sample that takes the classes in "
    "turn. PGD ends at the first iterate that breaks an image, so that low probabilities are usual.",
}


@dataclass(frozen=True)
class Section:
    """A section of diagnostics.

    Attributes:
        html: with its heading; all that is not its own is escaped in it.
        captions: of its figures, by how their names begin.
    """

    html: str
    captions: Mapping[str, str]


@dataclass(frozen=True)
class Sheet:
    """A picture of adversarial examples that an earlier evaluation left, for a report of several.

    Attributes:
        model: what the model is called in this report.
        norm: of the budgets; ``None`` if there is no picture.
        png: the picture; ``None`` if there is none.
        place: of an evaluation without pictures, its directory seen from that of the report.
        link: to it, if it is there.
    """

    model: str
    norm: Norm | None = None
    png: bytes | None = None
    place: str | None = None
    link: str | None = None


def write_report(
    path: Path,
    results: Results,
    alike: Sequence[Group],
    figures: Mapping[str, Path],
    config: Mapping[str, Any],
    section: Section | None = None,
    sheets: Sequence[Sheet] = (),
    tiles: Sequence[Tile] = (),
) -> None:
    """Write the report of an evaluation.

    Args:
        path: of the HTML file.
        results: the evaluation.
        alike: models that differ in their training seed alone.
        figures: PNG files by name, in the order in which they are shown.
        config: what was asked for, as plain containers.
        section: of the diagnostics, if any were measured.
        sheets: of earlier evaluations, shown after the figures.
        tiles: of the gallery.
    """
    captions = CAPTIONS | dict(section.captions if section else {})
    text = (
        _environment()
        .get_template("report.html")
        .render(
            results=results,
            summary=summarised(results),
            tiles=tiles,
            choices={of: list(dict.fromkeys(getattr(t, of) for t in tiles)) for of in ("model", "label", "outcome")},
            groups=alike,
            section=section.html if section else "",
            section_kinds=tuple(section.captions) if section else (),
            figures=[_shown(name, file, captions) for name, file in figures.items()],
            sheets=[_sheet(sheet) for sheet in sheets],
            examples_caption=CAPTIONS["examples"],
            headline=plots.headline(results.right),
            norms=NORMS,
            symbols=SYMBOLS,
            certified={norm: certified_table(results, norm) for norm in results.norms},
            unmet={norm: unmet_note(results, norm) for norm in results.norms},
            config=OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        )
    )
    with write_atomically(path) as file:
        file.write(text)


@functools.cache  # compiling the template takes a fifth of a second
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jacobian_robust.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["run_url"] = lambda identity: run_url(identity or "")
    environment.filters["percent"] = plots.percent
    environment.filters["significant"] = lambda value: "–" if value is None else f"{value:.3g}"
    environment.filters["decimals"] = lambda value, of: "–" if value is None else f"{value:.{of}f}"
    return environment


def _embedded(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _shown(name: str, file: Path, captions: Mapping[str, str]) -> dict[str, str]:
    kind, caption = next((kind, text) for kind, text in captions.items() if name.startswith(kind))
    return {"name": name, "kind": kind, "caption": caption, "data": _embedded(file.read_bytes())}


def _sheet(sheet: Sheet) -> dict[str, str | None]:
    return {
        "name": f"{sheet.model}, {NORMS[sheet.norm]}" if sheet.norm else sheet.model,
        "data": _embedded(sheet.png) if sheet.png else None,
        "place": sheet.place,
        "link": sheet.link,
    }

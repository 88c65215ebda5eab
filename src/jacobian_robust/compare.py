"""One report of finished evaluations: ``python -m jacobian_robust.compare EVALUATION… --out DIRECTORY``.

Evaluations of single checkpoints can run side by side, on several machines, and be put together afterwards. Models that
differ in their training seed alone are also shown as mean ± standard deviation. The pictures of adversarial examples
stay in the reports of the single evaluations.
"""

import argparse
import contextlib
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from torch import Tensor, tensor

from jacobian_robust import plots
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation import print_results
from jacobian_robust.files import claimed, distinct_names, write_atomically
from jacobian_robust.report import write_report
from jacobian_robust.results import Results, groups

__all__ = ["compare", "gather"]

ALIKE = ("split", "independent", "seed", "attacks")
"""What has to be the same for figures to be put side by side."""


def _read(place: Path) -> tuple[Path, Results]:
    found = [p for p in (place, place / "robustness.json", place / "evaluation" / "robustness.json") if p.is_file()]
    if not found:
        raise UserError(f"{place}: no robustness.json in this directory or in its evaluation/")
    file = found[0].resolve()
    called = file.parent if file.name == "robustness.json" else file.with_suffix("")
    try:
        return called, Results.model_validate_json(found[0].read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{found[0]} is no evaluation of this version ({error.error_count()} errors): evaluate the checkpoint again"
        ) from error


def gather(places: Sequence[Path]) -> Results:
    """Return the models of finished evaluations as one evaluation.

    Args:
        places: directories of evaluations or of runs that hold one, or ``robustness.json`` files.

    Raises:
        UserError: if one cannot be read, or was attacked in another way than the first.
    """
    return _together(_read_all(places))


def _read_all(places: Sequence[Path]) -> dict[Path, Results]:
    """Return the evaluations by their directory, all of them made alike."""
    read: dict[Path, Results] = {}
    for place in places:
        directory, results = _read(place)
        if directory in read:
            raise UserError(f"{place} is named twice")
        read[directory] = results
    (first, of), *rest = read.items()
    for place, other in rest:
        if different := [name for name in ALIKE if getattr(other, name) != getattr(of, name)]:
            raise UserError(f"{place} was evaluated otherwise than {first}: {', '.join(different)} differ")
        if other.models[0].images != of.models[0].images:
            raise UserError(f"{place} has {other.models[0].images} images, {first} {of.models[0].images}")
        if other.models[0].data != of.models[0].data:
            raise UserError(f"{place} is of {other.models[0].data}, {first} of {of.models[0].data}")
    return read


def _names(read: Mapping[Path, Results]) -> dict[tuple[Path, str], str]:
    """Return what each model is called, by its evaluation's directory and its name there."""
    return {
        (directory, model.name): name if len(results.models) == 1 else f"{name}/{model.name}"
        for name, (directory, results) in zip(distinct_names(list(read)), read.items(), strict=True)
        for model in results.models
    }


def _together(read: Mapping[Path, Results]) -> Results:
    names = _names(read)
    models = [
        model.model_copy(update={"name": names[directory, model.name]})
        for directory, results in read.items()
        for model in results.models
    ]
    return next(iter(read.values())).model_copy(update={"models": models})


def _points(read: Mapping[Path, Results]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each image's predicted radius and the smallest perturbation found, by the model, where they were kept."""
    points = {}
    for (directory, model), name in _names(read).items():
        with contextlib.suppress(FileNotFoundError), (directory / "images.csv").open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["name"] == model and row.get("predicted_l2")]
            if rows:
                predicted = tensor([float(row["predicted_l2"]) for row in rows])
                found = tensor([float(row["smallest_known_l2"] or "inf") for row in rows])
                points[name] = (predicted, found)
    return points


def compare(places: Sequence[Path], directory: Path) -> Results:
    """Write one report of finished evaluations into a directory, print it, and return its results.

    Raises:
        UserError: if an evaluation cannot be read or compared, or the directory holds results already.
    """
    read = _read_all(places)
    results = _together(read)
    config = {"evaluations": [str(place) for place in places]}
    alike = groups(results.models)
    with claimed(directory, config):
        figures = plots.comparison(results, alike)
        if points := _points(read):
            figures["first_order"] = plots.predicted_against_found(points)
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.png", dpi=120)
        write_report(directory / "report.html", results, alike, figures, config)
        with write_atomically(directory / "robustness.json") as file:
            file.write(results.model_dump_json(indent=2))
    print_results(results, alike)
    Console().print(f"results: {directory}/report.html, robustness.json, *.png", soft_wrap=True)
    return results


def main() -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m jacobian_robust.compare", description=__doc__)
    parser.add_argument("evaluations", nargs="+", type=Path, help="directories of evaluations, or of runs with one")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the report")
    arguments = parser.parse_args()
    try:
        compare(arguments.evaluations, arguments.out)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""One report of finished evaluations: ``python -m jacobian_robust.compare EVALUATION… --out DIRECTORY``.

Evaluations of single checkpoints can run side by side, on several machines, and be put together afterwards. Models that
differ in their training seed alone are also shown as mean ± standard deviation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

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
    try:
        return found[0].resolve().parent, Results.model_validate_json(found[0].read_bytes())
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
    read = [_read(place) for place in places]
    (_, first), *rest = read
    for (_, other), place in zip(rest, places[1:], strict=True):
        if different := [name for name in ALIKE if getattr(other, name) != getattr(first, name)]:
            raise UserError(f"{place} was evaluated otherwise than {places[0]}: {', '.join(different)} differ")
        if other.models[0].images != first.models[0].images:
            raise UserError(f"{place} has {other.models[0].images} images, {places[0]} {first.models[0].images}")
    names = distinct_names([directory for directory, _ in read])
    models = [
        model.model_copy(update={"name": name if len(results.models) == 1 else f"{name}/{model.name}"})
        for name, (_, results) in zip(names, read, strict=True)
        for model in results.models
    ]
    return first.model_copy(update={"models": models})


def compare(places: Sequence[Path], directory: Path) -> Results:
    """Write one report of finished evaluations into a directory, print it, and return its results.

    Raises:
        UserError: if an evaluation cannot be read or compared, or the directory holds results already.
    """
    results = gather(places)
    config = {"evaluations": [str(place) for place in places]}
    alike = groups(results.models)
    with claimed(directory, config):
        figures = plots.comparison(results, alike)
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

"""Draw anew what ``diagnostics=simplifications`` left in some directories; for none, print the file's JSON schema."""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch import tensor

from jacobian_robust.reporting.figures import suffix_of, write_picture
from jacobian_robust.robustness.prediction import Radii
from jacobian_robust_studies.simplifications.figures import six_simplifications
from jacobian_robust_studies.simplifications.schema import Simplifications, Split

COLUMNS = ("delta", "boundary", "jacobian_frobenius", "jacobian_spectral")


def draw(directory: Path, things: str) -> None:
    """Write the pictures of an evaluation's classifiers from its ``simplifications.json`` and ``.csv``."""
    found = Simplifications.model_validate_json((directory / "simplifications.json").read_bytes())
    with (directory / "simplifications.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for model in found.models:
        of: dict[Split, Radii] = {}
        for split in get_args(Split):
            mine = [row for row in rows if (row["name"], row["split"]) == (model.name, split)]
            if mine:
                center, boundary, *norms = (tensor([float(row[column] or "nan") for row in mine]) for column in COLUMNS)
                of[split] = Radii(center, boundary, norms[0], norms[1])
        figure = six_simplifications(model, of, split=found.split, things=things)
        write_picture(figure, directory / f"simplifications{suffix_of(model.name, len(found.models))}", dpi=80)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, or print the schema."""
    parser = argparse.ArgumentParser(prog="python -m jacobian_robust_studies.simplifications", description=__doc__)
    parser.add_argument("directories", nargs="*", type=Path, help="with simplifications.json and .csv")
    parser.add_argument("--things", default="images", help="what the samples are called (%(default)s)")
    options: Any = parser.parse_args(argv)
    if not options.directories:
        print(json.dumps(Simplifications.model_json_schema(), indent=2))
    for directory in options.directories:
        draw(directory, options.things)


if __name__ == "__main__":
    main()

"""The command: ``python -m jacobian_robust_studies.toy RUN --out DIRECTORY``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jacobian_robust.errors import UserError, ends_in_one_line
from jacobian_robust.files import write_atomically
from jacobian_robust.provenance import git_state, versions
from jacobian_robust.reporting.figures import write_picture
from jacobian_robust_studies.toy import __doc__ as description
from jacobian_robust_studies.toy import animation, balls, plane, simplex
from jacobian_robust_studies.toy.measure import classifiers, scenes
from jacobian_robust_studies.toy.schema import Toy

__all__ = ["main", "toy"]


def toy(place: Path, directory: Path, *, rays: int = 56) -> Toy:
    """Write the figures (PNG, SVG), an animation and ``toy.json`` into a new directory; return what the latter holds.

    Args:
        place: directory of a run with ``twin=true``, or with two exports.
        directory: for the results; it is empty, or does not exist yet.
        rays: geodesics of each ball.

    Raises:
        UserError: if the checkpoints are at fault, or the directory is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} holds something already, which is left as it is: choose another --out")
    models, eps, points, labels = classifiers(place)
    drawn = scenes(models, points, labels, eps, rays)
    results = Toy.model_validate(
        {"eps": eps, "classifiers": [scene.numbers for scene in drawn], "versions": versions(), **git_state()}
    )
    directory.mkdir(parents=True, exist_ok=True)
    figures = {
        "decision_regions": plane.decision_regions(drawn, points, labels, eps),
        "information_balls": plane.information_balls(drawn, eps),
        "heights": plane.heights(drawn),
        "geodesic_balls": balls.geodesic_balls(drawn, eps),
        "circles": simplex.circles(drawn, eps),
        "attacks": simplex.attacks(drawn, eps),
    }
    for name, figure in figures.items():
        write_picture(figure, directory / name)
    animation.write_attack(drawn, eps, directory / "attack.gif")
    with write_atomically(directory / "toy.json") as file:  # last: it says that the rest is whole
        file.write(results.model_dump_json(indent=2))
    Console().print(f"results: {directory}/toy.json, *.png, *.svg, attack.gif", soft_wrap=True)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m jacobian_robust_studies.toy", description=description)
    parser.add_argument("run", type=Path, help="directory of the run, or with two exports (model.safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the figures and toy.json")
    arguments = parser.parse_args(argv)
    with ends_in_one_line():
        toy(arguments.run, arguments.out)


if __name__ == "__main__":
    main()

"""The command: ``python -m jacobian_robust_studies.defences``."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from jacobian_robust.errors import UserError, ends_in_one_line
from jacobian_robust_studies.defences import __doc__ as description
from jacobian_robust_studies.defences.plan import read_plan
from jacobian_robust_studies.defences.run import study

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Make the study as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m jacobian_robust_studies.defences",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", type=Path, default=Path("conf/defences.yaml"), help="%(default)s")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the plan; all by default")
    parser.add_argument("--evaluations", nargs="*", metavar="EVALUATION", help="of the plan; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="trainings and attacks at a time; %(default)s")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="%(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/defences"), help="where to train; %(default)s")
    arguments = parser.parse_args(argv)
    with ends_in_one_line(again="run the same command again to go on"):
        plan = read_plan(arguments.plan)
        names = _known("methods", arguments.methods or plan.methods, plan.methods)
        asked = plan.evaluations if arguments.evaluations is None else arguments.evaluations
        kinds = _known("evaluations", asked, plan.evaluations)
        if arguments.jobs < 1:
            raise UserError(f"--jobs {arguments.jobs}: at least 1")
        study(plan, names, kinds, results=arguments.results, runs=arguments.runs, jobs=arguments.jobs)
    print(f"results: {arguments.results}/defences.md, defences/*.json, *.csv, *.png")


def _known(option: str, asked: Collection[str], known: Collection[str]) -> list[str]:
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"--{option} {unknown[0]}: the plan has {', '.join(known)}")
    return list(dict.fromkeys(asked))


if __name__ == "__main__":
    main()

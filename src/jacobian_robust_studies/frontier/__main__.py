"""The command: ``jacobian-robust study frontier``."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

from jacobian_robust.errors import UserError, ends_in_one_line
from jacobian_robust_studies.documents import Document
from jacobian_robust_studies.frontier import __doc__ as description
from jacobian_robust_studies.frontier.plan import read_plan
from jacobian_robust_studies.frontier.record import Record
from jacobian_robust_studies.frontier.report import missing, write_report
from jacobian_robust_studies.frontier.run import study

__all__ = ["COMMAND", "main"]

COMMAND = "jacobian-robust study frontier"

T = TypeVar("T", str, int)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the study as the command line says."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=Path("conf/frontier.yaml"), help="%(default)s")
    parser.add_argument("--grid", default="quick", help="of the plan; %(default)s")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the grid; all by default")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="EPOCHS", help="of the grid; all by default")
    parser.add_argument("--no-test", action="store_true", help="leave the test images alone")
    parser.add_argument("--missing", action="store_true", help="make nothing: report what is known and what is missing")
    parser.add_argument("--jobs", type=int, default=1, help="trainings and attacks at a time; %(default)s")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="%(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"), help="where to train; %(default)s")
    given = parser.parse_args(argv)
    with ends_in_one_line(again="run the same command again to go on"):
        plan = read_plan(given.plan)
        (grid,) = _known("grid", [given.grid], plan.grids)
        methods = _known("methods", given.methods or plan.grids[grid].methods, plan.grids[grid].methods)
        lengths = _known("lengths", given.lengths or plan.grids[grid].lengths, plan.grids[grid].lengths)
        if given.jobs < 1:
            raise UserError(f"--jobs {given.jobs}: at least 1")
        record = Record(plan, grid, given.results / "frontier")
        again = f"{COMMAND} --grid {grid}"
        summary = Document(given.results / "frontier.md", again, "Accuracy against robustness")
        appendix = Document(given.results / "frontier" / f"{grid}.md", again, f"The grid {grid}, row by row")
        try:
            if not given.missing:
                study(record, methods, lengths, runs=given.runs, jobs=given.jobs, test=not given.no_test)
        finally:  # also what is there when something failed
            write_report(record, summary, appendix)
    print(missing(record))
    print(f"results: {summary.path}, {appendix.path}, {record.directory}/{grid}.csv")


def _known(option: str, asked: Collection[T], known: Collection[T]) -> list[T]:
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"--{option} {unknown[0]}: the plan has {', '.join(map(str, known))}")
    return list(dict.fromkeys(asked))


if __name__ == "__main__":
    main()

"""The files of a grid: a row for each training, and the evaluation of each chosen network on test images."""

import csv
import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock

from pydantic import TypeAdapter, ValidationError

from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.frontier.plan import UNDEFENDED, Cell, Plan, fingerprint

__all__ = ["Record", "Row"]


@dataclass(frozen=True)
class Row:
    """A training and its validation.

    Attributes:
        method: of the plan.
        strength: of the method's option.
        length: in plain epochs.
        seed: of the training.
        plan: fingerprint of the options that made it.
        images: validation images that were attacked; 0 if the training diverged.
        clean: accuracy on them.
        robust: accuracy on them under attack, by ℓ∞ budget, as ``0.1=0.93 0.2=0.5``.
        certified: share of them that is certified, in the same form; empty without a certificate.
        plain_steps: what the training cost, in plain steps, as timed beside them at its end; 0 if that failed.
        sha256: of the weights' file.
        commit: of the code.
        dirty: whether files differed from it.
    """

    method: str
    strength: str
    length: int
    seed: int
    plan: str
    images: int = 0
    clean: float = 0.0
    robust: str = ""
    certified: str = ""
    plain_steps: float = 0.0
    sha256: str = ""
    commit: str = ""
    dirty: bool = False

    @property
    def cell(self) -> Cell:
        """Which training this is."""
        return Cell(self.method, self.strength, self.length, self.seed)

    def robust_at(self, eps: float) -> float:
        """Return the accuracy under attack within a budget; 0 if the training diverged."""
        return _points(self.robust).get(eps, 0.0)

    def certified_at(self, eps: float) -> float | None:
        """Return the certified share at a budget; ``None`` where no certificate was asked for."""
        return _points(self.certified).get(eps)

    @property
    def budgets(self) -> list[float]:
        """The budgets of the attack."""
        return list(_points(self.robust))


def _points(text: str) -> dict[float, float]:
    return {float(eps): float(share) for eps, share in (point.split("=") for point in text.split())}


class Record:
    """What is known of a grid, in ``GRID.csv`` and a JSON file for each evaluation on test images.

    Rows of other options are not reported, and are replaced once they are made anew. The methods raise UserError if a
    file is damaged or not of this study.
    """

    def __init__(self, plan: Plan, grid: str, directory: Path) -> None:
        self.plan, self.grid, self.directory = plan, grid, directory
        self._writing = Lock()

    def rows(self) -> dict[Cell, Row]:
        """Return the trainings of the plan that are known."""
        return {row.cell: row for row in self._read() if row.plan == self._made_by(row.cell)}

    def add(self, cell: Cell, place: Path | None) -> None:
        """Record a training by the directory of its evaluation; by none, that it diverged."""
        row = Row(**asdict(cell), plan=self._made_by(cell) or "")
        if place is not None:
            results = self._results(place / "robustness.json")
            model = results.models[0]
            weights = place.parent / "model.safetensors"  # what is attacked on test images, and has a hash of its own
            row = Row(
                **asdict(cell),
                plan=row.plan,
                images=model.images,
                clean=model.clean_accuracy,
                robust=" ".join(f"{eps:g}={share:g}" for eps, share in model.accuracy("linf")[1:]),
                certified=" ".join(f"{eps:g}={share:g}" for eps, share in model.certified("linf")[1:]),
                plain_steps=round(model.plain_step_equivalents or 0.0, 1),
                sha256=hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else model.sha256 or "",
                commit=results.commit or "",
                dirty=bool(results.dirty),
            )
        with self._writing:
            rows = [known for known in self._read() if known.cell != cell] + [row]
            self.directory.mkdir(parents=True, exist_ok=True)
            with write_atomically(self.directory / f"{self.grid}.csv") as file:
                writer = csv.DictWriter(file, list(asdict(row)))
                writer.writeheader()
                writer.writerows(asdict(known) for known in sorted(rows, key=self._order))

    def chosen(self, method: str, length: int) -> list[Cell]:
        """Return the trainings of a method's best strength, of every seed; none before all of its strengths are known.

        The best is the most robust of those that are accurate enough; if none is, the most accurate.
        """
        known, cells = self.rows(), self.plan.cells(self.grid, method, length)
        twins = self.plan.cells(self.grid, UNDEFENDED, length)
        if any(cell not in known for cell in (*cells, *twins)):
            return []
        least = fmean(known[cell].clean for cell in twins) - self.plan.clean_loss
        groups = [[cell for cell in cells if cell.strength == s] for s in dict.fromkeys(c.strength for c in cells)]

        def rank(group: list[Cell]) -> tuple[bool, float]:
            clean = fmean(known[cell].clean for cell in group)
            enough = clean >= least - 1e-9
            return enough, fmean(known[cell].robust_at(self.plan.eps) for cell in group) if enough else clean

        return [cell for cell in max(groups, key=rank) if known[cell].sha256]

    def tested(self, method: str, length: int) -> Results | None:
        """Return the evaluation of a method's chosen networks on test images; ``None`` without one of their weights."""
        if not (path := self._tested_in(method, length)).is_file():
            return None
        results, rows = self._results(path), self.rows()
        chosen = {rows[cell].sha256 for cell in self.chosen(method, length)}
        return results if {model.sha256 for model in results.models} == chosen else None

    def add_test(self, method: str, length: int, made: Path) -> None:
        """Keep a copy of an evaluation's ``robustness.json``."""
        path = self._tested_in(method, length)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, path)

    def missing(self) -> tuple[list[Cell], list[tuple[str, int]]]:
        """Return the trainings of the plan that are not known, and the methods and lengths without a test."""
        known, grid = self.rows(), self.plan.grids[self.grid]
        pairs = [(name, length) for length in grid.lengths for name in grid.methods]
        cells = [cell for pair in pairs for cell in self.plan.cells(self.grid, *pair) if cell not in known]
        return cells, [pair for pair in pairs if self.tested(*pair) is None]

    def cost(self, cell: Cell) -> float:
        """Return what a training costs, in plain steps: as measured on this grid, where it has one of the method."""
        steps = cell.length * self.plan.steps_of(self.grid, cell.method)
        known = [row for row in self.rows().values() if row.method == cell.method and row.plain_steps]
        ratios = [row.plain_steps / (row.length * self.plan.steps_of(self.grid, row.method)) for row in known]
        return steps * (fmean(ratios) if ratios else self.plan.methods[cell.method].cost)

    def _made_by(self, cell: Cell) -> str | None:
        grid = self.plan.grids[self.grid]
        if cell.method not in grid.methods or cell.length not in grid.lengths:
            return None
        if cell not in self.plan.cells(self.grid, cell.method, cell.length):
            return None
        method = self.plan.methods[cell.method]
        return fingerprint([*self.plan.training_options(self.grid, cell.method, cell.length), str(method.strength)])

    def _order(self, row: Row) -> tuple[int, int, int, float]:
        names = list(self.plan.methods)
        place = names.index(row.method) if row.method in names else len(names)
        return row.length, place, row.seed, float(row.strength or 0)

    def _tested_in(self, method: str, length: int) -> Path:
        made_by = fingerprint(self.plan.grids[self.grid].test)
        return self.directory / self.grid / f"{method}-{length}-{made_by}.json"

    def _results(self, path: Path) -> Results:
        try:
            return Results.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is damaged, or of another version: restore it, or remove it") from error

    def _read(self) -> list[Row]:
        path = self.directory / f"{self.grid}.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        try:
            return TypeAdapter(list[Row]).validate_python(rows)
        except ValidationError as error:
            raise UserError(f"{path} is not what this command writes: move it away") from error

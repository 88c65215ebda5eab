"""The files of the study: its trials and its evaluations, each with a fingerprint of the options that made it."""

import csv
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

from pydantic import ValidationError

from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.defences.plan import Plan, Trial, choice, fingerprint

__all__ = ["Evaluations", "Record"]

Evaluations = Mapping[str, tuple[Results, int]]
"""By method its results, all of one kind of evaluation, and how many seeds' trainings failed."""


class Record:
    """What is known, in ``trials.csv``, ``evaluations.csv`` and a JSON file for each evaluation of each method.

    Rows of another plan are not reported, and are replaced once their method is worked at. The methods raise UserError
    if a file is damaged or not of this study.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan = plan
        self.directory = directory
        self._writing = Lock()

    def trials(self) -> dict[str, list[Trial]]:
        """Return the trials by method, in the order of the plan."""
        found: dict[str, list[Trial]] = {name: [] for name in self.plan.methods}
        for row in self._rows("trials.csv"):
            if (name := row["method"]) in found and row["plan"] == self._tuned_by(name):
                values = float(row["validation_accuracy"]), float(row["objective"])
                found[name].append(Trial(tuple(row["options"].split()), *values))
        return {name: trials for name, trials in found.items() if trials}

    def add_trials(self, name: str, trials: Sequence[Trial]) -> None:
        """Replace the trials of a method."""
        rows = [[name, " ".join(trial.overrides), trial.clean, trial.robust, self._tuned_by(name)] for trial in trials]
        self._replace("trials.csv", ["method", "options", "validation_accuracy", "objective", "plan"], [name], rows)

    def evaluations(self, kind: str) -> Evaluations:
        """Return the results of one of the plan's evaluations, in the order of the plan."""
        trials = self.trials()
        rows = {row["method"]: row for row in self._rows("evaluations.csv") if row["evaluation"] == kind}
        return {
            name: (self._results(name, kind), int(rows[name]["failed_seeds"]))
            for name in self.plan.methods
            if name in rows and self._evaluated_by(name, kind, trials) == rows[name]["plan"]
        }

    def add_evaluation(self, name: str, kind: str, made: Path, failed: int) -> None:
        """Keep a copy of a method's ``robustness.json``, and how many seeds' trainings failed."""
        shutil.copyfile(made, self.directory / f"{name}_{kind}.json")
        row = [name, kind, failed, self._evaluated_by(name, kind, self.trials())]
        self._replace("evaluations.csv", ["method", "evaluation", "failed_seeds", "plan"], [name, kind], [row])

    def _tuned_by(self, name: str) -> str:
        return fingerprint(self.plan.tuning_options(name))

    def _evaluated_by(self, name: str, kind: str, trials: Mapping[str, Sequence[Trial]]) -> str | None:
        if not (chosen := choice(self.plan, name, trials)):
            return None
        evaluation, seeds = self.plan.evaluations[kind], self.plan.seeds_of(name)
        alone = ["first seed alone"] if evaluation.first_seed_alone else []
        training = self.plan.training_options(name, chosen, seeds[:1] if alone else seeds)
        return fingerprint([*training, *evaluation.options, *alone])

    def _results(self, name: str, kind: str) -> Results:
        path = self.directory / f"{name}_{kind}.json"
        try:
            return Results.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{path} is damaged, or of another version: restore it, or remove it and its row"
            ) from error

    def _rows(self, name: str) -> list[dict[str, str]]:
        path = self.directory / name
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if any(None in row or None in row.values() or "plan" not in row for row in rows):
            raise UserError(f"{path} is not what this command writes: move it away")
        return rows

    def _replace(self, name: str, head: list[str], key: list[str], rows: Sequence[Sequence[object]]) -> None:
        """Replace the rows that begin with the key."""
        with self._writing:
            kept = [list(row.values()) for row in self._rows(name)]
            with write_atomically(self.directory / name) as file:
                csv.writer(file).writerows([head, *(row for row in kept if row[: len(key)] != key), *rows])

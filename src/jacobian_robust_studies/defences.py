"""Defences beside one another at equal cost: ``python -m jacobian_robust_studies.defences``, in a clone of the project.

Each method of conf/defences.yaml has the same number of trials, judged on validation images. Its best one is trained
for longer, with several seeds for the finalists, and attacked on test images. A method whose step takes as long as c
plain steps has one c-th of the steps. The tables and the picture go into RESULTS/defences.md; what they are made of
lies beside it. Run again, it makes only what is missing.
"""

import argparse
import csv
import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock
from typing import TypeVar

import torch
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from jacobian_robust.attacks import Norm
from jacobian_robust.cli.sweeps import Job, read_jobs
from jacobian_robust.errors import DIVERGED, UserError, describe, ends_in_one_line
from jacobian_robust.files import write_atomically
from jacobian_robust.reporting import figures as plots
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies import defence_figures
from jacobian_robust_studies.documents import Document, end_entry_points, run_entry_point

__all__ = [
    "Attacked",
    "Concurrency",
    "Method",
    "Plan",
    "Record",
    "Trial",
    "best",
    "choice",
    "protocol",
    "read_plan",
    "study",
    "table",
    "tuned",
]

T = TypeVar("T")

NOISE = 0.3
"""Standard deviation of the Gaussian noise that the table shows, of those that an evaluation looks at."""

Attacked = Mapping[str, tuple[Results, int]]
"""By method its evaluation, made like the others', and how many seeds' trainings failed."""


class Method(BaseModel):
    """A method of the study.

    Attributes:
        options: of ``train.py`` that choose it.
        tune: the values that are tried of further options, all combinations.
        as_tuned: instead, the method whose best trial's values it takes: a variation of it.
        cost: time of a training step, in plain steps.
        budget: how many times as much training it has as the others.
        finalist: whether it is trained with every seed, not with the first alone.
        adversarial: whether it trains on adversarial examples.
    """

    model_config = ConfigDict(extra="forbid")

    options: list[str]
    tune: dict[str, list[float | int | str]] = Field(default={})
    as_tuned: str | None = None
    cost: PositiveFloat
    budget: PositiveFloat = 1.0
    finalist: bool = False
    adversarial: bool = False


class Evaluation(BaseModel):
    """An evaluation of what is reported.

    Attributes:
        options: of ``evaluate.py``.
        first_seed_alone: whether the models of the other seeds are left out.
    """

    model_config = ConfigDict(extra="forbid")

    options: list[str]
    first_seed_alone: bool = False


class Plan(BaseModel):
    """The study, as conf/defences.yaml states it."""

    model_config = ConfigDict(extra="forbid")

    options: list[str]
    batches: PositiveInt
    trial_epochs: PositiveInt
    epochs: PositiveInt
    seeds: list[int] = Field(min_length=1)
    trials: PositiveInt
    tuning: list[str]
    objective: str
    clean: float = Field(ge=0, le=1)
    evaluations: dict[str, Evaluation] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _fair(self) -> "Plan":
        for name, method in self.methods.items():
            if method.as_tuned is not None:
                if method.tune or not (base := self.methods.get(method.as_tuned)) or base.as_tuned:
                    raise ValueError(f"methods.{name}.as_tuned: names a method that is tuned, and goes without tune")
            elif (trials := prod(map(len, method.tune.values()))) != self.trials:
                raise ValueError(f"methods.{name}.tune: {trials} combinations, where every method has {self.trials}")
        return self


def read_plan(path: Path) -> Plan:
    """Return the plan of a YAML file.

    Raises:
        UserError: if it cannot be read as one.
    """
    try:
        stated = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # of the file system, of YAML and of OmegaConf
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return Plan.model_validate(stated)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from error


@dataclass(frozen=True)
class Trial:
    """A trial of a method.

    Attributes:
        overrides: the values of the tuned options, as ``option=value``.
        clean: accuracy on the validation images; nan if the training failed.
        robust: the objective; nan likewise.
    """

    overrides: tuple[str, ...]
    clean: float
    robust: float


def best(trials: Sequence[Trial], clean: float) -> Trial:
    """Return the most robust of the trials that are accurate enough; if none is, the most accurate.

    Raises:
        UserError: if all of them failed.
    """
    finished = [trial for trial in trials if trial.clean == trial.clean]
    if not finished:
        raise UserError("all trials failed: their job.json says why")
    accurate = [trial for trial in finished if trial.clean >= clean]
    return max(accurate, key=lambda trial: trial.robust) if accurate else max(finished, key=lambda t: t.clean)


class Record:
    """What is known, in ``trials.csv``, ``evaluations.csv`` and a JSON file for each evaluation of each method.

    Each row carries a fingerprint of the options that led to it: what another plan led to is not reported, and gives
    way when its method is worked at.

    Args:
        plan: the study.
        directory: of the files.

    Raises:
        UserError: from its methods, if a file there is damaged or of something else.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan = plan
        self.directory = directory

    def trials(self) -> dict[str, list[Trial]]:
        """Return the trials by method, in the order of the plan."""
        found: dict[str, list[Trial]] = {}
        for row in self._rows("trials.csv"):
            if self._tuned_by(row["method"]) == row["plan"]:
                values = float(row["validation_accuracy"]), float(row["objective"])
                found.setdefault(row["method"], []).append(Trial(tuple(row["options"].split()), *values))
        return {name: found[name] for name in self.plan.methods if name in found}

    def add_trials(self, name: str, trials: Sequence[Trial]) -> None:
        """Put the trials of a method in the place of those that there were."""
        rows = [[name, " ".join(trial.overrides), trial.clean, trial.robust, self._tuned_by(name)] for trial in trials]
        self._replace("trials.csv", ["method", "options", "validation_accuracy", "objective", "plan"], [name], rows)

    def evaluations(self, kind: str) -> Attacked:
        """Return what an evaluation found, in the order of the plan."""
        trials = self.trials()
        found = {}
        for row in self._rows("evaluations.csv"):
            name = row["method"]
            if row["evaluation"] == kind and self._evaluated_by(name, kind, trials) == row["plan"]:
                found[name] = self._results(name, kind), int(row["failed_seeds"])
        return {name: found[name] for name in self.plan.methods if name in found}

    def add_evaluation(self, name: str, kind: str, made: Path, failed: int) -> None:
        """Keep a copy of an evaluation.

        Args:
            name: of the method.
            kind: which of the plan's evaluations.
            made: its ``robustness.json``.
            failed: how many seeds' trainings failed.
        """
        shutil.copyfile(made, self.directory / f"{name}_{kind}.json")
        row = [name, kind, failed, self._evaluated_by(name, kind, self.trials())]
        self._replace("evaluations.csv", ["method", "evaluation", "failed_seeds", "plan"], [name, kind], [row])

    def _tuned_by(self, name: str) -> str | None:
        method = self.plan.methods.get(name)
        return _fingerprint(_tuning(self.plan, method)) if method else None

    def _evaluated_by(self, name: str, kind: str, trials: Mapping[str, Sequence[Trial]]) -> str | None:
        method = self.plan.methods.get(name)
        if method is None or not (chosen := choice(self.plan, name, trials)):
            return None
        evaluation, seeds = self.plan.evaluations[kind], _seeds(self.plan, method)
        alone = ["first seed alone"] if evaluation.first_seed_alone else []
        training = _training(self.plan, method, chosen, seeds[:1] if alone else seeds)
        return _fingerprint([*training, *evaluation.options, *alone])

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
        """Write the file anew, read in this moment: another process may work at other methods."""
        kept = [list(row.values()) for row in self._rows(name)]
        with write_atomically(self.directory / name) as file:
            csv.writer(file).writerows([head, *(row for row in kept if row[: len(key)] != key), *rows])


def choice(plan: Plan, name: str, trials: Mapping[str, Sequence[Trial]]) -> Trial | None:
    """Return the trial whose values a method is trained with, its own best or another's; None if there is none."""
    found = trials.get(plan.methods[name].as_tuned or name, [])
    return best(found, plan.clean) if any(trial.clean == trial.clean for trial in found) else None


def study(
    plan: Plan, names: Sequence[str], kinds: Sequence[str], *, results: Path, runs: Path, jobs: int = 1
) -> dict[str, list[Trial]]:
    """Make what is missing of the study, and write it up.

    Args:
        plan: the study.
        names: the methods that are worked at; what is known of the others is reported too.
        kinds: the evaluations that are made; likewise.
        results: directory of ``defences.md``; what it is made of goes into ``defences`` beside it.
        runs: directory for new runs. What was made by another plan is left there as it is.
        jobs: how many trainings and attacks go on at a time.

    Returns:
        The trials of each method that has some.

    Raises:
        UserError: if a command fails, or a file there cannot be read.
    """
    document = Document(results / "defences.md", "python -m jacobian_robust_studies.defences", "Defences at equal cost")
    record = Record(plan, results / "defences")
    record.directory.mkdir(parents=True, exist_ok=True)
    concurrent = Concurrency.of(jobs, len(names))
    writing = Lock()

    def tune(name: str) -> None:
        method = plan.methods[name]
        tried = _sweep(_tuning(plan, method), runs / "trials" / name, "${hydra:job.num}", plan.trials, concurrent)
        with writing:
            record.add_trials(name, [_trial(plan, method, job) for job in tried.values()])

    def train(name: str) -> list[Path]:
        if not (chosen := choice(plan, name, record.trials())):
            return []
        method = plan.methods[name]
        seeds = _seeds(plan, method)
        options = _training(plan, method, chosen, seeds)
        ended = _sweep(options, runs / "trained" / name, f"{name}-${{seed}}", len(seeds), concurrent)
        return [place / "model.safetensors" for place, job in ended.items() if job.status == "finished"]

    def attack(kind: str, name: str) -> None:
        evaluation, models = plan.evaluations[kind], trained[name]
        attacked = models[:1] if evaluation.first_seed_alone else models
        made = _attack(attacked, runs / "attacked" / f"{name}_{kind}", evaluation.options, concurrent)
        with writing:
            record.add_evaluation(name, kind, made, len(_seeds(plan, plan.methods[name])) - len(models))

    for name in names:
        if (of := plan.methods[name].as_tuned) and of not in {*names, *record.trials()}:
            raise UserError(f"{name}: takes the values of {of}, which has no trials yet: name that too")
    try:
        concurrent.map(tune, [name for name in names if plan.methods[name].as_tuned is None])
        trained = dict(zip(names, concurrent.map(train, names), strict=True))
        for kind in kinds:
            concurrent.map(partial(attack, kind), [name for name in names if trained[name]])
    finally:  # what there is, also if it is not all
        _report(record, document)
    return record.trials()


@dataclass(frozen=True)
class Concurrency:
    """How the commands of a study share the machine.

    Attributes:
        methods: how many are worked at side by side.
        jobs: how many trainings and attacks of each.
    """

    methods: int
    jobs: int

    @classmethod
    def of(cls, jobs: int, names: int) -> "Concurrency":
        """Return one job of as many methods as possible; several of each, where the methods are fewer."""
        methods = max(1, min(jobs, names))
        return cls(methods, max(1, jobs // methods))

    def map(self, work: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """Return what the work gives for each method. Once it fails for one, no more begins, and what was begun ends.

        Raises:
            Exception: that failure.
        """
        with ThreadPoolExecutor(self.methods) as pool:
            try:
                futures = [pool.submit(work, name) for name in names]
                for future in as_completed(futures):
                    future.result()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    end_entry_points()
                raise
        return [future.result() for future in futures]

    def threads(self, processes: int) -> int:
        """Return how many threads of the processors each of so many processes of each method has."""
        return max(1, torch.get_num_threads() // (self.methods * processes))


def _seeds(plan: Plan, method: Method) -> list[int]:
    return plan.seeds if method.finalist else plan.seeds[:1]


def _steps(plan: Plan, method: Method) -> int:
    """Return the steps of an epoch."""
    return round(plan.batches / method.cost)


def _of_all(plan: Plan, method: Method, epochs: int) -> list[str]:
    length = [f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={_steps(plan, method)}"]
    return [*plan.options, *method.options, *length, "logger=csv"]


def _tuning(plan: Plan, method: Method) -> list[str]:
    grid = [f"{option}={','.join(map(str, values))}" for option, values in method.tune.items()]
    checks = ["sanity_images=0", "geometry_images=0", "reliability=false"]
    judged = ["evaluate=true", "split=validation", *checks, *plan.tuning]
    return [*_of_all(plan, method, plan.trial_epochs), *judged, *grid, "seed=100"]


def _training(plan: Plan, method: Method, chosen: Trial, seeds: Sequence[int]) -> list[str]:
    epochs = round(method.budget * plan.epochs)
    return [*_of_all(plan, method, epochs), *chosen.overrides, f"seed={','.join(map(str, seeds))}"]


def _fingerprint(options: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(options).encode()).hexdigest()[:8]


def _of(place: Path, options: Sequence[str]) -> Path:
    """Return a directory beside the place that is of these options alone."""
    return place.with_name(f"{place.name}-{_fingerprint(options)}")


def _sweep(
    options: list[str], place: Path, subdirectory: str, expected: int, concurrent: Concurrency
) -> dict[Path, Job]:
    """Train what is missing, and return what became of all by their directories.

    A training that diverges has failed: it is not tried again.

    Raises:
        UserError: if one failed for another reason, which is not the method's.
    """
    directory = _of(place, options)

    def ended() -> dict[Path, Job]:
        found = {directory / name: job for name, job in read_jobs(directory).items()}
        return {
            name: job
            for name, job in found.items()
            if job.status == "finished" or (job.status == "failed" and str(job.error).startswith(DIVERGED))
        }

    if len(ended()) < expected:
        where = [f"hydra.sweep.dir={directory}", f"hydra.sweep.subdir={subdirectory}", "resume=true"]
        if concurrent.methods * concurrent.jobs > 1:  # each job has a log of its own
            where += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={concurrent.jobs}"]
        if torch.cuda.is_available():
            where += ["cuda_graph=true"]  # the same steps, sooner
        run_entry_point("train.py", "-m", *options, *where, check=False, threads=concurrent.threads(concurrent.jobs))
    if len(ended()) < expected:
        errors = [f"{name}: {job.error}" for name, job in read_jobs(directory).items() if job.status == "failed"]
        found = errors[0] if errors else "not all trainings ended"
        raise UserError(f"{directory}: {found}; run this again to go on")
    return ended()


def _trial(plan: Plan, method: Method, job: Job) -> Trial:
    nan = float("nan")
    return Trial(
        tuple(option for option in job.overrides if option.partition("=")[0] in method.tune),
        job.metrics.get("validation_accuracy", nan),
        job.metrics.get(plan.objective, nan),
    )


def _attack(models: Sequence[Path], place: Path, options: Sequence[str], concurrent: Concurrency) -> Path:
    """Attack models, if that was not done, and return the file with the results."""
    asked = [f"checkpoint=[{','.join(map(str, models))}]", *options]
    directory = _of(place, asked)
    if not (directory / "robustness.json").is_file():
        where = [f"processes={concurrent.jobs}", "logger=csv", f"hydra.run.dir={directory}", "resume=true"]
        log = directory.with_name(f"{directory.name}.log") if concurrent.methods > 1 else None
        directory.parent.mkdir(parents=True, exist_ok=True)
        run_entry_point(
            "evaluate.py", *asked, *where, threads=concurrent.threads(1), log=log
        )  # which its processes share
    return directory / "robustness.json"


def _report(record: Record, document: Document) -> None:
    """Write up all that is known of the methods."""
    plan, trials = record.plan, record.trials()
    points = {
        name: {" ".join(trial.overrides): (trial.clean, trial.robust) for trial in found}
        for name, found in trials.items()
    }
    attacked = {kind: record.evaluations(kind) for kind in plan.evaluations}
    text = f"{protocol(plan)}\n{tuned(plan, trials, set().union(*attacked.values()))}"
    if any(trial.clean == trial.clean for found in trials.values() for trial in found):
        plots.save({"trade_off": defence_figures.trials_by_method(points, robust=plan.objective)}, record.directory)
        text += "\n![Clean against robust accuracy of all trials](defences/trade_off.png)\n"
    for kind, found in attacked.items():
        if found:
            text += f"\n{table(plan, found)}"
            if len(_budgets(found)) > 1:
                plots.save({kind: defence_figures.methods_under_attack(_standing(plan, found))}, record.directory)
                text += f"\n![Accuracy of all methods, clean and within each budget](defences/{kind}.png)\n"
    document.write(text)


def _budgets(attacked: Attacked) -> list[tuple[Norm, float]]:
    of = next(iter(attacked.values()))[0].models[0]
    return [(threat.norm, budget.eps) for threat in of.threats for budget in threat.budgets]


def _standing(plan: Plan, attacked: Attacked) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean accuracy over the seeds of each method by what it met, apart by what they train on."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    budgets = _budgets(attacked)
    for name, (results, _) in attacked.items():
        title = f"{'with' if plan.methods[name].adversarial else 'without'} adversarial examples in training"
        clean = fmean(model.clean_accuracy for model in results.models)
        within = {
            f"{plots.NORMS[norm]} {eps:g}": fmean(dict(model.accuracy(norm))[eps] for model in results.models)
            for norm, eps in budgets
        }
        panels.setdefault(title, {})[name] = {"clean": clean, **within}
    return panels


def protocol(plan: Plan) -> str:
    """Return, as Markdown, what all methods have in common, and how they are chosen."""
    common = f"`{' '.join(plan.options)}`"
    seeds = ", ".join(map(str, plan.seeds))
    return "\n".join(
        [
            f"All are trained with {common}. Cost is the time of a training step in plain steps, and the training of "
            f"all costs the same, as much as {plan.epochs} epochs of {plan.batches} plain steps: a method of cost c "
            "has one c-th of the steps. The exceptions say so.",
            "",
            f"**Choice.** Each method has {plan.trials} trials, of {plan.trial_epochs} such epochs and seed 100, on "
            f"held-out training images: *clean* is the accuracy on all of these, *robust* `{plan.objective}` of "
            f"`{' '.join(plan.tuning)}`. The most robust of those that are right on {plan.clean:.0%} is trained anew, "
            f"for longer; if none is so accurate, the most accurate. Finalists have the seeds {seeds}, the others the "
            "first alone.",
            "",
        ]
    )


def tuned(plan: Plan, trials: Mapping[str, Sequence[Trial]], made: Collection[str]) -> str:
    """Return, as Markdown, all trials of each method, the chosen one in bold type, and of what the variations are.

    Args:
        plan: the study.
        trials: by method.
        made: the methods that were trained; a variation that was not is left out.
    """
    lines = ["| | cost | steps | trials: clean / robust, % |", "| --- | --- | --- | --- |"]
    for name, method in plan.methods.items():
        chosen = choice(plan, name, trials)
        if method.as_tuned is not None:
            cells = [f"as {method.as_tuned}: `{' '.join(chosen.overrides)}`"] if chosen and name in made else []
        else:
            cells = [_tried(trial, chosen=trial is chosen) for trial in trials.get(name, [])]
            if chosen and chosen.clean < plan.clean:
                cells[-1] += f" (chosen by accuracy: none is right on {plan.clean:.0%})"
        if cells:
            steps = round(method.budget * plan.epochs) * _steps(plan, method)
            lines.append(f"| {name} | {method.cost:.2f} | {steps} | {' · '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _tried(trial: Trial, *, chosen: bool) -> str:
    what = f"{100 * trial.clean:.1f} / {100 * trial.robust:.1f}" if trial.clean == trial.clean else "failed"
    return f"`{' '.join(trial.overrides)}` " + (f"**{what}**" if chosen else what)


def table(plan: Plan, attacked: Attacked) -> str:
    """Return an evaluation of all methods as Markdown: percentages, mean and standard deviation over the seeds.

    Args:
        plan: the study.
        attacked: the evaluations of those that are done.
    """
    of = next(iter(attacked.values()))[0]
    images = of.models[0].images
    budgets = _budgets(attacked)
    beyond = of.models[0].calibration is not None
    judged = any(model.verdict for results, _ in attacked.values() for model in results.models)
    head = ["%", "adversarial examples", "seeds", "clean", *(f"{plots.NORMS[norm]} {eps:g}" for norm, eps in budgets)]
    head += [f"noise σ {NOISE:g}", "ECE"] if beyond else []
    head += ["sanity"] if judged else []
    lines = [
        f"Of the first {images} test images, those that stand under all of {', '.join(of.attacks)} (a share of so many "
        f"has a standard error of up to {50 / images**0.5:.1f} points):",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
    ]
    for name, (results, failed) in attacked.items():
        rows = []
        for model in results.models:
            stood = [dict(model.accuracy(norm))[eps] for norm, eps in budgets]
            noisy = [point.accuracy for point in model.noise if point.sigma == NOISE]
            rows.append([model.clean_accuracy, *stood, *noisy, *([model.calibration.ece] if model.calibration else [])])
        cells = [
            "–" if None in shares else _spread([100 * share for share in shares]) for shares in zip(*rows, strict=True)
        ]
        verdicts = dict.fromkeys(model.verdict or "–" for model in results.models)
        method = plan.methods[name]
        label = name if method.budget == 1 else f"{name} ({method.budget:g} times the cost)"
        seeds = str(len(rows)) if not failed else f"{len(rows)}, {failed} failed"
        cells = [label, "yes" if method.adversarial else "no", seeds, *cells]
        lines.append(f"| {' | '.join([*cells, *([', '.join(verdicts)] if judged else [])])} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the study as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m jacobian_robust_studies.defences",
        description=__doc__,
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
        names = list(dict.fromkeys(arguments.methods or plan.methods))
        if unknown := [name for name in names if name not in plan.methods]:
            raise UserError(f"--methods {unknown[0]}: the plan has {', '.join(plan.methods)}")
        kinds = list(plan.evaluations) if arguments.evaluations is None else arguments.evaluations
        if unknown := [kind for kind in kinds if kind not in plan.evaluations]:
            raise UserError(f"--evaluations {unknown[0]}: the plan has {', '.join(plan.evaluations)}")
        if arguments.jobs < 1:
            raise UserError(f"--jobs {arguments.jobs}: at least 1")
        study(plan, names, kinds, results=arguments.results, runs=arguments.runs, jobs=arguments.jobs)
    print(f"results: {arguments.results}/defences.md, defences/*.json, *.csv, *.png")


if __name__ == "__main__":
    main()

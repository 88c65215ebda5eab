"""Defences beside one another at equal cost: ``python -m jacobian_robust.defences``, in a clone of the project.

Each method of conf/defences.yaml has the same number of trials, judged on validation images. Its best one is trained
for longer, with several seeds for the finalists, and attacked on test images. A method whose step takes as long as c
plain steps has one c-th of the steps. The tables and the picture go into RESULTS/defences.md; what they are made of
lies beside it. Run again, it makes only what is missing.
"""

import argparse
import csv
import hashlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import fmean, stdev

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from jacobian_robust import plots
from jacobian_robust.config import describe
from jacobian_robust.documents import Document, run_door
from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically
from jacobian_robust.results import Results
from jacobian_robust.sweeps import Job, read_jobs

__all__ = ["Method", "Plan", "Trial", "best", "read_plan", "study", "table"]


NOISE = 0.3
"""Standard deviation of the Gaussian noise that the table shows, of those that an evaluation looks at."""


class Method(BaseModel):
    """A method of the study.

    Attributes:
        options: of ``train.py`` that choose it.
        tune: the values that are tried of further options, all combinations.
        cost: time of a training step, in plain steps.
        finalist: whether it is trained with every seed, not with the first alone.
        adversarial: whether it trains on adversarial examples.
    """

    model_config = ConfigDict(extra="forbid")

    options: list[str]
    tune: dict[str, list[float | int | str]] = Field(min_length=1)
    cost: PositiveFloat
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
            if (trials := prod(map(len, method.tune.values()))) != self.trials:
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


def study(plan: Plan, names: Sequence[str], *, results: Path, runs: Path, jobs: int = 1) -> dict[str, list[Trial]]:
    """Make what is missing of the study, and write it up.

    Args:
        plan: the study.
        names: the methods that are worked at; what is known of the others is reported too.
        results: directory of ``defences.md``; what it is made of goes into ``defences`` beside it.
        runs: directory for new runs. What was made by another plan is left there as it is.
        jobs: how many trainings and attacks go on at a time.

    Returns:
        The trials of each method that has some.

    Raises:
        UserError: if a command fails, or a file there cannot be read.
    """
    document = Document(results / "defences.md", "python -m jacobian_robust.defences", "Defences at equal cost")
    known = _read_trials(results / "defences" / "trials.csv")
    (results / "defences").mkdir(parents=True, exist_ok=True)
    models: dict[str, list[Path]] = {}
    for name in names:
        method = plan.methods[name]
        tried = _sweep(_tuning(plan, method), runs / "trials" / name, "${hydra:job.num}", plan.trials, jobs)
        known[name] = [_trial(plan, method, job) for job in tried.values()]
        _report(plan, known, document, results / "defences")
    for name in names:
        seeds = plan.seeds if plan.methods[name].finalist else plan.seeds[:1]
        options = _training(plan, plan.methods[name], best(known[name], plan.clean), seeds)
        trained = _sweep(options, runs / "trained" / name, f"{name}-${{seed}}", len(seeds), jobs)
        models[name] = [place / "model.safetensors" for place, job in trained.items() if job.status == "finished"]
        if not models[name]:
            raise UserError(f"{name}: no training finished: {next(iter(trained.values())).error}")
    for kind, evaluation in plan.evaluations.items():
        for name in names:
            attacked = models[name][:1] if evaluation.first_seed_alone else models[name]
            made = _attack(attacked, runs / "attacked" / f"{name}_{kind}", evaluation.options, jobs)
            shutil.copyfile(made, results / "defences" / f"{name}_{kind}.json")
            _report(plan, known, document, results / "defences")
    return known


def _of_all(plan: Plan, method: Method, epochs: int) -> list[str]:
    batches = round(plan.batches / method.cost)
    length = [f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={batches}"]
    return [*plan.options, *method.options, *length, "logger=csv"]


def _tuning(plan: Plan, method: Method) -> list[str]:
    grid = [f"{option}={','.join(map(str, values))}" for option, values in method.tune.items()]
    checks = ["sanity_images=0", "geometry_images=0", "reliability=false"]
    judged = ["evaluate=true", "split=validation", *checks, *plan.tuning]
    return [*_of_all(plan, method, plan.trial_epochs), *judged, *grid, "seed=100"]


def _training(plan: Plan, method: Method, chosen: Trial, seeds: Sequence[int]) -> list[str]:
    return [*_of_all(plan, method, plan.epochs), *chosen.overrides, f"seed={','.join(map(str, seeds))}"]


def _of(place: Path, options: Sequence[str]) -> Path:
    """Return a directory beside the place that is of these options alone."""
    return place.with_name(f"{place.name}-{hashlib.sha256(' '.join(options).encode()).hexdigest()[:8]}")


def _sweep(options: list[str], place: Path, subdirectory: str, expected: int, jobs: int) -> dict[Path, Job]:
    """Train what is missing, and return what became of all by their directories.

    A training that fails, by its loss perhaps, has failed: it is not tried again.
    """
    directory = _of(place, options)

    def ended() -> dict[Path, Job]:
        found = {directory / name: job for name, job in read_jobs(directory).items()}
        return {name: job for name, job in found.items() if job.status in ("finished", "failed")}

    if len(ended()) < expected:
        side_by_side = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"] if jobs > 1 else []
        where = [f"hydra.sweep.dir={directory}", f"hydra.sweep.subdir={subdirectory}", "resume=true"]
        run_door("train.py", "-m", *options, *side_by_side, *where, check=False)
    if len(ended()) < expected:
        raise UserError(f"{directory}: not all trainings ended; run this again to go on")
    return ended()


def _trial(plan: Plan, method: Method, job: Job) -> Trial:
    nan = float("nan")
    return Trial(
        tuple(option for option in job.overrides if option.partition("=")[0] in method.tune),
        job.metrics.get("validation_accuracy", nan),
        job.metrics.get(plan.objective, nan),
    )


def _attack(models: Sequence[Path], place: Path, options: Sequence[str], processes: int) -> Path:
    """Attack models, if that was not done, and return the file with the results."""
    asked = [f"checkpoint=[{','.join(map(str, models))}]", *options]
    directory = _of(place, asked)
    if not (directory / "robustness.json").is_file():
        where = [f"hydra.run.dir={directory}", "resume=true"]
        run_door("evaluate.py", *asked, f"processes={processes}", "logger=csv", *where)
    return directory / "robustness.json"


def _read_trials(path: Path) -> dict[str, list[Trial]]:
    """Return the trials by method, in the order of the file; none if it is not there."""
    trials: dict[str, list[Trial]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = float(row["validation_accuracy"]), float(row["objective"])
                trials.setdefault(row["method"], []).append(Trial(tuple(row["options"].split()), *values))
    return trials


def _report(plan: Plan, trials: Mapping[str, Sequence[Trial]], document: Document, directory: Path) -> None:
    """Write up all that is known of the methods."""
    trials = {name: trials[name] for name in plan.methods if name in trials}
    with write_atomically(directory / "trials.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "options", "validation_accuracy", "objective"])
        for name, found in trials.items():
            writer.writerows([name, " ".join(trial.overrides), trial.clean, trial.robust] for trial in found)
    figure = plots.fronts({name: [(trial.clean, trial.robust) for trial in found] for name, found in trials.items()})
    figure.savefig(directory / "trade_off.png", dpi=120)
    text = f"{_chosen(plan, trials)}\n![Clean against robust accuracy of all trials](defences/trade_off.png)\n"
    for evaluation in plan.evaluations:
        files = {name: directory / f"{name}_{evaluation}.json" for name in trials}
        read = {name: Results.model_validate_json(file.read_bytes()) for name, file in files.items() if file.is_file()}
        text += f"\n{table(plan.methods, read)}" if read else ""
    document.write(text)


def _chosen(plan: Plan, trials: Mapping[str, Sequence[Trial]]) -> str:
    """Return, as Markdown, the best trial of each method."""
    lines = [
        f"The best of {plan.trials} trials each, {plan.trial_epochs} epochs' cost, on validation images.",
        "",
        "| | chosen | cost of a step | clean | robust |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in trials.items():
        chosen = best(found, plan.clean)
        cells = [name, f"`{' '.join(chosen.overrides)}`", f"{plan.methods[name].cost:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {chosen.clean:.1%} | {chosen.robust:.1%} |")
    return "\n".join(lines) + "\n"


def table(methods: Mapping[str, Method], attacked: Mapping[str, Results]) -> str:
    """Return an evaluation of all methods as Markdown: percentages, mean and standard deviation over the seeds.

    Args:
        methods: of the plan.
        attacked: the evaluations of those that are done, made alike.
    """
    of = next(iter(attacked.values()))
    budgets = [(threat.norm, budget.eps) for threat in of.models[0].threats for budget in threat.budgets]
    beyond = of.models[0].calibration is not None
    head = ["%", "adversarial examples", "seeds", "clean", *(f"{plots.NORMS[norm]} {eps:g}" for norm, eps in budgets)]
    head += [f"noise σ {NOISE:g}", "ECE"] if beyond else []
    lines = [
        f"Of the first {of.models[0].images} test images, those that stand under all of {', '.join(of.attacks)}:",
        "",
        f"| {' | '.join([*head, 'sanity'])} |",
        "|" + " --- |" * (len(head) + 1),
    ]
    for name, results in attacked.items():
        rows = []
        for model in results.models:
            stood = [dict(model.accuracy(norm))[eps] for norm, eps in budgets]
            noisy = [point.accuracy for point in model.noise if point.sigma == NOISE]
            rows.append([model.clean_accuracy, *stood, *noisy, *([model.calibration.ece] if model.calibration else [])])
        cells = [_spread([100 * share for share in shares]) for shares in zip(*rows, strict=True)]
        verdicts = dict.fromkeys(model.verdict or "–" for model in results.models)
        adversarial = "yes" if methods[name].adversarial else "no"
        lines.append(f"| {' | '.join([name, adversarial, str(len(rows)), *cells, ', '.join(verdicts)])} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Make the study as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m jacobian_robust.defences",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", type=Path, default=Path("conf/defences.yaml"), help="%(default)s")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the plan; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="trainings and attacks at a time; %(default)s")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="%(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/defences"), help="where to train; %(default)s")
    arguments = parser.parse_args()
    try:
        plan = read_plan(arguments.plan)
        names = arguments.methods or list(plan.methods)
        if unknown := [name for name in names if name not in plan.methods]:
            raise UserError(f"--methods {unknown[0]}: the plan has {', '.join(plan.methods)}")
        study(plan, names, results=arguments.results, runs=arguments.runs, jobs=arguments.jobs)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to go on")
    print(f"results: {arguments.results}/defences.md, defences/*.json, trials.csv, trade_off.png")


if __name__ == "__main__":
    main()

"""The study itself: what is missing is tuned, trained and attacked by the project's own commands."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from jacobian_robust.cli.sweeps import Job, read_jobs
from jacobian_robust.errors import DIVERGED, UserError
from jacobian_robust_studies.defences.plan import Plan, Trial, choice, fingerprint
from jacobian_robust_studies.defences.record import Record
from jacobian_robust_studies.defences.report import write_report
from jacobian_robust_studies.documents import Document, run_entry_point

__all__ = ["Concurrency", "study"]

T = TypeVar("T")


@dataclass(frozen=True)
class Concurrency:
    """How the commands of a study share the machine."""

    methods: int  # worked at side by side
    jobs: int  # trainings and attacks of each at a time

    @classmethod
    def of(cls, jobs: int, names: int) -> "Concurrency":
        """Return one job of as many methods as possible; several of each, where the methods are fewer."""
        methods = max(1, min(jobs, names))
        return cls(methods, max(1, jobs // methods))

    def map(self, work: Callable[[str], T], names: Sequence[str]) -> list[T]:
        """Return the work's result for each method. After a failure or an interruption no more begins.

        Raises:
            Exception: the first failure, once all that was begun has ended.
        """
        with ThreadPoolExecutor(self.methods) as pool:
            futures = [pool.submit(work, name) for name in names]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]

    def threads(self, processes: int) -> int:
        """Return how many threads each of so many processes of each method has."""
        return max(1, torch.get_num_threads() // (self.methods * processes))


def study(
    plan: Plan, names: Sequence[str], kinds: Sequence[str], *, results: Path, runs: Path, jobs: int = 1
) -> dict[str, list[Trial]]:
    """Make what is missing of the study, and write its report; return the trials of each method that has some.

    Args:
        plan: the study.
        names: the methods to work at.
        kinds: the evaluations to make. What is known of other methods and evaluations is reported too.
        results: directory of ``defences.md``; its files go into ``defences`` beside it.
        runs: directory for new runs. Runs of another plan stay there as they are.
        jobs: how many trainings and attacks run at a time.

    Raises:
        UserError: if a command fails, or a file there cannot be read.
    """
    document = Document(results / "defences.md", "python -m jacobian_robust_studies.defences", "Defences at equal cost")
    record = Record(plan, results / "defences")
    record.directory.mkdir(parents=True, exist_ok=True)
    concurrent = Concurrency.of(jobs, len(names))
    for name in names:
        if (of := plan.methods[name].as_tuned) and of not in {*names, *record.trials()}:
            raise UserError(f"{name}: takes the values of {of}, which has no trials yet: name that too")

    def tune(name: str) -> None:
        options, place = plan.tuning_options(name), runs / "trials" / name
        tried = _sweep(options, place, "${hydra:job.num}", plan.trials, concurrent)
        record.add_trials(name, [_trial(plan, name, job) for job in tried.values()])

    def train(name: str) -> list[Path]:
        if not (chosen := choice(plan, name, record.trials())):
            return []
        seeds = plan.seeds_of(name)
        options, place = plan.training_options(name, chosen, seeds), runs / "trained" / name
        ended = _sweep(options, place, f"{name}-${{seed}}", len(seeds), concurrent)
        return [place / "model.safetensors" for place, job in ended.items() if job.status == "finished"]

    def attack(kind: str, name: str) -> None:
        evaluation, models = plan.evaluations[kind], trained[name]
        attacked = models[:1] if evaluation.first_seed_alone else models
        made = _attack(attacked, runs / "attacked" / f"{name}_{kind}", evaluation.options, concurrent)
        record.add_evaluation(name, kind, made, len(plan.seeds_of(name)) - len(models))

    try:
        concurrent.map(tune, [name for name in names if plan.methods[name].as_tuned is None])
        trained = dict(zip(names, concurrent.map(train, names), strict=True))
        for kind in kinds:
            concurrent.map(partial(attack, kind), [name for name in names if trained[name]])
    finally:  # also what is there when something failed
        write_report(record, document)
    return record.trials()


def _beside(place: Path, options: Sequence[str]) -> Path:
    """Return a directory of these options alone."""
    return place.with_name(f"{place.name}-{fingerprint(options)}")


def _sweep(
    options: list[str], place: Path, subdirectory: str, expected: int, concurrent: Concurrency
) -> dict[Path, Job]:
    """Train what is missing, and return all jobs by their directories. A training that diverged is not repeated.

    Raises:
        UserError: if a training failed for a reason other than the method's.
    """
    directory = _beside(place, options)

    def ended() -> dict[Path, Job]:
        return {
            directory / name: job
            for name, job in read_jobs(directory).items()
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


def _trial(plan: Plan, name: str, job: Job) -> Trial:
    tuned = tuple(option for option in job.overrides if option.partition("=")[0] in plan.methods[name].tune)
    clean, robust = (job.metrics.get(metric, float("nan")) for metric in ("validation_accuracy", plan.objective))
    return Trial(tuned, clean, robust)


def _attack(models: Sequence[Path], place: Path, options: Sequence[str], concurrent: Concurrency) -> Path:
    """Attack models, unless that was done, and return the file with the results."""
    asked = [f"checkpoint=[{','.join(map(str, models))}]", *options]
    directory = _beside(place, asked)
    if not (directory / "robustness.json").is_file():
        where = [f"processes={concurrent.jobs}", "logger=csv", f"hydra.run.dir={directory}", "resume=true"]
        log = directory.with_name(f"{directory.name}.log") if concurrent.methods > 1 else None
        directory.parent.mkdir(parents=True, exist_ok=True)
        # The processes of one evaluation share its threads.
        run_entry_point("evaluate.py", *asked, *where, threads=concurrent.threads(1), log=log)
    return directory / "robustness.json"

"""Sweeps: each job in a process of its own, its result in its ``job.json``, and a table of all jobs at the end.

A job that fails, runs out of memory or is killed leaves the others, and whatever launches them, as they were. The same
command with ``resume=true`` and the same ``hydra.sweep.dir`` does what is missing.
"""

import contextlib
import csv
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, SCMode
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from jacobian_robust.cli.mistakes import MISTAKES, one_line
from jacobian_robust.errors import Terminated, UserError
from jacobian_robust.files import file_name, from_here, locked, write_atomically

__all__ = ["Job", "SweepStart", "close_sweep", "read_job", "read_jobs", "run_job"]


# A sweep's directories are named by their overrides.
OmegaConf.register_new_resolver("directory_name", lambda overrides: file_name(overrides or "default"), replace=True)

_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"

_BEGUN, _LOCK = ".begun", "job.lock"

_begun: list[Path] = []
"""The directory of the sweep that this process has begun."""


class Job(BaseModel):
    """The result of a job: the contents of its ``job.json``."""

    overrides: list[str]  # the options that make it
    status: Literal["running", "finished", "pruned", "failed", "interrupted"]  # running also after a loss of power
    before: bool = False  # whether an earlier run of the sweep had finished it, and it was left as it was
    error: str | None = None  # why it failed, in one line
    seconds: float | None = None
    metrics: dict[str, float] = {}

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status in ("finished", "pruned")


class SweepStart(Callback):
    """Hydra's callback that notes the directory of a sweep, and by a file in it when the sweep began."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the directory and the file, whose time is on the clock of its file system."""
        directory = Path(config.hydra.sweep.dir).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _BEGUN).touch()
        _begun.append(directory)


def run_job(task: str, cfg: DictConfig) -> float | None:
    """Run a job of a sweep in a new process and record its result; a failure is recorded, not raised.

    Args:
        task: dotted name of a function of the config.
        cfg: the job's config. Its ``objective`` names the metric that is returned.

    Returns:
        The objective for Hydra's sweeper; ``None`` without one, nan if the job failed.

    Raises:
        KeyboardInterrupt: if the sweep is interrupted; the job has ended then.
    """
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    without = ("resume=", "search.storage=", "search.study=")
    overrides = [option for option in hydra.overrides.task if not option.startswith(without)]
    # One job at a time has the terminal; jobs side by side would write over each other's progress bars.
    log = directory / "log.txt" if hydra.launcher._target_ != _BASIC else None
    (directory / _LOCK).touch()
    try:
        with locked(directory / _LOCK):
            job = _recorded(task, cfg, directory, overrides, log)
    except UserError as error:  # another sweep is at it, and keeps the record
        job = Job(overrides=overrides, status="failed", error=str(error))
    status = "finished before" if job.before else job.status
    line = f"#{hydra.job.num} {' '.join(overrides) or directory.name}: {status}{f': {job.error}' if job.error else ''}"
    print(line, file=sys.stderr if job.status == "failed" else sys.stdout, flush=True)
    if (objective := cfg.get("objective")) is None:
        return None
    return job.metrics.get(objective, float("nan"))


def _recorded(task: str, cfg: DictConfig, directory: Path, overrides: list[str], log: Path | None) -> Job:
    """Run a job and keep its record up to date; the record of one that had finished stays, whatever happens now."""
    earlier = read_job(directory)
    finished = earlier is not None and earlier.done
    job = Job(overrides=overrides, status="running")
    if not finished:
        _record(directory, job)
    started = time.monotonic()
    try:
        job = Job.model_validate(dict(job) | _in_process(task, cfg, log))
    except KeyboardInterrupt:
        if not finished:
            _record(directory, job.model_copy(update={"status": "interrupted"}))
        raise KeyboardInterrupt(_how_to_resume(directory.parent)) from None
    job.seconds = round(time.monotonic() - started, 1)
    if finished and job.status == "finished":
        job = (earlier or job).model_copy(update={"before": True})
    if not finished or job.before:
        _record(directory, job)
    return job


def _in_process(task: str, cfg: DictConfig, log: Path | None) -> dict[str, Any]:
    """Run a task in a new process, and return the fields of its ``Job``."""
    # In a worker of joblib the default is joblib's own, which a new process does not know.
    multiprocessing.set_start_method("spawn", force=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # As plain containers: the new process need not know a launcher's own classes.
    hydra = OmegaConf.to_container(HydraConfig.instance().cfg, structured_config_mode=SCMode.DICT)
    process = multiprocessing.Process(target=_work, args=(sender, task, cfg, hydra, log))
    process.start()
    sender.close()
    try:
        try:
            returned: dict[str, Any] = receiver.recv()
        except EOFError:
            returned = {}
        process.join()
    except KeyboardInterrupt:
        process.join(10)  # it was interrupted too, unless the interruption was sent to this process alone
        process.terminate()
        process.join()
        raise
    code = process.exitcode or 0
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    cause = ": out of memory?" if code == -signal.SIGKILL else ""
    return returned or {"status": "failed", "error": f"its process was ended {how}{cause}"}


def _work(sender: Connection, task: str, cfg: DictConfig, hydra: Any, log: Path | None) -> None:
    """Run a task in this new process, and send the fields of its ``Job``."""
    if log is not None:
        with log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setup_globals()
    HydraConfig.instance().cfg = OmegaConf.create(hydra)
    try:
        module, _, function = task.rpartition(".")
        returned = getattr(importlib.import_module(module), function)(cfg)
        metrics = dict(returned) if isinstance(returned, Mapping) else {}
        status = "pruned" if metrics.pop("pruned", False) else "finished"
        result: dict[str, Any] = {"status": status, "metrics": metrics}
    except (KeyboardInterrupt, Terminated) as end:
        result = {"status": "interrupted", "error": str(end) or None}
    except MISTAKES as error:
        result = {"status": "failed", "error": one_line(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"status": "failed", "error": f"{type(error).__name__}: {one_line(error)}"}
    sender.send(result)


def _end_with_parent() -> None:
    """Terminate this process when its parent is gone: nothing would take its result."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _record(directory: Path, job: Job) -> None:
    with write_atomically(directory / "job.json") as file:
        file.write(job.model_dump_json(indent=2))


def read_job(directory: Path) -> Job | None:
    """Return the record of a job's directory, if it has one."""
    try:
        return Job.model_validate_json((directory / "job.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def read_jobs(directory: Path) -> dict[str, Job]:
    """Return the jobs of a sweep by the names of their directories."""
    places = [path.parent for path in sorted(directory.glob("*/job.json"))]
    return {place.name: job for place in places if (job := read_job(place))}


def _how_to_resume(directory: Path) -> str:
    return f"the same command with hydra.sweep.dir={from_here(directory)} and resume=true does what is missing"


@contextlib.contextmanager
def close_sweep() -> Iterator[None]:
    """Print the table of the sweep that was begun in the block, if one was.

    Raises:
        UserError: if one of its jobs did not finish.
    """
    _begun.clear()
    jobs: dict[str, Job] = {}
    try:
        yield
    finally:
        if _begun:
            jobs = _close(_begun[0])
    if lacking := {name: job for name, job in jobs.items() if not job.done}:
        name, job = next(iter(lacking.items()))
        raise UserError(
            f"{len(lacking)} of {len(jobs)} jobs did not finish, {_labels(jobs)[name]} ({job.error or job.status}); "
            f"{_how_to_resume(_begun[0])}"
        )


def _close(directory: Path) -> dict[str, Job]:
    """Write all jobs of a sweep's directory into its ``jobs.csv``, print and return those of the sweep just run."""
    every = read_jobs(directory)
    begun = (directory / _BEGUN).stat().st_mtime_ns
    (directory / _BEGUN).unlink()
    jobs = {name: job for name, job in every.items() if (directory / name / _LOCK).stat().st_mtime_ns >= begun}
    if not every:  # it was refused before its first job
        (directory / "multirun.yaml").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()
    if not jobs:
        return {}
    metrics = dict.fromkeys(metric for job in every.values() for metric in job.metrics)
    with write_atomically(directory / "jobs.csv") as file:
        writer = csv.DictWriter(file, ["job", "status", "seconds", "error", *metrics])
        writer.writeheader()
        for name, job in every.items():
            own = {"job": name, "status": job.status, "seconds": job.seconds, "error": job.error}
            writer.writerow(own | job.metrics)
    Console().print(_table(directory, jobs))
    print(f"results: {from_here(directory)}/jobs.csv, and a directory for each job", flush=True)
    return jobs


def _table(directory: Path, jobs: Mapping[str, Job]) -> Table:
    """Return the status, the time and the accuracies of the jobs."""
    metrics = dict.fromkeys(name for job in jobs.values() for name in job.metrics)
    shown = [name for name in metrics if "accuracy" in name and not name.startswith(("train", "twin"))]
    table = Table(title=f"{from_here(directory)}: {len(jobs)} jobs", title_justify="left")
    for column in ("job", "", "seconds", *(name.replace("_", " ") for name in shown)):
        table.add_column(column, justify="left" if column in ("job", "") else "right", no_wrap=column == "")
    for name, label in _labels(jobs).items():
        job = jobs[name]
        values = (f"{job.metrics[key]:.4f}" if key in job.metrics else "–" for key in shown)
        seconds = "–" if job.seconds is None else f"{job.seconds:.0f}"
        table.add_row(label, "skipped" if job.before else job.status, seconds, *values)
    return table


def _labels(jobs: Mapping[str, Job]) -> dict[str, str]:
    """Return the jobs' labels: the options that not all of them share."""
    shared = set.intersection(*(set(job.overrides) for job in jobs.values()))
    labels = {name: [option for option in job.overrides if option not in shared] for name, job in jobs.items()}
    return {name: " ".join(options) or name for name, options in labels.items()}

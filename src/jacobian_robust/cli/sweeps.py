"""Sweeps: each job in a process of its own, what became of it in its ``job.json``, and a table of all at the end.

A job that fails, runs out of memory or is killed leaves the others, and whatever launches them, as they were. The same
command with ``resume=true`` and the same ``hydra.sweep.dir`` does what is missing.
"""

import contextlib
import csv
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
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

__all__ = ["Job", "SweepStart", "close_sweep", "read_jobs", "run_job"]


# A sweep's directories are named by their overrides.
OmegaConf.register_new_resolver("directory_name", lambda overrides: file_name(overrides or "default"), replace=True)


Status = Literal["running", "finished", "pruned", "failed", "interrupted"]

_BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"

_BEGUN, _CLAIM = ".begun", "job.lock"

_begun: list[Path] = []
"""The directory of the sweep that this process has begun."""


class Job(BaseModel):
    """What became of a job: the contents of its ``job.json``.

    Attributes:
        overrides: the options that make it.
        status: ``running`` also stands where the whole machine went down.
        before: whether it had finished in an earlier run of the sweep, and was left as it was.
        error: why it failed, in one line.
        seconds: how long it took.
        metrics: what it returned.
    """

    overrides: list[str]
    status: Status
    before: bool = False
    error: str | None = None
    seconds: float | None = None
    metrics: dict[str, float] = {}


class SweepStart(Callback):
    """Hydra's callback that notes where the jobs of a sweep leave their results."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the directory, and by a file in it when the sweep began, on the clock of its file system."""
        directory = Path(config.hydra.sweep.dir).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _BEGUN).touch()
        _begun.append(directory)


def run_job(task: str, cfg: DictConfig) -> float | None:
    """Run a job of a sweep in a new process and record what became of it; a failure is recorded, not raised.

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
    name = " ".join(_overrides()) or directory.name
    # One job at a time has the terminal; jobs side by side would write over each other's progress bars.
    log = hydra.launcher._target_ != _BASIC
    claim = directory / _CLAIM
    claim.touch()
    try:
        with locked(claim):
            job = _run(task, cfg, directory, log)
    except UserError as error:  # another sweep is at it, and keeps the record
        job = Job(overrides=_overrides(), status="failed", error=str(error))
    ending = "finished before" if job.before else job.status
    _say(f"#{hydra.job.num} {name}: {ending}{f': {job.error}' if job.error else ''}", failed=job.status == "failed")
    if (objective := cfg.get("objective")) is None:
        return None
    return job.metrics.get(objective, float("nan"))


def _say(text: str, *, failed: bool = False) -> None:
    print(text, file=sys.stderr if failed else sys.stdout, flush=True)


def _overrides() -> list[str]:
    without = ("resume=", "search.storage=", "search.study=")
    return [option for option in HydraConfig.get().overrides.task if not option.startswith(without)]


def _run(task: str, cfg: DictConfig, directory: Path, log: bool) -> Job:
    earlier = read_job(directory)
    finished = earlier is not None and earlier.status in ("finished", "pruned")
    if not finished:
        _record(directory, Job(overrides=_overrides(), status="running"))
    started = time.monotonic()
    # As plain containers: a launcher's own classes need not be known to the child.
    hydra = OmegaConf.create(OmegaConf.to_container(HydraConfig.instance().cfg, structured_config_mode=SCMode.DICT))
    receiver, sender = os.pipe()
    with (directory / "log.txt").open("a") if log else contextlib.nullcontext() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(sender)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[sender],
        )
    os.close(sender)
    try:
        job = _outcome(child, receiver, pickle.dumps((sys.path, task, cfg, hydra)))
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)  # it was interrupted too, unless the interruption was sent to this process alone
        child.terminate()
        child.wait()
        if not finished:
            _record(directory, Job(overrides=_overrides(), status="interrupted"))
        raise KeyboardInterrupt(_to_go_on(directory.parent)) from None
    job.seconds = round(time.monotonic() - started, 1)
    if not finished:
        _record(directory, job)
    elif job.status == "finished":  # it has returned what it had returned
        job = Job.model_validate(dict(earlier or job) | {"before": True})
        _record(directory, job)
    return job  # what had finished keeps its record, whatever is wrong with this second run


def _outcome(child: subprocess.Popen[bytes], receiver: int, work: bytes) -> Job:
    """Give a child its work and return what it tells of it, or how it ended if it could not."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended before it began
        child.stdin.write(work)
        child.stdin.flush()
    with open(receiver, "rb") as told:
        text = told.read()
    status = child.wait()
    if text:
        return Job(overrides=_overrides(), **json.loads(text))
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    cause = ": out of memory?" if status == -signal.SIGKILL else ""
    return Job(overrides=_overrides(), status="failed", error=f"its process was ended {how}{cause}")


def _work(sender: int) -> None:
    """Do the work that comes in by the standard input, and tell what became of it."""
    sys.path[:], task, cfg, hydra = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setup_globals()
    HydraConfig.instance().cfg = hydra
    try:
        module, _, function = task.rpartition(".")
        returned = getattr(importlib.import_module(module), function)(cfg)
        metrics = dict(returned) if isinstance(returned, Mapping) else {}
        status = "pruned" if metrics.pop("pruned", False) else "finished"
        told: dict[str, Any] = {"status": status, "metrics": metrics}
    except (KeyboardInterrupt, Terminated) as end:
        told = {"status": "interrupted", "error": str(end) or None}
    except MISTAKES as error:
        told = {"status": "failed", "error": one_line(error)}
    except Exception as error:
        traceback.print_exc()
        told = {"status": "failed", "error": f"{type(error).__name__}: {one_line(error)}"}
    with open(sender, "w") as channel:
        json.dump(told, channel)


def _end_with_parent() -> None:
    """Ask this process to end (SIGTERM) when its parent is gone: nothing would take its result."""
    os.read(sys.stdin.fileno(), 1)  # returns when the other end is closed, however that came about
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
    found = {place.parent.name: read_job(place.parent) for place in sorted(directory.glob("*/job.json"))}
    return {name: job for name, job in found.items() if job is not None}


def _to_go_on(directory: Path) -> str:
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
    lacking = [name for name, job in jobs.items() if job.status not in ("finished", "pruned")]
    if lacking:
        why = jobs[lacking[0]].error or jobs[lacking[0]].status
        raise UserError(
            f"{len(lacking)} of {len(jobs)} jobs did not finish, {_labels(jobs)[lacking[0]]} ({why}); "
            f"{_to_go_on(_begun[0])}"
        )


def _close(directory: Path) -> dict[str, Job]:
    """Write all jobs of a sweep's directory into its ``jobs.csv``, print and return those of the sweep just run."""
    every = read_jobs(directory)
    begun = (directory / _BEGUN).stat().st_mtime_ns
    (directory / _BEGUN).unlink()
    jobs = {name: job for name, job in every.items() if (directory / name / _CLAIM).stat().st_mtime_ns >= begun}
    if not every:  # it was refused before its first job
        (directory / "multirun.yaml").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()
    if not jobs:
        return {}
    with write_atomically(directory / "jobs.csv") as file:
        metrics = list(dict.fromkeys(name for job in every.values() for name in job.metrics))
        writer = csv.writer(file)
        writer.writerow(["job", "status", "seconds", "error", *metrics])
        for name, job in every.items():
            writer.writerow([name, job.status, job.seconds, job.error, *(job.metrics.get(key) for key in metrics)])
    Console().print(_table(directory, jobs))
    print(f"results: {from_here(directory)}/jobs.csv, and a directory for each job", flush=True)
    return jobs


def _table(directory: Path, jobs: Mapping[str, Job]) -> Table:
    """Return what became of the jobs, with their accuracies."""
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
    """Return what tells the jobs apart: the options that not all of them share."""
    shared = set.intersection(*(set(job.overrides) for job in jobs.values()))
    labels = {name: [option for option in job.overrides if option not in shared] for name, job in jobs.items()}
    return {name: " ".join(options) or name for name, options in labels.items()}


if __name__ == "__main__":
    _work(int(sys.argv[1]))

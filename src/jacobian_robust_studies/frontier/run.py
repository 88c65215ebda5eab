"""The study itself: what is missing is trained and attacked by the project's own commands."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch

from jacobian_robust.cli.sweeps import read_job
from jacobian_robust.errors import DIVERGED, UserError
from jacobian_robust_studies.documents import run_entry_point
from jacobian_robust_studies.frontier.plan import Cell, fingerprint
from jacobian_robust_studies.frontier.record import Record

__all__ = ["side_by_side", "study"]

T = TypeVar("T")


def side_by_side(work: Callable[[T], None], items: Sequence[T], jobs: int) -> None:
    """Work at so many items at a time. After a failure or an interruption no more begins.

    Raises:
        Exception: the first failure, once all that was begun has ended.
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for future in futures:
        future.result()


def study(record: Record, methods: Sequence[str], lengths: Sequence[int], *, runs: Path, jobs: int, test: bool) -> None:
    """Make what is missing of some methods and lengths, the short ones first; each result is recorded as it is made.

    Args:
        record: what is known of the grid.
        methods: to work at.
        lengths: in plain epochs.
        runs: directory for new runs. Runs with other options stay there as they are.
        jobs: how many trainings and attacks run at a time.
        test: whether to attack the chosen networks on test images.

    Raises:
        UserError: if a command fails, or a file there cannot be read.
    """
    threads = max(1, torch.get_num_threads() // jobs)

    def train(cell: Cell) -> None:
        record.add(cell, _train(record, cell, runs, threads=threads, alone=jobs == 1))

    def attack(method: str) -> None:
        for length in lengths:
            if not record.tested(method, length) and (cells := record.chosen(method, length)):
                record.add_test(method, length, _attack(record, cells, runs, threads=threads, alone=jobs == 1))

    known = record.rows()
    wanted = [cell for length in lengths for name in methods for cell in record.plan.cells(record.grid, name, length)]
    side_by_side(train, [cell for cell in wanted if cell not in known], jobs)
    if test:
        side_by_side(attack, methods, jobs)


def _place(record: Record, cell: Cell, runs: Path) -> Path:
    """Return the run directory of a training: of its options alone, which a plan may change."""
    options = record.plan.training_options(record.grid, cell.method, cell.length)
    directory = f"{cell.method}-{cell.length}-{fingerprint(options)}"
    return runs / record.grid / directory / f"strength-{cell.strength}-seed-{cell.seed}"


def _train(record: Record, cell: Cell, runs: Path, *, threads: int, alone: bool) -> Path | None:
    """Train and judge a network, unless that was done; return the directory of its evaluation; ``None`` if it diverged.

    Raises:
        UserError: if the training failed for a reason other than the method's.
    """
    place = _place(record, cell, runs)
    place.mkdir(parents=True, exist_ok=True)
    options = record.plan.training_options(record.grid, cell.method, cell.length)
    if (strength := record.plan.methods[cell.method].strength) is not None:
        options = [*options, f"{strength}={cell.strength}"]
    if torch.cuda.is_available():
        options = [*options, "cuda_graph=true"]  # the same steps, sooner
    where = [f"hydra.sweep.dir={place.parent}", f"hydra.sweep.subdir={place.name}", "resume=true"]
    log = None if alone else place / "log.txt"
    run_entry_point("train.py", "-m", *options, f"seed={cell.seed}", *where, check=False, threads=threads, log=log)
    job = read_job(place)
    if job is not None and job.status == "finished":
        return place / "evaluation"
    if job is not None and str(job.error).startswith(DIVERGED):
        return None
    raise UserError(f"{place}: {job.error if job and job.error else 'did not end'}; run this again to go on")


def _attack(record: Record, cells: Sequence[Cell], runs: Path, *, threads: int, alone: bool) -> Path:
    """Attack the networks of a method's chosen strength on test images, and return the file with the results."""
    models = [_place(record, cell, runs) / "model.safetensors" for cell in cells]
    if absent := [str(model) for model in models if not model.is_file()]:
        raise UserError(f"{absent[0]}: not there; the weights of a finalist are needed to attack them: remove its row")
    options = [f"checkpoint=[{','.join(map(str, models))}]", *record.plan.grids[record.grid].test, "logger=csv"]
    directory = models[0].parent.with_name(f"test-{fingerprint(options)}")
    directory.mkdir(parents=True, exist_ok=True)
    log = None if alone else directory / "log.txt"
    run_entry_point("evaluate.py", *options, f"hydra.run.dir={directory}", "resume=true", threads=threads, log=log)
    return directory / "robustness.json"

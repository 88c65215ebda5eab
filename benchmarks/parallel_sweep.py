"""What running a sweep's jobs side by side gains: ``python benchmarks/parallel_sweep.py``.

The same sweep, of trainings that differ in their seed, through ``train.py``: one job after another with all processors
to itself, and as many jobs at once as there are processors with a thread each (``hydra/launcher=joblib``), in turn. The
ratio is that of the times that passed, the start of each job's process included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def sweep(options: list[str], jobs: int, *, side_by_side: int | None) -> float:
    """Run a sweep and return the seconds that passed; ``side_by_side`` jobs at once, or one after another."""
    launcher = [] if side_by_side is None else ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={side_by_side}"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as directory:
        seeds = ",".join(map(str, range(jobs)))
        command = [sys.executable, str(ROOT / "train.py"), "-m", f"seed={seeds}", *options, *launcher]
        started = time.perf_counter()
        subprocess.run([*command, f"hydra.sweep.dir={directory}"], check=True, env=environment, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--regularizer", default="frobenius", help="of the trainings, with 1 probe; or none")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    options = [f"regularizer={arguments.regularizer}", f"trainer.limit_train_batches={arguments.steps}"]
    options += ["regularizer.probes=1"] if arguments.regularizer == "frobenius" else []
    options += ["trainer.max_epochs=1", "trainer.enable_progress_bar=false", "monitor_images=0", "logger=csv"]
    processors = len(os.sched_getaffinity(0))
    ways: dict[str, int | None] = {"one after another": None, f"{processors} side by side": processors}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.repeats):
        for way, side_by_side in ways.items():
            seconds[way].append(sweep(options, arguments.jobs, side_by_side=side_by_side))
    table = Table(
        title=f"{arguments.jobs} jobs of {arguments.steps} steps, {processors} processors", title_justify="left"
    )
    for column in ("way", "seconds", "ratio"):
        table.add_column(column)
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    first = next(iter(medians.values()))
    for way, median in medians.items():
        table.add_row(way, f"{median:.0f}", f"{median / first:.2f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()

"""What a second process brings: ``python benchmarks/devices.py``.

Training: epochs of ``train.py`` on one process of one thread, on one of two threads, and on two of one thread each
(``trainer=ddp``), with the same global batch. The three take turns, and the figures are medians over the rounds of the
seconds in ``metrics.csv``, which leave out starting, validation and measurements. Evaluation: PGD-40 at the note's
budgets by one process of one thread and by two, the same images and, as is checked, the same counts; the second process
is started before the clock is. A ratio below 1 is a gain; half would be all that there is to gain.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from jacobian_robust.attacks import PGD
from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.workers import several

ROOT = Path(__file__).resolve().parents[1]
PENALTIES = {"plain": ["regularizer=none"], "frobenius, 1 probe": ["regularizer.probes=1"]}
WAYS = {
    "1 process, 1 thread": ("1", []),
    "1 process, 2 threads": ("2", []),
    "2 processes, 1 thread each": ("1", ["trainer=ddp"]),
}
ATTACK = PGD(name="pgd", norm="linf", eps=(0.1, 0.2, 0.3), steps=40, step_size=0.01)


def seconds_a_step(threads: str, overrides: list[str], *, batch_size: int, steps: int) -> float:
    """Return the seconds of a step in the second epoch of a training: the first one warms up."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={directory}/run", "logger=csv"),
            *("trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.limit_val_batches=0", "monitor_images=0"),
            *(
                f"trainer.limit_train_batches={steps}",
                f"data.batch_size={batch_size}",
                "checkpoints.every_seconds=null",
            ),
            "trainer.enable_progress_bar=false",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        with (Path(directory) / "run" / "metrics.csv").open() as file:
            return float(list(csv.DictReader(file))[-1]["seconds"]) / steps


def training(batch_sizes: list[int], steps: int, rounds: int) -> Table:
    table = Table(title="A training step, LeNet, ms (ratio)", title_justify="left")
    for column in ("", "batch", *WAYS):
        table.add_column(column, justify="left" if not column else "right")
    for name, penalty in PENALTIES.items():
        for batch_size in batch_sizes:
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, (threads, overrides) in WAYS.items():
                    taken = seconds_a_step(threads, penalty + overrides, batch_size=batch_size, steps=steps)
                    seconds[way].append(taken)
            medians = [1e3 * statistics.median(taken) for taken in seconds.values()]
            table.add_row(name, str(batch_size), *(f"{ms:.1f} ({ms / medians[0]:.2f})" for ms in medians))
    return table


def evaluation(checkpoint: Path, images: int, rounds: int) -> Table:
    torch.set_num_threads(1)
    stored = load_checkpoint(checkpoint)
    datamodule = stored.datamodule()
    datamodule.setup("test")
    model, (inputs, labels) = stored.model(), datamodule.split("test").first(images)
    table = Table(title=f"PGD-40 at three budgets, {images} images, s (ratio)", title_justify="left")
    for column in ("1 process", "2 processes", "start of the second, s", "correct at 0.1 / 0.2 / 0.3"):
        table.add_column(column, justify="right")
    seconds: list[list[float]] = [[], []]
    start = time.perf_counter()
    with several(1, [model]) as alone, several(2, [model]) as together:
        for _ in sweep(model, inputs[:100], labels[:100], [ATTACK], attackers=together).budgets:
            pass
        started = time.perf_counter() - start
        counts = set()
        for _ in range(rounds):
            for taken, attackers in zip(seconds, (alone, together), strict=True):
                start = time.perf_counter()
                swept = sweep(model, inputs, labels, [ATTACK], attackers=attackers)
                taken.append(time.perf_counter() - start)
                counts.add(tuple(budget.correct for budget in swept.budgets))
    if len(counts) > 1:
        raise AssertionError(f"the counts differ: {counts}")
    one, two = map(statistics.median, seconds)
    table.add_row(f"{one:.1f}", f"{two:.1f} ({two / one:.2f})", f"{started:.1f}", " / ".join(map(str, counts.pop())))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of an epoch; 0 leaves training out")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--images", type=int, default=500, help="to attack; 0 leaves evaluation out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"
    )
    arguments = parser.parse_args()
    keep_freed_memory()  # as the two doors do
    console = Console(width=120)
    before = os.getloadavg()[0]
    if arguments.images:
        console.print(evaluation(arguments.checkpoint, arguments.images, arguments.rounds))
    if arguments.steps:
        console.print(training(arguments.batch_sizes, arguments.steps, arguments.rounds))
    after = os.getloadavg()[0]
    console.print(f"{os.cpu_count()} processors; load average {before:.1f} at the start, {after:.1f} at the end")


if __name__ == "__main__":
    main()

"""What a training step with one probe costs in each task, in plain steps: ``python benchmarks/task_cost.py``.

A step is the framework's own: loss and backward pass of the task's model on 32 random images, the optimizer's step at a
learning rate of zero. Plain and penalised steps take turns in one process, on one thread; the times are of the
processor, so that other work on the machine lengthens them little, and the ratios are of medians.
"""

import argparse
import json
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import nn

from jacobian_robust.config import build
from jacobian_robust.geometry.families import Family
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.penalties import Penalty
from jacobian_robust.training.module import RobustClassifier

CONF = Path(__file__).parents[1] / "conf"
BATCH = 32
TASKS = {
    "classification": "model=lenet",
    "regression": "model=lenet data=mnist_angle",
    "regression_scale": "model=lenet data=mnist_angle data.outputs=2",
    "multilabel": "model=lenet data=mnist_pairs",
    "counts": "model=lenet data=mnist_pairs data.outputs=1",
    "segmentation": "model=conv_pixels data=mnist_pairs data.outputs=11",
}
"""Options of ``train.py`` by task."""

PENALTIES = ("none", "frobenius", "margin", "linear_margin")


def step_of(task: str, penalty: str) -> Callable[[], None]:
    """Return a training step."""
    options = shlex.split(TASKS[task])
    probed = ["regularizer.probes=1"] if penalty in ("frobenius", "margin") else []
    if penalty == "frobenius":  # a radius that every family has
        probed += ["regularizer.eps=1.0", "regularizer.delta_over_eps=null"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"task={task}", *options, f"regularizer={penalty}", *probed, "output_dir=."])
    family = build(cfg, "task", Family)
    made = build(cfg, "regularizer", Penalty, optional=True)
    made = made and made.with_family(family)
    torch.manual_seed(0)
    model = build(cfg, "model", nn.Module)
    images = torch.rand(BATCH, 1, 28, 28)
    with torch.no_grad():
        batch = images, family.predict(model(images))
    module = RobustClassifier(model, lambda p: torch.optim.SGD(p, lr=0.0), made, family=family)
    module.eta = 0.5
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def step() -> None:
        loss = module.loss_terms(batch, generator=module._generator).loss
        optimizer.zero_grad()
        module.backward(loss)
        optimizer.step()

    return step


def measure(task: str, seconds: float) -> dict[str, dict[str, float]]:
    """Return milliseconds and ratio of the steps of a task by penalty; the first is the plain step."""
    steps = {penalty: step_of(task, penalty) for penalty in PENALTIES}
    times: dict[str, list[float]] = {penalty: [] for penalty in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(times.values()):
        for penalty, step in steps.items():
            start = time.process_time()
            step()
            times[penalty].append(time.process_time() - start)
    medians = {penalty: statistics.median(taken) for penalty, taken in times.items()}
    return {penalty: {"ms": 1000 * taken, "ratio": taken / medians["none"]} for penalty, taken in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each task")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    measured = {task: measure(task, arguments.seconds) for task in TASKS}
    table = Table("task", "plain, ms", *(f"{penalty}, ratio" for penalty in PENALTIES[1:]))
    for task, figures in measured.items():
        plain, *rest = figures.values()
        table.add_row(task, f"{plain['ms']:.1f}", *(f"{of['ratio']:.2f}" for of in rest))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

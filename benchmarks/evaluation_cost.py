"""What an evaluation costs beside the libraries alone: ``python benchmarks/evaluation_cost.py checkpoint``.

PGD-40 at the note's three budgets, on the same images, in one process: the loop attacks every batch at every budget, as
torchattacks' examples do; the sweep attacks only what is left, without gradients of the parameters, and ends a batch
when all of it is broken. The reference AutoAttack: called directly, and through the sweep. All count by the same
re-check. The ways take turns, and the ratios are of the medians: of the time that passed, and of the processor's, which
other work on the machine disturbs less. The last columns count what is classified correctly at each budget.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyautoattack
import torch
import torchattacks
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from jacobian_robust.attacks import PGD, AutoAttack
from jacobian_robust.checkpoints import find_checkpoints, load_checkpoint
from jacobian_robust.errors import describe, ends_in_one_line
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.robustness.budgets import is_allowed, predictions, sweep

ATTACK = PGD(name="pgd", norm="linf", eps=(0.1, 0.2, 0.3), steps=40, step_size=0.01)


Standing = dict[float, int]
"""How many images are still classified correctly at each budget."""

Way = Callable[[nn.Module, Tensor, Tensor], Standing]


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> Standing:
    standing = {}
    for eps in ATTACK.eps:
        attack = torchattacks.PGD(model, eps=eps, alpha=ATTACK.step_size, steps=ATTACK.steps)
        correct = 0
        size = ATTACK.images_at_once(images.device)
        batches = zip(images.split(size), labels.split(size), strict=True)
        for batch, classes in batches:
            adversarial = attack(batch, classes)
            fallen = is_allowed(batch, adversarial, "linf", eps) & (predictions(model, adversarial) != classes)
            correct += int((~fallen & (predictions(model, batch) == classes)).sum())
        standing[eps] = correct
    return standing


def ours(model: nn.Module, images: Tensor, labels: Tensor) -> Standing:
    return {budget.eps: budget.correct for budget in sweep(model, images, labels, [ATTACK]).budgets}


def reference(model: nn.Module, images: Tensor, labels: Tensor, attack: AutoAttack) -> Standing:
    """Attack with the reference AutoAttack, called as its documentation says."""
    (eps,) = attack.eps
    called = pyautoattack.AutoAttack(model, device=images.device, eps=eps, norm="Linf", seed=0, version="standard")
    adversarial, _ = called.run_standard_evaluation(images, labels, batch_size=attack.images_at_once(images.device))
    fallen = is_allowed(images, adversarial, "linf", eps) & (predictions(model, adversarial) != labels)
    return {eps: int((~fallen & (predictions(model, images) == labels)).sum())}


def our_reference(model: nn.Module, images: Tensor, labels: Tensor, attack: AutoAttack) -> Standing:
    return {budget.eps: budget.correct for budget in sweep(model, images, labels, [attack]).budgets}


def measure(
    ways: dict[str, Way], model: nn.Module, images: Tensor, labels: Tensor, rounds: int
) -> dict[str, tuple[float, float, Standing]]:
    """Return seconds, seconds of the processor, and how many images stand, for each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    standing: dict[str, Standing] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            torch.manual_seed(0)
            start, busy = time.perf_counter(), time.process_time()
            standing[name] = way(model, images, labels)
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - busy)
    return {
        name: (statistics.median(seconds[name]), statistics.median(processor[name]), standing[name]) for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+", type=Path, help="run directories or checkpoint files")
    parser.add_argument("--images", type=int, help="test images; all 10,000 by default")
    parser.add_argument("--autoattack-images", type=int, default=100, help="for AutoAttack; 0 for none")
    parser.add_argument("--autoattack-eps", type=float, default=0.1, help="AutoAttack's budget, 0.1 by default")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    keep_freed_memory()  # as evaluate.py does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        attack = AutoAttack(name="autoattack", norm="linf", eps=(arguments.autoattack_eps,), batch_size=100)
    except ValidationError as error:
        parser.error(f"--autoattack-{describe(error)}")
    pgd: dict[str, Way] = {"loop over torchattacks": loop, "sweep": ours}
    autoattack: dict[str, Way] = {
        "AutoAttack, directly": partial(reference, attack=attack),
        "AutoAttack, sweep": partial(our_reference, attack=attack),
    }
    budgets = sorted({*ATTACK.eps, *attack.eps})
    columns = ["checkpoint", "images", "way", "s", "ratio", "CPU s", "ratio"]
    table = Table(*columns, *(f"at {eps:g}" for eps in budgets))
    for path in find_checkpoints(arguments.checkpoint):
        checkpoint = load_checkpoint(path)
        datamodule = checkpoint.datamodule()
        datamodule.setup("test")
        model = checkpoint.model().to(device)
        for ways, limit in ((pgd, arguments.images), (autoattack, arguments.autoattack_images)):
            if limit == 0:
                continue
            images, labels = (tensor.to(device) for tensor in datamodule.split("test").first(limit))
            results = measure(ways, model, images, labels, arguments.rounds)
            of, processor_of, _ = next(iter(results.values()))
            for name, (seconds, processor, standing) in results.items():
                cells = [f"{seconds:.1f}", f"{seconds / of:.2f}", f"{processor:.1f}", f"{processor / processor_of:.2f}"]
                counts = [str(standing.get(eps, "")) for eps in budgets]
                table.add_row(path.stem, str(len(images)), name, *cells, *counts)
    Console(width=120).print(table)


if __name__ == "__main__":
    with ends_in_one_line():
        main()

"""What a training step of each defence costs, as a ratio to the plain one: ``python benchmarks/defence_cost.py``.

Every row is what stands behind ``train.py``, with the options of its YAML: the framework's own loss and backward pass
of the model, 32 random images by default, the optimizer's step at a learning rate of zero. All take turns in one
process; ratios are of medians. A step of ``adversary=free`` is one of its replays.
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

from jacobian_robust.adversaries import Adversary
from jacobian_robust.config import build
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.penalties import Amortization, Penalty
from jacobian_robust.training.module import RobustClassifier

CONF = Path(__file__).parents[1] / "conf"
BATCH = 32
DEFENCES = (
    "regularizer=none",
    "regularizer=frobenius regularizer.probes=1",
    "regularizer=frobenius",
    "regularizer=spectral",
    "regularizer=isometry",
    "regularizer=isometry amortization.fraction=0.125",
    "regularizer=margin",
    "regularizer=margin adversary=noise adversary.penalty_at=adversary",
    "regularizer=linear_margin",
    "regularizer=linear_margin adversary=noise adversary.penalty_at=adversary",
    "regularizer=linear_margin regularizer.rivals=3",
    "regularizer=lagrangian",
    "regularizer=hoffman",
    "regularizer=input_gradient",
    "regularizer=input_gradient regularizer.norm=l1",
    "regularizer=vat",
    "regularizer=curvature",
    "regularizer=gloro",
    "regularizer=none adversary=noise",
    "regularizer=none adversary=fgsm",
    "regularizer=none adversary=pgd",
    "regularizer=none adversary=pgd adversary.steps=3",
    "regularizer=none adversary=free",
    "regularizer=none adversary=trades",
    "regularizer=none adversary=trades adversary.steps=3",
    "regularizer=margin adversary=noise adversary.fit_at=clean adversary.penalty_at=adversary",
    "regularizer=margin adversary=steepest",
    "regularizer=margin adversary=steepest adversary.fit_at=clean",
    "regularizer=margin adversary=steepest adversary.fit_at=clean adversary.steps=0 adversary.samples=3",
    "regularizer=margin adversary=fgsm",
    "regularizer=margin adversary=fgsm adversary.penalty_at=adversary",
    "regularizer=margin model=lenet_smooth",
    "regularizer=none model.orthogonal=true",
)
"""Options of ``train.py``."""


def step_of(options: str, size: int = BATCH) -> Callable[[], None]:
    """Return a training step."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*shlex.split(options), "output_dir=."])
    penalty = build(cfg, "regularizer", Penalty, optional=True)
    adversary = build(cfg, "adversary", Adversary, optional=True)
    penalised = Amortization(**cfg.amortization).samples(size)
    torch.manual_seed(0)
    batch = torch.rand(size, 1, 28, 28), torch.randint(0, 10, (size,))
    model = build(cfg, "model", nn.Module)
    module = RobustClassifier(model, lambda p: torch.optim.SGD(p, lr=0.0), penalty, adversary=adversary)
    module.eta = 0.5
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def step() -> None:
        due = batch if adversary is None else adversary.next_batch(batch)
        loss = module.loss_terms(due, generator=module._generator, attacked=True, penalised=penalised).loss
        optimizer.zero_grad()
        module.backward(loss)
        optimizer.step()

    return step


def measure(
    defences: tuple[str, ...], seconds: float, shared: str = "", size: int = BATCH
) -> dict[str, dict[str, float]]:
    """Return milliseconds and ratio of each defence; the first one is the plain step.

    ``shared`` are options of all rows, ``size`` the number of images in a batch.
    """
    steps = {options: step_of(f"{options} {shared}", size) for options in defences}
    times: dict[str, list[float]] = {options: [] for options in defences}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(times.values()):
        for options, step in steps.items():
            start = time.perf_counter()
            step()
            times[options].append(time.perf_counter() - start)
    medians = {options: statistics.median(taken) for options, taken in times.items()}
    plain = medians[defences[0]]
    return {options: {"ms": 1000 * taken, "ratio": taken / plain} for options, taken in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", nargs="*", metavar="OPTIONS", help="of train.py, quoted, a row each; by default all")
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring")
    parser.add_argument("--shared", default="", metavar="OPTIONS", help="of all rows, as 'model=conv_small'")
    parser.add_argument("--batch", type=int, default=BATCH, help="images in a batch")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    keep_freed_memory()
    chosen = (DEFENCES[0], *arguments.options) if arguments.options else DEFENCES
    measured = measure(chosen, arguments.seconds, arguments.shared, arguments.batch)
    table = Table("options of train.py", "ms", "ratio to the plain step")
    for options, figures in measured.items():
        table.add_row(options, f"{figures['ms']:.1f}", f"{figures['ratio']:.2f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

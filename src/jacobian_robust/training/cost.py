"""What a training costs, in plain steps: figures of different machines and moments can be compared."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console

from jacobian_robust.training.build import Run
from jacobian_robust.training.losses import Batch
from jacobian_robust.training.module import RobustClassifier

__all__ = ["Cost", "measure_cost"]

STEPS = 20
"""So many steps of each kind are timed."""

SHARE, SECONDS = 0.02, 0.2
"""For how long steps are timed, once each kind has been: this share of the training, these seconds at least."""


@dataclass(frozen=True)
class Cost:
    """The cost of a training, beside one by cross-entropy alone with the same batches and optimizer.

    Attributes:
        plain_step_seconds: least time of a step by cross-entropy alone.
        step_seconds: least time of the training's own steps, averaged over a period of the amortization.
        step_ratio: the second over the first.
        plain_step_equivalents: the ratio times the number of steps.
    """

    plain_step_seconds: float
    step_seconds: float
    step_ratio: float
    plain_step_equivalents: float


def measure_cost(run: Run, seconds: float) -> Cost | None:
    """Time a finished training's steps beside plain ones, in turn, eagerly, on copies of its network.

    The network and the random numbers are left as they are. The steps do not include the loading of images.

    Args:
        run: the training, with all its steps.
        seconds: how long it took.

    Returns:
        The cost; ``None`` where several processes train together, and where the measurement fails, which is said.
    """
    if run.trainer.world_size > 1 or not run.trainer.global_step:
        return None
    device = run.trainer.strategy.root_device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            plain, own = _times(run, device, max(SECONDS, seconds * SHARE))
    except Exception as error:  # a training is not lost for a figure
        Console().print(f"{run.name}: its cost could not be measured: {error}", soft_wrap=True)
        return None
    return Cost(plain, own, own / plain, own / plain * run.trainer.global_step)


def _times(run: Run, device: torch.device, limit: float) -> tuple[float, float]:
    """Return the seconds of a plain step and of the training's own."""
    images, labels = run.datamodule.split("train").first(run.datamodule.batch_size)
    batch = images.to(device), labels.to(device)
    plain_step, own_step = _step(run, batch, device, plain=True), _step(run, batch, device, plain=False)
    every = run.module.amortization.every if run.module.penalty is not None else 1
    for step in range(every):  # what is set up at first use
        plain_step(step), own_step(step)
    plain: list[float] = []
    own: list[list[float]] = [[] for _ in range(every)]
    began = time.perf_counter()
    while len(plain) < STEPS or not own[-1]:
        step = len(plain)
        plain.append(plain_step(step))
        own[step % every].append(own_step(step))
        if own[-1] and time.perf_counter() - began > limit:
            break
    # The least times: other work on the machine makes steps longer, never shorter.
    return min(plain), statistics.fmean(map(min, own))


def _step(run: Run, batch: Batch, device: torch.device, *, plain: bool) -> Callable[[int], float]:
    """Return what takes the step of a number on a copy of the network, and returns its seconds."""
    module = RobustClassifier(
        copy.deepcopy(run.module.model),
        run.module.make_optimizer,
        None if plain else copy.deepcopy(run.module.penalty),
        adversary=None if plain else copy.deepcopy(run.module.adversary),
        family=run.module.family,
        amortization=run.module.amortization,
    )
    module.to(device).train()
    module.eta = run.module.eta
    optimizer = module.configure_optimizers()

    def step(number: int) -> float:
        began = _now(device)
        with run.trainer.precision_plugin.forward_context():
            drawn = batch if module.adversary is None else module.adversary.next_batch(batch)
            terms = module.training_terms(drawn, number)
        optimizer.zero_grad()
        module.backward(terms.loss)
        optimizer.step()
        if module.penalty is not None:
            module.penalty.step()
        return _now(device) - began

    return step


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

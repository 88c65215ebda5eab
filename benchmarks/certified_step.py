"""What a training step with interval bounds costs, in plain steps: ``python benchmarks/certified_step.py``.

The two take turns in one process, on the same network and batch, with a learning rate of zero. The ratio is that of the
medians.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.models import ConvSmall, LeNet
from jacobian_robust.penalties import CertifiedMargin, Penalty
from jacobian_robust.training.module import RobustClassifier


def training_step(model: nn.Module, penalty: Penalty | None, batch: int) -> Callable[[], None]:
    """Return the framework's own step: its loss, its backward pass, the optimizer's step."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 1, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    module = RobustClassifier(copy.deepcopy(model), torch.optim.Adam, penalty)
    module.eta = 0.5
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0)

    def step() -> None:
        terms = module.loss_terms((images, labels))
        optimizer.zero_grad()
        module.backward(terms.loss)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    models = {
        "conv_small 16/32/128": ConvSmall(first=16, second=32, hidden=128),
        "conv_small 32/64/256": ConvSmall(),
        "lenet": LeNet(),
    }
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} processors, batch {arguments.batch}")
    for name, model in models.items():
        steps = [training_step(model, penalty, arguments.batch) for penalty in (None, CertifiedMargin(eps=0.1))]
        seconds: list[list[float]] = [[], []]
        for index in range(arguments.rounds + 5):
            for step, measured in zip(steps, seconds, strict=True):
                start = time.perf_counter()
                step()
                if index >= 5:
                    measured.append(time.perf_counter() - start)
        plain, bounded = map(statistics.median, seconds)
        print(f"{name}: plain {1e3 * plain:.2f} ms, with bounds {1e3 * bounded:.2f} ms, ratio {bounded / plain:.2f}")


if __name__ == "__main__":
    main()

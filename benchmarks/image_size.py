"""What the penalty costs from MNIST's shape to CIFAR-10's: ``python benchmarks/image_size.py``.

The framework's own steps on random images, batches of 32, a learning rate of zero: plain, with one probe and with the
exact norm. All take turns in one process; ratios are of medians, to the same network's plain step and to LeNet's on
1×28×28. No data set is needed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step_cost import DEVICE, Case, Step, frobenius, ours, take_turns
from torch import nn

from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.models import MLP, LeNet, ResNet18

WAYS = {"plain": None, "1 probe": frobenius(1), "exact": frobenius(None)}


def cases(batch: int = 32) -> dict[str, Case]:
    torch.manual_seed(0)
    networks: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {
        "LeNet, 1×28×28": (LeNet(), (1, 28, 28)),
        "LeNet, smooth, 1×28×28": (LeNet(activation="silu", pooling="average"), (1, 28, 28)),
        "LeNet, orthonormal, 1×28×28": (LeNet(orthogonal=True), (1, 28, 28)),
        "MLP, 1×28×28": (MLP(classes=10, inputs=784, width=128), (1, 28, 28)),
        "MLP, 3×32×32": (MLP(classes=10, inputs=3072, width=128), (3, 32, 32)),
        "LeNet, 3×32×32": (LeNet(channels=3, image_size=32), (3, 32, 32)),
        "ResNet-18, group norm, 3×32×32": (ResNet18(), (3, 32, 32)),
    }
    labels = torch.randint(0, 10, (batch,)).to(DEVICE)
    return {
        name: Case(model.to(DEVICE), torch.rand(batch, *shape, device=DEVICE), labels)
        for name, (model, shape) in networks.items()
    }


def measure(networks: dict[str, Case], seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds a step and its two ratios, by network and way."""
    steps: dict[str, tuple[Step, int]] = {
        f"{name}/{way}": (ours(case, penalty), 10 if isinstance(case.model, MLP) else 1)  # of a millisecond each
        for name, case in networks.items()
        for way, penalty in WAYS.items()
    }
    times = take_turns(steps, seconds)
    base = times[f"{next(iter(networks))}/plain"]
    return {
        name: {
            way: {"ms": ms, "to_plain": ms / times[f"{name}/plain"], "to_lenet": ms / base}
            for way in WAYS
            for ms in [times[f"{name}/{way}"]]
        }
        for name in networks
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="of all together; six turns at least")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    keep_freed_memory()  # as train.py does
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    results = measure(cases(), arguments.seconds)
    table = Table(title=f"ms a step of 32 images (/ plain), {machine}", title_justify="left")
    for column in ("", *WAYS, "plain / LeNet's"):
        table.add_column(column, justify="right" if column else "left")
    for name, ways in results.items():
        cells = [f"{way['ms']:.1f} (×{way['to_plain']:.2f})" for way in ways.values()]
        table.add_row(name, *cells, f"×{ways['plain']['to_lenet']:.1f}")
    Console().print(table)
    if arguments.json:
        written: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "steps": results}
        arguments.json.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

"""How near what the geometry predicts comes to the nearest ℓ2 adversarial example: ``python benchmarks/prediction.py``.

Each estimate of the radius is divided by the length that FAB found, over the correctly classified images of the
networks of ``docs/results/checkpoints``. The estimate and its settings are to be chosen by ``--split validation``,
images of the training set (on which the ``note_`` networks trained); ``--split test`` is for the report.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.robustness.budgets import predictions
from jacobian_robust.robustness.estimates import linearised_radius, path_radius, sampled_radius
from jacobian_robust.robustness.prediction import radii, smallest_perturbations

CHECKPOINTS = Path("docs/results/checkpoints")
ESTIMATES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "first_order": lambda model, images: radii(model, images).predicted,
    "path": path_radius,
    "sampled": sampled_radius,
    "linearised, 1 step": functools.partial(linearised_radius, steps=1),
    "linearised, 2 steps": functools.partial(linearised_radius, steps=2),
    "linearised, 3 steps": functools.partial(linearised_radius, steps=3),
    "linearised, 5 steps": functools.partial(linearised_radius, steps=5),
}


class Counted(nn.Module):
    """A model that counts its images' forward and backward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += len(images)
        logits: Tensor = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.passes += len(gradient)


def measured(
    name: str, data: str, split: Literal["validation", "test"], number: int, estimates: list[str]
) -> list[dict[str, Any]]:
    """Return a row of results for each estimate at one network."""
    checkpoint = load_checkpoint(CHECKPOINTS / f"{name}.safetensors")
    model = Counted(checkpoint.model().eval().requires_grad_(False))
    datamodule = MNISTDataModule(root=data, validation_size=5000)
    datamodule.setup("test" if split == "test" else "validate")
    images, labels = datamodule.split(split).first(number)
    correct = predictions(model, images) == labels
    images, labels = images[correct], labels[correct]
    model.passes, started = 0, time.perf_counter()
    found = smallest_perturbations(model, images, labels, torch.ones_like(labels, dtype=torch.bool)).length
    rows = [_row(name, "FAB", found, found, model.passes, time.perf_counter() - started)]
    for title in estimates:
        model.passes, started = 0, time.perf_counter()
        predicted = torch.cat([ESTIMATES[title](model, chunk) for chunk in images.split(50)])
        rows.append(_row(name, title, predicted, found, model.passes, time.perf_counter() - started))
    return rows


def _row(network: str, estimate: str, predicted: Tensor, found: Tensor, passes: int, seconds: float) -> dict[str, Any]:
    ratio = predicted / found
    return {
        "network": network,
        "estimate": estimate,
        "images": len(found),
        "within": float(((ratio >= 1 / 1.25) & (ratio <= 1.25)).double().mean()),
        "median": float(ratio.median()),
        "low": float(ratio.quantile(0.05)),
        "high": float(ratio.quantile(0.95)),
        "passes": passes / len(found),
        "seconds": seconds / len(found),
    }


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--images", type=int, default=300, help="the split's first, of which the correct ones count")
    parser.add_argument("--networks", nargs="+", default=["note_vanilla", "note_regularized", "linear_margin"])
    parser.add_argument("--estimates", nargs="+", choices=ESTIMATES, default=list(ESTIMATES))
    parser.add_argument("--data", default="data", help="the directory of MNIST")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table("network", "estimate", "images", "within 1.25", "median", "5%", "95%", "passes", "ms", title="/ FAB")
    results = []
    for name in arguments.networks:
        for row in measured(name, arguments.data, arguments.split, arguments.images, arguments.estimates):
            results.append(row)
            numbers = [f"{row['within']:.1%}", *(f"{row[key]:.2f}" for key in ("median", "low", "high"))]
            cost = [f"{row['passes']:.0f}", f"{1000 * row['seconds']:.1f}"]
            table.add_row(name, row["estimate"], str(row["images"]), *numbers, *cost)
            if arguments.out:
                arguments.out.write_text(json.dumps({"split": arguments.split, "rows": results}, indent=1) + "\n")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

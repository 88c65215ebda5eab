"""What the framework adds to a training step, and what loading adds: ``python benchmarks/train_overhead.py``.

Epochs of the framework (its LightningModule, callbacks, datamodule and progress bar, through Lightning's Trainer)
alternate in one process with the same number of steps of a bare PyTorch loop with the same arithmetic, mean loss and
accuracy of the epoch included, and the same DataLoader. The ratios are medians over the epochs. The first epoch warms
up and is not counted.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from jacobian_robust.data import MNISTDataModule
from jacobian_robust.memory import keep_freed_memory, rare_garbage_collection
from jacobian_robust.models import LeNet
from jacobian_robust.penalties import Frobenius
from jacobian_robust.training.build import trainer_arguments
from jacobian_robust.training.callbacks import EpochRecord, JacobianMonitor, ScheduledEta, TrainingProgress
from jacobian_robust.training.datamodule import LightningImages
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.schedules import GeometricEta

ETA = 0.002
PENALTIES = {
    "plain": None,
    "frobenius, 1 probe": Frobenius(delta_over_eps=1e-3, probes=1),
    "frobenius, exact": Frobenius(delta_over_eps=1e-3),
}


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


class AlternatingClassifier(RobustClassifier):
    """The framework's module, which after each epoch takes the same steps without the framework."""

    def __init__(self, penalty: Frobenius | None, datamodule: MNISTDataModule, steps: int) -> None:
        super().__init__(LeNet(), sgd, penalty)
        self.loader, self.steps = datamodule.train_dataloader(), steps
        self.unregistered = [LeNet()]
        self.seconds: list[float] = []

    def on_train_epoch_end(self) -> None:
        (model,), penalty = self.unregistered, self.penalty
        parameters = list(model.parameters())
        optimizer = sgd(parameters)
        start = time.perf_counter()
        total, correct = 0.0, 0
        for images, labels in itertools.islice(self.loader, self.steps):
            if penalty is None:
                logits = model(images)
                loss = nn.functional.cross_entropy(logits, labels)
            else:
                inputs = images.detach().requires_grad_()
                logits = model(inputs)
                alpha = penalty(logits, inputs, labels).mean()
                loss = (1 - ETA) * nn.functional.cross_entropy(logits, labels) + ETA * alpha
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            optimizer.step()
            total += loss.item() * len(labels)
            correct += int((logits.argmax(-1) == labels).sum())
        self.seconds.append(time.perf_counter() - start)


def measure(penalty: Frobenius | None, datamodule: MNISTDataModule, steps: int, epochs: int) -> dict[str, float]:
    module = AlternatingClassifier(penalty, datamodule, steps)
    with tempfile.TemporaryDirectory() as directory:
        record = EpochRecord(Path(directory) / "metrics.csv", [JacobianMonitor(0, eps=1.0, bound="center")])
        trainer = pl.Trainer(
            max_epochs=epochs,
            limit_train_batches=steps,
            limit_val_batches=0,
            accelerator="cpu",
            enable_checkpointing=False,
            **trainer_arguments(
                [ScheduledEta(GeometricEta(min=ETA, max=ETA)), record, TrainingProgress()], Path(directory)
            ),
        )
        with rare_garbage_collection():
            trainer.fit(module, datamodule=LightningImages(datamodule))
    start = time.perf_counter()
    for _ in itertools.islice(datamodule.train_dataloader(), steps):
        pass
    loading = time.perf_counter() - start
    framework = [row["seconds"] for row in record.rows]
    ratios = [a / b for a, b in zip(framework[1:], module.seconds[1:], strict=True)]
    return {
        "bare_ms": 1e3 * statistics.median(module.seconds[1:]) / steps,
        "framework_ms": 1e3 * statistics.median(framework[1:]) / steps,
        "ratio": statistics.median(ratios),
        "loading_share": loading / statistics.median(module.seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="steps of an epoch")
    parser.add_argument("--epochs", type=int, default=9, help="epochs, of which the first is not counted")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    keep_freed_memory()  # as train.py does
    datamodule = MNISTDataModule(validation_size=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    results = {}
    for name, penalty in PENALTIES.items():
        epochs = arguments.epochs if name != "frobenius, exact" else max(arguments.epochs // 4, 2)
        results[name] = measure(penalty, datamodule, arguments.steps, epochs)
    table = Table(title=f"A training step, LeNet, batch 32, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("", "bare loop, ms", "framework, ms", "ratio", "loading / bare step"):
        table.add_column(column, justify="left" if not column else "right")
    for name, r in results.items():
        cells = (f"{r['bare_ms']:.1f}", f"{r['framework_ms']:.1f}", f"{r['ratio']:.3f}", f"{r['loading_share']:.2%}")
        table.add_row(name, *cells)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""The record of the epochs, ``metrics.csv``."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from jacobian_robust.files import write_atomically
from jacobian_robust.training.callbacks.monitors import Monitor
from jacobian_robust.training.callbacks.scheduled import ScheduledEps
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.options import COLUMNS, METRICS, OPTIONAL


class EpochRecord(pl.Callback):
    """Writes ``metrics.csv``, one row an epoch, and hands the same numbers to the loggers.

    ``lr`` is the learning rate of the epoch's last step.
    ``seconds`` is the time of the epoch's training steps, without validation and measurements. ``skipped_steps`` counts
    those, since the beginning, whose loss or gradient was not finite. ``multiplier`` is the classes' mean, of a penalty
    that is a constraint.

    The rows travel in the checkpoints, so that a resumed run's table and curves begin at epoch 1.

    Args:
        path: the file.
        monitors: whose measurements join the row.
        schedule: of the radius ``ε``, whose share in the epoch's last step joins it too.

    """

    def __init__(self, path: Path, monitors: Sequence[Monitor], schedule: ScheduledEps | None = None) -> None:
        self.path = path
        self.monitors = monitors
        self.schedule = schedule
        self.rows: list[dict[str, float | int]] = []
        self._epoch_started = self._last_batch_ended = 0.0
        self._spent = self._validation_started = 0.0
        self._lr = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, and the seconds spent on the epoch so far."""
        return {"rows": self.rows, "seconds": time.perf_counter() - self._epoch_started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows and the seconds."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._spent = state_dict.get("seconds", 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the clock, for a run that is resumed within an epoch."""
        self._epoch_started = time.perf_counter() - self._spent

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._epoch_started = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the learning rate: at the end of the epoch the next one's is set."""
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop the clock after the last batch, before validation; any may be the last, as with max_steps."""
        if trainer.is_last_batch and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._last_batch_ended = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note when a validation begins."""
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a validation within the epoch out of the time of its steps."""
        if not trainer.is_last_batch:
            self._epoch_started += time.perf_counter() - self._validation_started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete a row."""
        assert isinstance(pl_module, RobustClassifier)
        row: dict[str, float | int] = {"epoch": trainer.current_epoch + 1, "eta": pl_module.eta, "lr": self._lr}
        if self.schedule is not None:
            row["eps_share"] = self.schedule.latest
        if pl_module.penalty is not None and (multiplier := pl_module.penalty.multiplier) is not None:
            row["multiplier"] = multiplier
        stages: tuple[Literal["train", "validation"], ...] = ("train", "validation")
        for stage in stages:
            measured = pl_module.pop_means(stage)
            for monitor in self.monitors:
                measured |= monitor.latest.get(stage, {})
            row |= {f"{stage}_{name}": measured[name] for name in METRICS if name in measured}
        row["skipped_steps"] = pl_module.nonfinite.skipped
        row["seconds"] = round(self._last_batch_ended - self._epoch_started, 3)
        self.rows.append(row)
        pl_module.log_dict({name.replace("_", "/", 1): float(value) for name, value in row.items()})
        if trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        columns = [name for name in COLUMNS if name not in OPTIONAL or name in self.rows[-1]]
        with write_atomically(self.path) as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

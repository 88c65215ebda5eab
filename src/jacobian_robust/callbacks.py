"""Lightning callbacks: the schedule of η, the measurement of the Jacobian, the record of the epochs."""

import abc
import csv
import time
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically
from jacobian_robust.jacobian import jacobian_norms
from jacobian_robust.module import RobustClassifier
from jacobian_robust.regularizers import Bound, satisfies_condition

__all__ = [
    "METRICS",
    "ConstantEta",
    "EpochRecord",
    "EtaSchedule",
    "GeometricEta",
    "JacobianMonitor",
    "TrainingProgress",
]

METRICS = ("loss", "cross_entropy", "penalty", "accuracy", "jacobian_norm", "condition_satisfied")
"""What is recorded of each split in each epoch."""


_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class EtaSchedule(pl.Callback, abc.ABC):
    """Sets the weight ``η`` of the penalty at the start of each epoch.

    A schedule is a pure function of the epoch: a resumed run has the right ``η`` without any state.
    """

    @abc.abstractmethod
    def eta(self, epoch: int, epochs: int) -> float:
        """Return ``η`` for ``epoch``, counted from 0, of ``epochs``."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the module's ``η``, for a run that is resumed within an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the module's ``η``."""
        assert trainer.max_epochs is not None
        assert isinstance(pl_module, RobustClassifier)
        pl_module.eta = self.eta(trainer.current_epoch, trainer.max_epochs)


@dataclass(eq=False, config=_STRICT, kw_only=True)
class GeometricEta(EtaSchedule):
    """The note's rule, ``η_i = η_min (η_max / η_min)^((i-1)/(N-1))`` for epoch ``i`` of ``N`` (section 4.2).

    With one epoch ``η`` is ``min``.

    Args:
        min: ``η`` of the first epoch, in (0, 1].
        max: ``η`` of the last epoch, at least ``min``, at most 1.

    Raises:
        UserError: if ``min`` is larger than ``max``.
    """

    min: float = Field(gt=0, le=1)
    max: float = Field(gt=0, le=1)

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise UserError(f"min={self.min} is larger than max={self.max}; give min ≤ max")

    def eta(self, epoch: int, epochs: int) -> float:
        """Return ``η`` for ``epoch``, counted from 0, of ``epochs``."""
        progress = epoch / (epochs - 1) if epochs > 1 else 0.0
        return self.min * (self.max / self.min) ** progress


@dataclass(eq=False, config=_STRICT, kw_only=True)
class ConstantEta(EtaSchedule):
    """The same ``η`` in every epoch.

    Args:
        value: ``η``, in [0, 1].
    """

    value: float = Field(ge=0, le=1)

    def eta(self, epoch: int, epochs: int) -> float:
        """Return ``η`` for ``epoch``, counted from 0, of ``epochs``."""
        return self.value


class JacobianMonitor(pl.Callback):
    """Measures the Jacobian at the end of each epoch, exactly, the same way for every penalty and for none.

    On the first images of the training and of the validation split, with the model in evaluation mode: the mean
    ``‖J_μ‖_F``, and the share of images that satisfy eq. 14, ``‖J_μ‖₂ ≤ d/ε``.

    Args:
        images: how many images of each split; 0 measures nothing.
        eps: the radius ``ε`` of eq. 14.
        bound: the distance ``d`` of eq. 14.
    """

    def __init__(self, images: int, *, eps: float, bound: Bound) -> None:
        self.images = images
        self.eps = eps
        self.bound: Bound = bound
        self.latest: dict[str, dict[str, float]] = {}

    def measure(self, model: torch.nn.Module, images: Tensor) -> dict[str, float]:
        """Return the mean norm and the share of satisfied conditions over images ``(n, …)``."""
        norm_sum, satisfied = 0.0, 0
        dtype = next((parameter.dtype for parameter in model.parameters()), images.dtype)
        for chunk in images.split(50):
            inputs = chunk.to(dtype).requires_grad_()
            with torch.enable_grad():
                logits = model(inputs)
                frobenius, spectral = jacobian_norms(logits, inputs)
            norm_sum += frobenius.sum().item()
            satisfied += int(satisfies_condition(spectral, logits, bound=self.bound, eps=self.eps).sum())
        return {"jacobian_norm": norm_sum / len(images), "condition_satisfied": satisfied / len(images)}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure both splits."""
        assert isinstance(pl_module, RobustClassifier)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        training = pl_module.training
        pl_module.eval()
        splits = {"train": "train", "validation": datamodule.validation_name}
        for stage, split in splits.items():
            images, _ = datamodule.split(split).first(self.images)
            if len(images):
                self.latest[stage] = self.measure(pl_module.model, images.to(pl_module.device))
        pl_module.train(training)


class EpochRecord(pl.Callback):
    """Writes ``metrics.csv``, one row an epoch, and hands the same numbers to the loggers.

    ``lr`` is the learning rate of the epoch's last step.
    ``seconds`` is the time of the epoch's training steps, without validation and measurements. ``skipped_steps`` counts
    those, since the beginning, whose loss or gradient was not finite.

    The rows travel in the checkpoints, so that a resumed run's table and curves begin at epoch 1.

    Args:
        path: the file.
        monitor: whose measurements join the row.

    """

    def __init__(self, path: Path, monitor: JacobianMonitor) -> None:
        self.path = path
        self.monitor = monitor
        self.rows: list[dict[str, float | int]] = []
        self._epoch_started = self._last_batch_ended = 0.0
        self._spent = 0.0
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
        """Stop the clock after the last batch, before validation."""
        if trainer.is_last_batch:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._last_batch_ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete a row."""
        assert isinstance(pl_module, RobustClassifier)
        row: dict[str, float | int] = {"epoch": trainer.current_epoch + 1, "eta": pl_module.eta, "lr": self._lr}
        stages: tuple[Literal["train", "validation"], ...] = ("train", "validation")
        for stage in stages:
            measured = pl_module.pop_means(stage) | self.monitor.latest.get(stage, {})
            row |= {f"{stage}_{name}": measured[name] for name in METRICS if name in measured}
        row["skipped_steps"] = pl_module.skipped_steps
        row["seconds"] = round(self._last_batch_ended - self._epoch_started, 3)
        self.rows.append(row)
        pl_module.log_dict({name.replace("_", "/", 1): float(value) for name, value in row.items()})
        if trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        columns = ["epoch", "eta", "lr", *(f"{stage}_{name}" for stage in ("train", "validation") for name in METRICS)]
        columns += ["skipped_steps", "seconds"]
        with write_atomically(self.path) as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


class TrainingProgress(TQDMProgressBar):
    """Lightning's progress bar: the epoch's means so far, and the time left to the end of the training."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=50)
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        assert isinstance(pl_module, RobustClassifier)
        metrics |= {
            name: f"{value:.3f}" for name, value in pl_module.means("train").items() if name in ("loss", "accuracy")
        }
        done = trainer.global_step - self._first_step
        if done:
            left = (trainer.estimated_stepping_batches - trainer.global_step) / done
            metrics["all_done_in"] = tqdm.format_interval(int(left * (time.monotonic() - self._started)))
        return metrics

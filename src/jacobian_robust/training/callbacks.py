"""Lightning callbacks: the schedule of η, the measurement of the Jacobian, the record of the epochs."""

import abc
import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import Tensor, nn
from tqdm import tqdm

from jacobian_robust.attacks import Attack
from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically
from jacobian_robust.jacobian import jacobian_norms
from jacobian_robust.options import STRICT
from jacobian_robust.penalties import Bound, Penalty, satisfies_condition
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.training.averaging import MovingAverage
from jacobian_robust.training.distributed import gathered
from jacobian_robust.training.module import RobustClassifier

__all__ = [
    "METRICS",
    "AttackMonitor",
    "ConstantEta",
    "EpochRecord",
    "EpsSchedule",
    "EtaSchedule",
    "GeometricEps",
    "GeometricEta",
    "JacobianMonitor",
    "LinearEps",
    "Monitor",
    "TrainingProgress",
]

METRICS = (
    *("loss", "cross_entropy", "penalty", "accuracy"),
    *("jacobian_norm", "condition_satisfied", "robust_accuracy"),
)
"""What is recorded of each split in each epoch."""

SCHEDULED = ("eps_share", "multiplier")
"""What is recorded of an epoch where there is such a thing."""

COLUMNS = (
    *("epoch", "eta", "lr", *SCHEDULED, *(f"{stage}_{name}" for stage in ("train", "validation") for name in METRICS)),
    *("skipped_steps", "seconds"),
)
"""Of ``metrics.csv``."""


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


@dataclass(eq=False, config=STRICT, kw_only=True)
class GeometricEta(EtaSchedule):
    """The note's rule, ``η_i = η_min (η_max / η_min)^((i-1)/(N-1))`` for epoch ``i`` of ``N`` (section 4.2).

    With one epoch ``η`` is ``min``.

    Args:
        min: ``η`` of the first epoch, positive, at most 1.
        max: ``η`` of the last epoch, at least ``min``, at most 1.

    Raises:
        UserError: if ``min`` is larger than ``max``.
    """

    min: float = Field(ge=1e-30, le=1)
    max: float = Field(ge=1e-30, le=1)

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise UserError(f"min={self.min} is larger than max={self.max}; give min ≤ max")

    def eta(self, epoch: int, epochs: int) -> float:
        """Return ``η`` for ``epoch``, counted from 0, of ``epochs``."""
        progress = epoch / (epochs - 1) if epochs > 1 else 0.0
        return self.min * (self.max / self.min) ** progress


@dataclass(eq=False, config=STRICT, kw_only=True)
class ConstantEta(EtaSchedule):
    """The same ``η`` in every epoch.

    Args:
        value: ``η``, in [0, 1].
    """

    value: float = Field(ge=0, le=1)

    def eta(self, epoch: int, epochs: int) -> float:
        """Return ``η`` for ``epoch``, counted from 0, of ``epochs``."""
        return self.value


@dataclass(eq=False, config=STRICT, kw_only=True)
class EpsSchedule(pl.Callback, abc.ABC):
    """Lets the radius ``ε`` of the penalty rise over the first steps, to the penalty's own.

    A large radius from the first step on can stall the cross-entropy: nothing is classified yet that could be kept away
    from the boundary. (Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust
    models", 2018, raise theirs linearly.) A schedule is a pure function of the step: a resumed run has the right ``ε``
    without any state.

    Args:
        start: share of ``ε`` in the first step, in (0, 1].
        fraction: of the training's steps, after which ``ε`` is the penalty's own, in (0, 1].

    Attributes:
        latest: the share of the last step.
    """

    start: float = Field(gt=0, le=1)
    fraction: float = Field(gt=0, le=1)

    def __post_init__(self) -> None:
        self._whole: Penalty | None = None
        self._rise = 0.0
        self.latest = 1.0

    @abc.abstractmethod
    def share(self, progress: float) -> float:
        """Return the share of ``ε`` at ``progress`` of the rise, in [0, 1]; it is ``start`` at 0 and 1 at 1."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the penalty as it is configured."""
        assert isinstance(pl_module, RobustClassifier)
        self._whole = pl_module.penalty
        self._rise = self.fraction * trainer.estimated_stepping_batches

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the radius of the module's penalty."""
        assert isinstance(pl_module, RobustClassifier)
        assert self._whole is not None
        share = self.share(min(trainer.global_step / self._rise, 1.0))
        if share != self.latest:
            self.latest = share
            pl_module.penalty = self._whole.with_radius(share)


@dataclass(eq=False, config=STRICT, kw_only=True)
class LinearEps(EpsSchedule):
    """A rise by equal steps."""

    def share(self, progress: float) -> float:
        """Return the share of ``ε``."""
        return self.start + (1 - self.start) * progress


@dataclass(eq=False, config=STRICT, kw_only=True)
class GeometricEps(EpsSchedule):
    """A rise by equal ratios."""

    def share(self, progress: float) -> float:
        """Return the share of ``ε``."""
        return float(self.start ** (1 - progress))


class Monitor(pl.Callback, abc.ABC):
    """Measures a network at the end of each epoch, in evaluation mode, on the first images of the two splits.

    Args:
        images: how many images of each split; 0 measures nothing.

    Attributes:
        average: of the weights, measured instead of those of the last step, if there is one.
        latest: what was measured last, by split.
    """

    average: MovingAverage | None = None

    def __init__(self, images: int) -> None:
        self.images = images
        self.latest: dict[str, dict[str, float]] = {}

    @abc.abstractmethod
    def measure(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, process: int = 0, of: int = 1
    ) -> dict[str, float]:
        """Return what is measured on images ``(n, …)`` and their labels ``(n,)``, by its name in :data:`METRICS`.

        Of several processes that call this each can measure a part; what they return is the same, and what one would.
        """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure both splits."""
        assert isinstance(pl_module, RobustClassifier)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        training = pl_module.training
        pl_module.eval()
        model = pl_module.model if self.average is None else self.average.model
        splits = {"train": "train", "validation": datamodule.validation_name}
        for stage, split in splits.items():
            images, labels = datamodule.split(split).first(self.images)
            if len(images):
                images, labels = images.to(pl_module.device), labels.to(pl_module.device)
                self.latest[stage] = self.measure(
                    model, images, labels, process=trainer.global_rank, of=trainer.world_size
                )
        pl_module.train(training)


class JacobianMonitor(Monitor):
    """Measures the Jacobian, exactly, the same way for every penalty and for none.

    The mean ``‖J_μ‖_F``, and the share of images that satisfy eq. 14, ``‖J_μ‖₂ ≤ d/ε``.

    Args:
        images: how many images of each split; 0 measures nothing.
        eps: the radius ``ε`` of eq. 14.
        bound: the distance ``d`` of eq. 14.
    """

    def __init__(self, images: int, *, eps: float, bound: Bound) -> None:
        super().__init__(images)
        self.eps = eps
        self.bound: Bound = bound

    def state_dict(self) -> dict[str, Any]:
        """Return the condition: without it nobody could say what the rows of the checkpoint were measured with."""
        return {"eps": self.eps, "bound": self.bound}

    def measure(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, process: int = 0, of: int = 1
    ) -> dict[str, float]:
        """Return the mean norm and the share of satisfied conditions."""
        dtype = next((parameter.dtype for parameter in model.parameters()), images.dtype)
        measured: dict[int, tuple[float, int]] = {}
        for number, chunk in list(enumerate(images.split(50)))[process::of]:
            inputs = chunk.to(dtype).requires_grad_()
            with torch.enable_grad():
                logits = model(inputs)
                frobenius, spectral = jacobian_norms(logits, inputs)
            satisfied = satisfies_condition(spectral, logits, bound=self.bound, eps=self.eps)
            measured[number] = frobenius.sum().item(), int(satisfied.sum())
        if of > 1:
            measured = {number: value for part in gathered(measured) for number, value in part.items()}
        in_order = [measured[number] for number in sorted(measured)]
        norm_sum, holds = sum(norm for norm, _ in in_order), sum(count for _, count in in_order)
        return {"jacobian_norm": norm_sum / len(images), "condition_satisfied": holds / len(images)}


class AttackMonitor(Monitor):
    """Attacks at one budget, with the same starts in each epoch; torch's global random stream is left as it was.

    Args:
        images: how many images of each split; 0 measures nothing.
        attack: the attack; its first budget is taken.
    """

    def __init__(self, images: int, attack: Attack) -> None:
        super().__init__(images)
        self.attack = replace(attack, eps=attack.eps[:1])

    def measure(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, process: int = 0, of: int = 1
    ) -> dict[str, float]:
        """Return the share of all images that stand; each process attacks them all."""
        with torch.enable_grad():
            (budget,) = sweep(model, images, labels, [self.attack], examples=0).budgets
        return {"robust_accuracy": budget.robust_accuracy}


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

    def __init__(self, path: Path, monitors: Sequence[Monitor], schedule: EpsSchedule | None = None) -> None:
        self.path = path
        self.monitors = monitors
        self.schedule = schedule
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
        row["skipped_steps"] = pl_module.skipped_steps
        row["seconds"] = round(self._last_batch_ended - self._epoch_started, 3)
        self.rows.append(row)
        pl_module.log_dict({name.replace("_", "/", 1): float(value) for name, value in row.items()})
        if trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        columns = [name for name in COLUMNS if name not in SCHEDULED or name in self.rows[-1]]
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

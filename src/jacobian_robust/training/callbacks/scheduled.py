"""What sets the penalty's weight and radius, and the learning rate, to what their schedules say."""

from typing import Any

import pytorch_lightning as pl

from jacobian_robust.penalties import Penalty
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.schedules import EpsSchedule, EtaSchedule, Schedule


class ScheduledEta(pl.Callback):
    """Sets the module's ``η`` at the start of each epoch, or before each step."""

    def __init__(self, schedule: EtaSchedule) -> None:
        self.schedule = schedule

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set ``η``, for a run that is resumed within an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set ``η``."""
        assert trainer.max_epochs is not None
        assert isinstance(pl_module, RobustClassifier)
        pl_module.eta = self.schedule.eta(trainer.current_epoch, trainer.max_epochs)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set ``η`` if the schedule does so before each step."""
        if self.schedule.each_step:
            assert trainer.max_epochs is not None
            assert isinstance(pl_module, RobustClassifier)
            progress = trainer.global_step / trainer.estimated_stepping_batches
            pl_module.eta = self.schedule.eta(progress * trainer.max_epochs, trainer.max_epochs)


class ScheduledEps(pl.Callback):
    """Sets the radius of the module's penalty before each step.

    Attributes:
        latest: the share of the last step.
    """

    def __init__(self, schedule: EpsSchedule) -> None:
        self.schedule = schedule
        self.latest = 1.0
        self._whole: Penalty | None = None
        self._rise = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the penalty as it is configured."""
        assert isinstance(pl_module, RobustClassifier)
        self._whole = pl_module.penalty
        self._rise = self.schedule.fraction * trainer.estimated_stepping_batches

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the radius."""
        assert isinstance(pl_module, RobustClassifier)
        assert self._whole is not None
        share = self.schedule.share(min(trainer.global_step / self._rise, 1.0))
        if share != self.latest:
            self.latest = share
            pl_module.penalty = self._whole.with_radius(share)


class ScheduledRate(pl.Callback):
    """Sets the learning rate before each step."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Set the rate."""
        factor = self.schedule.factor(trainer.global_step / trainer.estimated_stepping_batches)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]

"""Schedules of the penalty's weight ``η``."""

import abc

import pytorch_lightning as pl
from pydantic import Field
from pydantic.dataclasses import dataclass

from jacobian_robust.errors import UserError
from jacobian_robust.options import STRICT
from jacobian_robust.training.module import RobustClassifier


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

"""Schedules of the penalty's radius ``ε``."""

import abc
from typing import Any

import pytorch_lightning as pl
from pydantic import Field
from pydantic.dataclasses import dataclass

from jacobian_robust.options import STRICT
from jacobian_robust.penalties import Penalty
from jacobian_robust.training.module import RobustClassifier


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

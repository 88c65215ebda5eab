"""Schedules of the learning rate: what the optimizer's own is multiplied by, as the training goes on."""

import abc
import bisect
import math
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from jacobian_robust.options import STRICT

__all__ = ["Cosine", "MultiStep", "OneCycle", "Schedule"]

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(pl.Callback, abc.ABC):
    """Sets the learning rate before each step, to a share of the optimizer's own.

    A schedule is a pure function of the training's progress: a resumed run has the right rate without any state, and a
    lengthened one that of the longer training. torch's own keep the length they began with, and Lightning needs the
    number of steps for them so early that it forgets where in the epoch a resumed run stands.
    """

    @abc.abstractmethod
    def factor(self, progress: float) -> float:
        """Return the share in the step before which ``progress`` of all steps, in [0, 1), have been taken."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Set the rate."""
        factor = self.factor(trainer.global_step / trainer.estimated_stepping_batches)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]


def _between(start: float, end: float, progress: float) -> float:
    """Return where half a cosine from ``start`` to ``end`` is."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(eq=False, config=STRICT, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from one down to ``final`` (Loshchilov & Hutter, 2017, without restarts), after a linear warm-up.

    Args:
        warmup: share of the steps in which the rate rises from ``initial``, in [0, 1).
        initial: where the warm-up begins.
        final: where the cosine ends.
    """

    warmup: float = Field(default=0.0, ge=0, lt=1)
    initial: Share = 0.01
    final: Share = 0.0

    def factor(self, progress: float) -> float:
        """Return the share of the optimizer's rate."""
        if progress < self.warmup:
            return self.initial + (1 - self.initial) * progress / self.warmup
        return _between(1.0, self.final, (progress - self.warmup) / (1 - self.warmup))


@dataclass(eq=False, config=STRICT, kw_only=True)
class OneCycle(Schedule):
    """Half a cosine up and one down, as torch's ``OneCycleLR`` (Smith & Topin, 2018); the momentum stays as it is.

    Args:
        rise: share of the steps until the rate is the optimizer's, in (0, 1).
        initial: where it begins.
        final: where it ends.
    """

    rise: float = Field(default=0.3, gt=0, lt=1)
    initial: Share = 0.04
    final: Share = 4e-6

    def factor(self, progress: float) -> float:
        """Return the share of the optimizer's rate."""
        if progress < self.rise:
            return _between(self.initial, 1.0, progress / self.rise)
        return _between(1.0, self.final, (progress - self.rise) / (1 - self.rise))


def _ascending(milestones: list[float]) -> list[float]:
    if milestones != sorted(set(milestones)):
        raise ValueError("give the milestones in ascending order, each once")
    return milestones


@dataclass(eq=False, config=STRICT, kw_only=True)
class MultiStep(Schedule):
    """A rate that is multiplied by ``gamma`` at each milestone.

    Args:
        milestones: shares of the steps, in (0, 1), ascending.
        gamma: the factor.
    """

    milestones: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1), AfterValidator(_ascending)]
    gamma: float = Field(default=0.1, gt=0)

    def factor(self, progress: float) -> float:
        """Return the share of the optimizer's rate."""
        return self.gamma ** bisect.bisect_right(self.milestones, progress)

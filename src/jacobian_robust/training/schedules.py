"""Schedules: the penalty's weight ``η`` and radius ``ε``, and the learning rate, as functions of the progress.

A schedule keeps no state: a resumed run has the right value, and a lengthened one that of the longer training. This
module does without Lightning, whose import takes seconds: a wrong option is refused before it.
:mod:`jacobian_robust.training.callbacks.scheduled` sets what the schedules say.
"""

import abc
import bisect
import math
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from jacobian_robust.errors import UserError
from jacobian_robust.options import STRICT

__all__ = [
    "ConstantEta",
    "Cosine",
    "EpsSchedule",
    "EtaSchedule",
    "GeometricEps",
    "GeometricEta",
    "LinearEps",
    "LinearEta",
    "MultiStep",
    "OneCycle",
    "Schedule",
]

Share = Annotated[float, Field(ge=0, le=1)]


class EtaSchedule(abc.ABC):
    """The weight ``η`` of the penalty in each epoch, or in each step.

    Attributes:
        each_step: ``η`` is set before each step, with a fraction of an epoch; not at the start of an epoch alone.
    """

    each_step: ClassVar[bool] = False

    @abc.abstractmethod
    def eta(self, epoch: int | float, epochs: int) -> float:
        """Return ``η`` for ``epoch``, counted from 0, of ``epochs``."""


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

    def eta(self, epoch: int | float, epochs: int) -> float:
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

    def eta(self, epoch: int | float, epochs: int) -> float:
        """Return ``η`` for ``epoch``, counted from 0, of ``epochs``."""
        return self.value


@dataclass(eq=False, config=STRICT, kw_only=True)
class LinearEta(EtaSchedule):
    """A rise by equal steps, to ``max`` after a ``fraction`` of the training.

    Args:
        min: ``η`` of the first step, in [0, 1].
        max: ``η`` after the rise, in [0, 1].
        fraction: of the training's steps, after which ``η`` is ``max``, in (0, 1].
    """

    each_step: ClassVar[bool] = True

    min: float = Field(ge=0, le=1)
    max: float = Field(ge=0, le=1)
    fraction: float = Field(gt=0, le=1)

    def eta(self, epoch: int | float, epochs: int) -> float:
        """Return ``η`` after ``epoch`` of ``epochs``."""
        risen = min(epoch / (self.fraction * epochs), 1.0)
        return (1 - risen) * self.min + risen * self.max


@dataclass(eq=False, config=STRICT, kw_only=True)
class EpsSchedule(abc.ABC):
    """Lets the radius ``ε`` of the penalty rise over the first steps, to the penalty's own.

    A large radius from the first step on can stall the cross-entropy: nothing is classified yet that could be kept away
    from the boundary. (Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust
    models", 2018, raise theirs linearly.)

    Args:
        start: share of ``ε`` in the first step, in (0, 1].
        fraction: of the training's steps, after which ``ε`` is the penalty's own, in (0, 1].
    """

    start: float = Field(gt=0, le=1)
    fraction: float = Field(gt=0, le=1)

    @abc.abstractmethod
    def share(self, progress: float) -> float:
        """Return the share of ``ε`` at ``progress`` of the rise, in [0, 1]; it is ``start`` at 0 and 1 at 1."""


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


class Schedule(abc.ABC):
    """The learning rate of each step, as a share of the optimizer's own.

    torch's own schedules keep the length they began with, and Lightning needs the number of steps for them so early
    that it forgets where in the epoch a resumed run stands.
    """

    @abc.abstractmethod
    def factor(self, progress: float) -> float:
        """Return the share in the step before which ``progress`` of all steps, in [0, 1), have been taken."""


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

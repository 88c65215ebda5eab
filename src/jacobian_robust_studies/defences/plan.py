"""What the study trains and attacks: ``conf/defences.yaml``, and the options of the commands that follow from it."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from jacobian_robust.errors import UserError, describe

__all__ = ["Evaluation", "Method", "Plan", "Trial", "best", "choice", "fingerprint", "read_plan"]


class Method(BaseModel, extra="forbid"):
    """A method of the study."""

    options: list[str]  # of train.py, that choose it
    tune: dict[str, list[float | int | str]] = {}  # values to try of further options, in all combinations
    as_tuned: str | None = None  # instead of tune: the method whose best values it takes
    cost: PositiveFloat  # of a training step, in plain steps
    budget: PositiveFloat = 1.0  # of its training, relative to the other methods'
    finalist: bool = False  # trained with every seed, not with the first alone
    adversarial: bool = False  # trains on adversarial examples


class Evaluation(BaseModel, extra="forbid"):
    """An evaluation of the trained methods."""

    options: list[str]  # of evaluate.py
    first_seed_alone: bool = False  # leave out the models of the other seeds


@dataclass(frozen=True)
class Trial:
    """A trial of a method; its figures are nan if the training failed."""

    overrides: tuple[str, ...]  # the values of the tuned options, as option=value
    clean: float  # accuracy on the validation images
    robust: float  # the objective

    @property
    def finished(self) -> bool:
        """Whether the training did not fail."""
        return not math.isnan(self.clean)


class Plan(BaseModel, extra="forbid"):
    """The study, as conf/defences.yaml states it."""

    options: list[str]
    batches: PositiveInt
    trial_epochs: PositiveInt
    epochs: PositiveInt
    seeds: list[int] = Field(min_length=1)
    trials: PositiveInt
    tuning: list[str]
    objective: str
    clean: float = Field(ge=0, le=1)
    evaluations: dict[str, Evaluation] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _fair(self) -> "Plan":
        for name, method in self.methods.items():
            if method.as_tuned is not None:
                if method.tune or not (base := self.methods.get(method.as_tuned)) or base.as_tuned:
                    raise ValueError(f"methods.{name}.as_tuned: names a method that is tuned, and goes without tune")
            elif (trials := math.prod(map(len, method.tune.values()))) != self.trials:
                raise ValueError(f"methods.{name}.tune: {trials} combinations, where every method has {self.trials}")
        return self

    def seeds_of(self, name: str) -> list[int]:
        """Return the seeds of a method's trainings."""
        return self.seeds if self.methods[name].finalist else self.seeds[:1]

    def epochs_of(self, name: str) -> int:
        """Return the epochs of a method's trainings."""
        return round(self.methods[name].budget * self.epochs)

    def steps_of(self, name: str) -> int:
        """Return the steps of an epoch of a method."""
        return round(self.batches / self.methods[name].cost)

    def tuning_options(self, name: str) -> list[str]:
        """Return the options of ``train.py -m`` for all trials of a method."""
        judged = ["evaluate=true", "split=validation", "sanity_images=0", "geometry_images=0", "reliability=false"]
        grid = [f"{option}={','.join(map(str, values))}" for option, values in self.methods[name].tune.items()]
        return [*self._options(name, self.trial_epochs), *judged, *self.tuning, *grid, "seed=100"]

    def training_options(self, name: str, chosen: Trial, seeds: Sequence[int]) -> list[str]:
        """Return the options of ``train.py -m`` for a method's trainings with the values of a trial."""
        return [*self._options(name, self.epochs_of(name)), *chosen.overrides, f"seed={','.join(map(str, seeds))}"]

    def _options(self, name: str, epochs: int) -> list[str]:
        length = [f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={self.steps_of(name)}"]
        return [*self.options, *self.methods[name].options, *length, "logger=csv"]


def read_plan(path: Path) -> Plan:
    """Return the plan of a YAML file.

    Raises:
        UserError: if it cannot be read as one.
    """
    try:
        stated = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # of the file system, of YAML and of OmegaConf
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return Plan.model_validate(stated)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from error


def best(trials: Sequence[Trial], clean: float) -> Trial | None:
    """Return the most robust of the trials that are accurate enough, else the most accurate; None if all failed."""
    finished = [trial for trial in trials if trial.finished]
    accurate = [trial for trial in finished if trial.clean >= clean]
    if accurate:
        return max(accurate, key=lambda trial: trial.robust)
    return max(finished, key=lambda trial: trial.clean, default=None)


def choice(plan: Plan, name: str, trials: Mapping[str, Sequence[Trial]]) -> Trial | None:
    """Return the trial whose values a method is trained with, its own best or another method's; None without one."""
    return best(trials.get(plan.methods[name].as_tuned or name, []), plan.clean)


def fingerprint(options: Sequence[str]) -> str:
    """Return a short text that differs for other options."""
    return hashlib.sha256(" ".join(options).encode()).hexdigest()[:8]

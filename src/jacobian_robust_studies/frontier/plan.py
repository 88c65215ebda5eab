"""What the study trains and attacks: ``conf/frontier.yaml``, and the options of the commands that follow from it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from jacobian_robust.errors import UserError, describe

__all__ = ["Cell", "Grid", "Method", "Plan", "Published", "fingerprint", "read_plan"]

UNDEFENDED = "undefended"
"""The method whose accuracy the others' least accuracy is relative to."""


@dataclass(frozen=True)
class Cell:
    """A training of a grid: a method at a strength, a length in plain epochs and a seed."""

    method: str
    strength: str  # of the method's option; empty where it has none
    length: int
    seed: int


class Method(BaseModel, extra="forbid"):
    """A method of the study."""

    options: list[str]  # of train.py, that choose it
    strength: str | None = None  # the further option that the grids vary
    cost: PositiveFloat  # of a training step, in plain steps
    adversarial: bool = False  # trains on adversarial examples


class Published(BaseModel, extra="forbid"):
    """A point of the literature, for the picture."""

    label: str
    eps: PositiveFloat  # ℓ∞ budget
    clean: float = Field(ge=0, le=1)
    robust: float = Field(ge=0, le=1)


class Grid(BaseModel, extra="forbid"):
    """Strengths × lengths × seeds of some methods on one model and data set."""

    options: list[str]  # of every training
    batches: PositiveInt  # training batches of a plain epoch
    lengths: list[PositiveInt] = Field(min_length=1)  # in plain epochs
    seeds: list[int] = Field(min_length=1)
    validation: list[str]  # options of the attack on validation images
    test: list[str]  # options of evaluate.py for the chosen networks
    methods: dict[str, list[float | int]]  # strengths by method; [] for a method that has none


class Plan(BaseModel, extra="forbid"):
    """The study, as conf/frontier.yaml states it."""

    eps: PositiveFloat  # ℓ∞ budget at which a strength is chosen
    clean_loss: float = Field(ge=0, le=1)  # accuracy below the undefended twin's that a chosen strength may have
    methods: dict[str, Method]
    grids: dict[str, Grid] = Field(min_length=1)
    published: list[Published] = []

    @model_validator(mode="after")
    def _complete(self) -> "Plan":
        for name, grid in self.grids.items():
            if UNDEFENDED not in grid.methods:
                raise ValueError(f"grids.{name}.methods: lacks {UNDEFENDED}, to which the others' accuracy is relative")
            for method, strengths in grid.methods.items():
                if method not in self.methods:
                    raise ValueError(f"grids.{name}.methods.{method}: not among methods")
                if bool(strengths) != (self.methods[method].strength is not None):
                    raise ValueError(f"grids.{name}.methods.{method}: values, if and only if the method has a strength")
        return self

    def cells(self, grid: str, method: str, length: int) -> list[Cell]:
        """Return the trainings of a method of one length, the first seed's first."""
        strengths = [f"{value:g}" for value in self.grids[grid].methods[method]] or [""]
        return [Cell(method, strength, length, seed) for seed in self.grids[grid].seeds for strength in strengths]

    def steps_of(self, grid: str, method: str) -> int:
        """Return the steps of an epoch of a method: as many as cost what a plain epoch does."""
        return max(1, round(self.grids[grid].batches / self.methods[method].cost))

    def training_options(self, grid: str, method: str, length: int) -> list[str]:
        """Return the options of ``train.py`` that a method's trainings of one length share."""
        judged = ["evaluate=true", "split=validation", "sanity_images=0", "geometry_images=0", "reliability=false"]
        steps = [f"trainer.max_epochs={length}", f"trainer.limit_train_batches={self.steps_of(grid, method)}"]
        of = self.grids[grid]
        return [*of.options, *self.methods[method].options, *steps, *judged, *of.validation, "logger=csv"]


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


def fingerprint(options: Sequence[str]) -> str:
    """Return a short text that differs for other options."""
    return hashlib.sha256(" ".join(options).encode()).hexdigest()[:8]

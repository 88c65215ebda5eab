"""The options of an evaluation, read from a config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import BaseModel, Field, ValidationError, model_validator
from rich.console import Console

from jacobian_robust.attacks import Attack, GaussianNoise, Norm, Square, Transfer, UniformNoise
from jacobian_robust.config import build, build_each, plain, read_options
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import UserError, describe
from jacobian_robust.evaluation.diagnostics import Diagnostics
from jacobian_robust.files import in_project
from jacobian_robust.geometry.families import Categorical, Family
from jacobian_robust.options import STRICT, Count, Flag, NonEmpty, Seed, Size
from jacobian_robust.robustness.certificates import Certificate, unattacked
from jacobian_robust.robustness.estimates import Prediction

__all__ = ["EVALUATION_GROUPS", "EVALUATION_OPTIONS", "Evaluation", "Places", "read_evaluation", "read_pixels"]

EVALUATION_GROUPS = ("attack", "certificate", "diagnostics")
"""The groups of ``conf/evaluate.yaml`` that ``conf/train.yaml`` has too, for an evaluation."""


class _Options(BaseModel):
    """The scalars of ``conf/evaluate.yaml``, which ``conf/train.yaml`` has too."""

    seed: Seed
    limit: Count | None
    split: Literal["test", "validation"]
    independent: Flag
    sanity_images: Size
    sanity_source: NonEmpty | list[NonEmpty] | None
    geometry_images: Size | None
    prediction: Prediction
    reliability: Flag
    processes: Count


EVALUATION_OPTIONS = (*_Options.model_fields,)
"""Those of them that are scalars, by name."""


class Places(BaseModel):
    """The scalars that ``conf/evaluate.yaml`` has alone."""

    checkpoint: NonEmpty | list[NonEmpty] | None
    resume: Flag
    trust: Flag
    output_dir: NonEmpty


Level = Annotated[float, Field(ge=-1e6, le=1e6)]
"""What a pixel may be called; float32 can normalise it."""

Spread = Annotated[float, Field(ge=1e-6, le=1e6)]


class _Input(BaseModel):
    """What a model takes for a pixel, if not a number in [0, 1]."""

    model_config = STRICT

    low: Level = 0.0
    high: Level = 1.0
    mean: Level | list[Level] = 0.0
    std: Spread | list[Spread] = 1.0

    @model_validator(mode="after")
    def _invertible(self) -> "_Input":
        if self.high - self.low < 1e-6:
            raise ValueError(f"high must be above low, {self.low:g}")
        return self


@dataclass(frozen=True)
class Evaluation:
    """How classifiers are evaluated.

    Attributes:
        attacks: in their order, cheap ones first; each has another name.
        certificates: in the norms of the attacks, at whose budgets they say which images are certified.
        seed: of the attacks.
        limit: how many of the split's first images; ``None`` for all.
        split: ``test``, or ``validation`` to choose hyper-parameters by: the images held out from training.
        independent: attack all correct images anew at each budget, as the note does.
        sanity_images: how many images the sanity checks attack anew; 0 for no checks.
        sanity_source: checkpoints of which the first that fits has its examples transferred to a classifier that is
            checked alone; a relative path is looked for in the working directory, then in the project's. Of several,
            those that are not there are left out.
        geometry_images: for how many images the geometry's prediction is compared with the smallest perturbation found;
            ``None`` for all.
        prediction: how the geometry's radius is estimated.
        reliability: whether to look at noise, calibration and images of another kind.
        diagnostics: further measurements at each classifier, if any.
        processes: how many share the attacked batches; the results do not depend on it.
        data: the data to evaluate on, instead of what each checkpoint was trained on.
        family: of the distribution that the models' outputs describe, instead of what each checkpoint says.
    """

    attacks: tuple[Attack, ...]
    certificates: tuple[Certificate, ...] = ()
    seed: int = 0
    limit: int | None = None
    split: Literal["test", "validation"] = "test"
    independent: bool = False
    sanity_images: int = 0
    sanity_source: str | Sequence[str] | None = None
    geometry_images: int | None = 0
    prediction: Prediction = "linearised"
    reliability: bool = False
    diagnostics: Diagnostics | None = None
    processes: int = 1
    data: ImageDataModule | None = None
    family: Family | None = None

    def for_family(self, family: Family) -> "Evaluation":
        """Return the evaluation of models whose outputs are parameters of a family.

        Raises:
            UserError: if a part of it is for classification alone.
        """
        if self.diagnostics is not None and not isinstance(family, Categorical):
            raise UserError("diagnostics: they are for task=classification alone; leave them out")
        attacks = tuple(attack.with_family(family) for attack in self.attacks)
        certificates = tuple(certificate.with_family(family) for certificate in self.certificates)
        return replace(self, attacks=attacks, certificates=certificates)

    @property
    def norms(self) -> list[Norm]:
        """The norms of the attacks, in their order."""
        return list(dict.fromkeys(attack.norm for attack in self.attacks))

    def budgets(self, norm: Norm) -> list[float]:
        """Return the budgets of the attacks in a norm, in ascending order."""
        return sorted({eps for attack in self.attacks if attack.norm == norm for eps in attack.eps})

    @property
    def sanity_sources(self) -> Sequence[str]:
        """The places that ``sanity_source`` names; of a list, those that exist: an installed package has no others."""
        if isinstance(self.sanity_source, str):
            return [self.sanity_source]
        return [place for place in self.sanity_source or [] if in_project(place).exists()]

    @property
    def needs_gradient(self) -> bool:
        """Whether the classifiers have to be differentiable: not for random search, noise and named sources."""
        followed = any(
            not isinstance(attack, Square | UniformNoise | GaussianNoise)
            and not (isinstance(attack, Transfer) and attack.source)
            for attack in self.attacks
        )
        return followed or self.sanity_images > 0 or self.geometry_images != 0 or self.diagnostics is not None


def read_evaluation(cfg: DictConfig) -> Evaluation:
    """Return the evaluation that a config asks for.

    Raises:
        UserError: if an option is at fault.
    """
    diagnostics = build(cfg, "diagnostics", Diagnostics, optional=True)
    attacks = tuple(build_each(cfg, "attack", Attack))
    certificates = tuple(build_each(cfg, "certificate", Certificate)) if cfg.get("certificate") else ()
    evaluation = Evaluation(attacks, certificates, diagnostics=diagnostics, **dict(read_options(_Options, cfg)))
    unattacked(certificates, evaluation.norms)
    _look_at_what_is_given()
    for place in evaluation.sanity_sources:
        if not in_project(place).exists():
            raise UserError(f"sanity_source={place}: no such file or directory; null for none")
    for attack in evaluation.attacks:
        if isinstance(attack, Transfer) and attack.source and not Path(attack.source).exists():
            raise UserError(f"attack.{attack.name}.source={attack.source}: no such file or directory")
    return evaluation


def _look_at_what_is_given() -> None:
    """Refuse two kinds of budgets for one attack; say which of a suite's attacks or certificates others replace.

    Those options of the suite that are of another attack have been refused.
    """
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    chosen = {name: value for name, _, value in (option.partition("=") for option in given)}
    for name in chosen:
        if name.endswith(".eps_linf") and (other := name.removesuffix("_linf")) in chosen:
            raise UserError(f"{name} takes the place of {other}: give one of them")
    replaced = [f"{name}={chosen[name]}" for name in ("attack", "certificate") if name in chosen]
    if replaced and (suite := chosen.get("suite")) not in (None, "null"):
        both = " and ".join(replaced)
        Console().print(f"suite={suite}: {both} instead of its own; its other settings stay", soft_wrap=True)


def read_pixels(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of :class:`PixelInput`, or none if the models take pixels in [0, 1]."""
    try:
        stated = plain(cfg).get("input")
        options = _Input() if stated is None else _Input.model_validate(stated)
    except ValidationError as error:
        raise UserError(describe(error, "input")) from error
    return {} if options == _Input() else options.model_dump()

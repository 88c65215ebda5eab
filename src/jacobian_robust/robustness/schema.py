"""What ``robustness.json`` holds: a versioned schema, typed, which ``docs/robustness.schema.json`` explains."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from jacobian_robust.attacks import Ball, Norm
from jacobian_robust.robustness.sanity import Status

__all__ = [
    "FORMAT",
    "AttackOutcome",
    "Budget",
    "Calibration",
    "Certification",
    "CertifiedBudget",
    "ClassAccuracy",
    "Condition",
    "Finite",
    "FirstOrder",
    "Group",
    "Model",
    "NoisePoint",
    "OutOfDistribution",
    "Results",
    "SanityCheck",
    "Strict",
    "Task",
    "Threat",
    "groups",
    "settings_hash",
    "table_rows",
]

FORMAT: Literal[5] = 5
"""Raised whenever a field changes its meaning, its type or its place; not for a null where no number can be."""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Finite = Annotated[float | None, AfterValidator(_finite)]
"""A number, or null where it is infinite or undefined: JSON has neither. Older files have strings there."""


class Strict(BaseModel):
    """A part of a results file: immutable, without unknown fields, each field described by its docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class AttackOutcome(Strict):
    """What one attack did at one budget."""

    attack: str
    """Its name, a key of ``attacks``."""
    met: int
    """Images that it attacked: those still robust before it."""
    broken: int
    """How many of them it broke, by examples that were checked."""
    discarded: int
    """Examples that it returned outside the ball or outside [0, 1]; they break nothing."""


class Budget(Strict):
    """The worst case over the attacks at one budget."""

    eps: float
    """The budget, in the units of its norm."""
    attacked: int
    """Images attacked: those that the model classifies correctly."""
    correct: int
    """Attacked images that no attack broke at this budget; nor, unless ``independent``, at a smaller one, nor at a
    larger one by an example that lies in this ball: fewer then than the attacks left."""
    images: int
    """All images of the evaluation."""
    share_of_attacked: float | None
    """``correct / attacked``, the note's convention; null where nothing was attacked."""
    robust_accuracy: float
    """``correct / images``, the field's convention."""
    attacks: list[AttackOutcome]
    """Attack by attack, in their order."""
    certified: int | None = None
    """Images classified correctly that one certificate or more of the network covers at this budget; null where none
    was asked for."""
    certified_accuracy: float | None = None
    """``certified / images``."""


class Threat(Strict):
    """All budgets of one norm."""

    norm: Norm
    """``linf``, ``l2``; or ``gaussian``, whose budgets are standard deviations of noise."""
    budgets: list[Budget]
    """In ascending order."""


class ClassAccuracy(Strict):
    """One class of images."""

    label: int
    """The true class."""
    name: str | None = None
    """What it is called; null for its number."""
    images: int
    """How many there are."""
    clean_correct: int
    """How many of them are classified correctly."""
    robust_correct: dict[str, list[int]]
    """By norm: how many are robust at each budget of that norm."""

    @property
    def called(self) -> str:
        """Its name in tables and figures."""
        return self.name or str(self.label)


class Condition(Strict):
    """The note's condition (eq. 14) at a radius ε beside what the attacks found there."""

    eps: float
    """The Euclidean radius."""
    survived: int
    """Correct images whose smallest known adversarial perturbation is longer."""
    fell: int
    """Correct images whose smallest known adversarial perturbation is not."""
    center_survived: int
    """Of the former, how many satisfy ``‖J_μ‖₂ ≤ δ/ε``."""
    center_fell: int
    """Of the latter, how many do."""
    boundary_survived: int
    """Of the former, how many satisfy ``‖J_μ‖₂ ≤ d_B/ε``."""
    boundary_fell: int
    """Of the latter, how many do."""


class CertifiedBudget(Strict):
    """What a certificate says at one budget."""

    eps: float
    """The budget, in the units of its norm."""
    certified: int
    """Images that are certified and that the certified classifier classifies correctly."""
    certified_accuracy: float
    """``certified`` over all images."""


class Certification(Strict):
    """What one certificate says of a model."""

    certificate: str
    """Its name, a key of ``certificates``."""
    norm: Ball
    """``linf`` or ``l2``."""
    smoothed: bool
    """Whether it holds for the network's smoothed classifier: attacks on the network then neither break nor confirm
    it."""
    budgets: list[CertifiedBudget]
    """In ascending order."""
    correct: int
    """Images that the certified classifier classifies correctly."""
    abstained: int
    """Images of which it predicts no class; 0 for the network itself."""
    samples: int
    """Noisy images that were classified for it."""
    median_radius: Finite
    """Median of the certified radius over the correctly classified images; null for a certificate that has none."""
    pairs: int
    """Pairs of a certified image and an attack of this evaluation at a certified budget."""
    broken: list[int]
    """Numbers of the certified images that an attack of this evaluation broke at a certified length: the certificate
    is wrong if there is one."""


class FirstOrder(Strict):
    """The radius that the geometry predicts against the smallest ℓ2 perturbation that an attack found."""

    prediction: str = "first_order"
    """How the radius is estimated: ``first_order`` is ``d_B(x)/‖J_μ‖₂``."""
    images: int
    """Correct images of the sample."""
    found: int
    """For how many of them an adversarial example was found."""
    rank_correlation: Finite
    """Spearman's, over the images for which one was found; null for fewer than three."""
    unsafe: int
    """Images with an adversarial example inside the predicted radius."""
    median_predicted: Finite
    """Median of the predicted radius; null where it is infinite, ``J_μ`` being zero."""
    median_found: Finite
    """Median length of the smallest perturbation found."""
    conditions: list[Condition]
    """At the radii of the ℓ2 budgets."""


class Calibration(Strict):
    """How far the predicted probabilities can be taken at their word, on the clean images."""

    ece: Finite
    """Expected calibration error: mean distance of confidence and accuracy over 15 bins of confidence; null where an
    image has a nan among its probabilities."""
    nll: Finite
    """Mean negative log-likelihood of the true class, in nats; null where it is infinite, or a nan is among them."""
    brier: Finite
    """Mean squared distance of the probabilities to the true class's vertex, in [0, 2]; null where a nan is among
    them."""
    bins: list[tuple[float, float, int]]
    """Mean confidence, accuracy and number of images of each bin that has any; an image with a nan is in none."""


class NoisePoint(Strict):
    """Accuracy under Gaussian noise: one draw for each image, images that the model gets wrong clean included."""

    sigma: float
    """Standard deviation in each pixel, before clipping to [0, 1]."""
    accuracy: float
    """Share of all images."""


class OutOfDistribution(Strict):
    """How well a score tells the evaluated images from others: area under the ROC curve; 0.5 is chance."""

    against: str
    """The other images."""
    images: int
    """How many of them."""
    max_probability: float
    """AUROC of the largest probability."""
    entropy: float
    """AUROC of the negative entropy."""
    distance_to_center: float
    """AUROC of δ, the Fisher–Rao distance to the simplex's centre."""


class SanityCheck(Strict):
    """The outcome of a check on the evaluation itself."""

    name: str
    """What was checked."""
    status: Status
    """``pass``, ``warn``, ``fail``; or ``skip`` where it could not be made."""
    why: str
    """One sentence."""


class Task(Strict):
    """What a model's task is, if not classification: its "accuracy" is then the share of what the task calls right."""

    family: str
    """Of the distribution that the outputs describe: a class of :mod:`jacobian_robust.geometry.families`."""
    right: str
    """What the share of right predictions is called."""
    metrics: dict[str, Finite]
    """The usual metrics of the task on the clean images, by name; null where an output was not finite."""


class Model(Strict):
    """One evaluated classifier."""

    name: str
    """The shortest distinct name of where it was found."""
    checkpoint: str | None
    """Its file, if any."""
    sha256: str | None
    """That file's hash, in hexadecimal; of a model without one, that of its weights."""
    training_seed: int | None
    """The seed it was trained with, for this project's checkpoints."""
    settings: str | None
    """Hash of what it was trained with but for the seed: equal for models that differ in their seed alone."""
    epochs: int | None
    """Finished epochs."""
    seconds_per_epoch: float | None
    """Mean time of the training steps of an epoch."""
    plain_step_equivalents: float | None = None
    """The training's cost in steps by cross-entropy alone, as its ``summary.json`` has it; null where it is unknown."""
    wandb: str | None
    """The W&B run that trained it, as ``entity/project/id`` or ``project/id``."""
    data: str
    """Data set and split; of validation images, which were held out."""
    verdict: Status | None
    """The worst status of the checks; null if none were made."""
    checks: list[SanityCheck]
    """The sanity checks of the evaluation."""
    images: int
    """Number of images."""
    clean_correct: int
    """How many of them are classified correctly."""
    clean_accuracy: float
    """``clean_correct / images``."""
    threats: list[Threat]
    """A norm each."""
    classes: list[ClassAccuracy]
    """By true class; empty for another task than classification."""
    first_order: FirstOrder | None
    """What the geometry predicts; null if not asked for."""
    calibration: Calibration | None
    """Null if not asked for."""
    noise: list[NoisePoint]
    """Accuracy under growing noise; empty if not asked for."""
    out_of_distribution: list[OutOfDistribution]
    """Empty if not asked for."""
    certificates: list[Certification] = []
    """Empty if not asked for."""
    task: Task | None = None
    """Null for classification."""

    @property
    def right(self) -> str:
        """What the share of right predictions is called: ``accuracy``, or what the task asks for."""
        return self.task.right if self.task else "accuracy"

    def accuracy(self, norm: Norm) -> list[tuple[float, float]]:
        """Return the points ``(budget, accuracy on all images)`` of one norm, from budget 0 on."""
        budgets = next((threat.budgets for threat in self.threats if threat.norm == norm), [])
        points = {0.0: self.clean_accuracy} | {budget.eps: budget.robust_accuracy for budget in budgets}
        return sorted(points.items())

    def certified(self, norm: Norm) -> list[tuple[float, float]]:
        """Return the points ``(budget, certified accuracy)`` of one norm; none where no certificate was asked for."""
        budgets = next((threat.budgets for threat in self.threats if threat.norm == norm), [])
        found = {b.eps: b.certified_accuracy for b in budgets if b.certified_accuracy is not None}
        return sorted(({0.0: self.clean_accuracy} | found).items()) if found else []

    def certified_by(self, certificate: str, norm: Norm, eps: float) -> int | None:
        """Return how many images one certificate covers at a budget of a norm; ``None`` where it was not asked for."""
        found = (c for c in self.certificates if (c.certificate, c.norm) == (certificate, norm))
        return next((budget.certified for c in found for budget in c.budgets if budget.eps == eps), None)

    def certified_share(self, certificate: str, norm: Norm, eps: float) -> float | None:
        """Return the share of all images that one certificate covers; ``None`` where it was not asked for."""
        count = self.certified_by(certificate, norm, eps)
        return None if count is None else count / self.images


class Results(Strict):
    """An evaluation of one or more classifiers."""

    format: Literal[3, 4, 5] = FORMAT
    """Version of this schema; files of version 3 lack ``commit`` and ``dirty``, of 3 and 4 all about certificates."""
    split: Literal["test", "validation"]
    """Which images were evaluated."""
    independent: bool
    """Whether each budget attacked all correct images anew."""
    seed: int
    """Of the attacks."""
    device: str
    """``cpu`` or ``cuda``; of evaluations put together, all that they were made on: ``cpu, cuda``."""
    versions: dict[str, str]
    """Of the packages that a figure can depend on; of evaluations put together, all of them: ``2.14.1 / 2.15.0``."""
    commit: str | None = None
    """The git commit of the code; null outside a clone."""
    dirty: bool | None = None
    """Whether files differed from that commit; null outside a clone."""
    attacks: dict[str, dict[str, Any]]
    """The parameters of each attack, by name, in their order."""
    certificates: dict[str, dict[str, Any]] = {}
    """The parameters of each certificate, by name."""
    models: list[Model] = Field(min_length=1)
    """The evaluated classifiers."""

    @property
    def norms(self) -> list[Norm]:
        """The norms of the attacks, in order."""
        return [threat.norm for threat in self.models[0].threats]

    def budget(self, norm: Norm, eps: float) -> str:
        """Return how a budget is called in tables: with the ℓ∞ budget that it comes from, if it does."""
        found = [attack for attack in self.attacks.values() if attack["norm"] == norm and attack.get("eps_linf")]
        linf = dict(pair for attack in found for pair in zip(attack["eps"], attack["eps_linf"], strict=True))
        return f"{eps:g} (√n·{linf[eps]:g})" if eps in linf else f"{eps:g}"

    @property
    def right(self) -> str:
        """What the share of right predictions is called."""
        return self.models[0].right

    def unmet(self, norm: Norm) -> dict[float, list[str]]:
        """Return, by budget of a norm, which attacks of that norm do not have it: those that have others."""
        attacks = [name for name, attack in self.attacks.items() if attack["norm"] == norm]
        budgets = next(threat.budgets for threat in self.models[0].threats if threat.norm == norm)
        met = {budget.eps: [outcome.attack for outcome in budget.attacks] for budget in budgets}
        missing = {eps: [name for name in attacks if name not in names] for eps, names in met.items()}
        return {eps: names for eps, names in missing.items() if names}


def settings_hash(config: dict[str, Any]) -> str:
    """Return a hash of a training configuration but for its seed and where its data lay."""
    kept = {key: value for key, value in config.items() if key != "seed"}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {key: value for key, value in kept["data"].items() if key != "root"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def table_rows(results: Results) -> list[dict[str, Any]]:
    """Return one row for each model, norm, budget and attack, with everything that the figure depends on.

    Args:
        results: of an evaluation, or of several as one.
    """
    packages = {f"version_{name}": number for name, number in results.versions.items()}
    return [
        {
            "name": model.name,
            "verdict": model.verdict,
            "norm": threat.norm,
            **budget.model_dump(exclude={"attacks"}),
            "clean_correct": model.clean_correct,
            "clean_accuracy": model.clean_accuracy,
            **{f"certified_{name}": model.certified_by(name, threat.norm, budget.eps) for name in results.certificates},
            **outcome.model_dump(),
            "parameters": json.dumps(results.attacks[outcome.attack]),
            "independent": results.independent,
            "seed": results.seed,
            "device": results.device,
            "data": model.data,
            "checkpoint": model.checkpoint,
            "sha256": model.sha256,
            "training_seed": model.training_seed,
            "seconds_per_epoch": model.seconds_per_epoch,
            **packages,
        }
        for model in results.models
        for threat in model.threats
        for budget in threat.budgets
        for outcome in budget.attacks
    ]


class Group(BaseModel):
    """Models that differ in their training seed alone."""

    name: str
    seeds: list[int]
    clean: tuple[float, float]
    robust: dict[str, list[tuple[float, float, float]]]
    """By norm: budget, mean and standard deviation over the seeds of the robust accuracy."""
    of_correct: dict[str, list[tuple[float, float] | None]]
    """Likewise, of the share of the correctly classified images; none where a model has no such image."""


def groups(models: Sequence[Model]) -> list[Group]:
    """Return the mean and the standard deviation of the models that were trained alike with several seeds.

    Of those with the same seed, the first stands for all: a network that was evaluated twice is no further draw.
    """
    alike: dict[str, list[Model]] = {}
    for model in models:
        if model.settings is not None:
            alike.setdefault(model.settings, []).append(model)
    found = []
    for trained in alike.values():
        by_seed = {model.training_seed: model for model in reversed(trained)}
        members = [model for model in trained if model is by_seed[model.training_seed]]
        if len(members) < 2:
            continue
        robust, of_correct = {}, {}
        for number, threat in enumerate(members[0].threats):
            curves = [dict(model.accuracy(threat.norm)) for model in members]
            robust[str(threat.norm)] = [
                (budget.eps, *_mean_and_spread([curve[budget.eps] for curve in curves])) for budget in threat.budgets
            ]
            of_correct[str(threat.norm)] = [
                _mean_and_spread([share for share in shares if share is not None]) if None not in shares else None
                for shares in zip(
                    *([budget.share_of_attacked for budget in model.threats[number].budgets] for model in members),
                    strict=True,
                )
            ]
        found.append(
            Group(
                name=_shared_name([model.name for model in members]),
                seeds=sorted(seed for seed in by_seed if seed is not None),
                clean=_mean_and_spread([model.clean_accuracy for model in members]),
                robust=robust,
                of_correct=of_correct,
            )
        )
    return found


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _shared_name(names: Sequence[str]) -> str:
    """Return what names have in common from the left, or else the first."""
    length = 0
    while all(len(name) > length and name[length] == names[0][length] for name in names):
        length += 1
    return names[0][:length].rstrip("0123456789-_,=/. ").removesuffix("seed").rstrip(",-_ /") or names[0]


if __name__ == "__main__":
    print(json.dumps(Results.model_json_schema(), indent=2))

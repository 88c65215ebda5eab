"""What was measured of models, as the results that are written and shown."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from jacobian_robust.attacks import PGD, Attack, Norm
from jacobian_robust.files import write_atomically
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.provenance import git_state, versions
from jacobian_robust.robustness.budgets import Sweep
from jacobian_robust.robustness.certificates import (
    Certificate,
    Certified,
)
from jacobian_robust.robustness.examples import Examples, gather
from jacobian_robust.robustness.metrics import TaskMetrics
from jacobian_robust.robustness.prediction import Radii
from jacobian_robust.robustness.sanity import Check, verdict
from jacobian_robust.robustness.schema import (
    AttackOutcome,
    Budget,
    Certification,
    CertifiedBudget,
    ClassAccuracy,
    Model,
    Results,
    SanityCheck,
    Task,
    Threat,
    table_rows,
)
from jacobian_robust.robustness.workers import Job, one_by_one

__all__ = ["Details", "image_rows", "model_results", "parameters", "pictured", "results_of", "task_of", "write_tables"]


@dataclass(frozen=True)
class Details:
    """What is known of each image, for the figures and ``images.csv``.

    Attributes:
        name: of the model.
        labels: the true classes; of another task, 0.
        confidence: the probability of each predicted class; of another task, nan.
        sweeps: the attacks' results, one a norm.
        certified: what each certificate says.
        radii: the geometry at the first images, where it was asked for.
        smallest: the length of the smallest ℓ2 perturbation known there.
        pictures: whether the images are pictures, not points.
        class_names: what the classes are called; ``None`` for their numbers.
        family: of the distribution that the model's outputs describe.
        unit: of the targets, if they have one.
        said: of another task than classification, the targets and the predictions in words.
        pictured: of another task, by norm a budget, and what it does to a few images (:func:`pictured`).
    """

    name: str
    labels: Int[Tensor, "images"]
    confidence: Float[Tensor, "images"]
    sweeps: list[Sweep]
    certified: list[Certified] = field(default_factory=list)
    radii: Radii | None = None
    smallest: Float[Tensor, "first"] | None = None
    pictures: bool = True
    class_names: Sequence[str] | None = None
    family: Family = CATEGORICAL
    unit: str = ""
    said: tuple[list[str], list[str]] | None = None
    pictured: dict[Norm, tuple[float, Examples]] = field(default_factory=dict)


PICTURED = 6
"""Images of a picture of what an attack does."""


def pictured(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    targets: Shaped[Tensor, "images *_"],
    attacks: Sequence[Attack],
    sweeps: Sequence[Sweep],
    seed: int,
) -> dict[Norm, tuple[float, Examples]]:
    """Return, by norm, a middle budget and the last iterates of PGD there from the first images that are right.

    An evaluation's own attack ends at the first iterate that breaks an image, of which little is to be seen. Norms
    without PGD are left out.
    """
    found: dict[Norm, tuple[float, Examples]] = {}
    for swept in sweeps:
        chosen = (swept.predicted == 0).nonzero().flatten()[:PICTURED]
        own = [attack for attack in attacks if isinstance(attack, PGD) and attack.norm == swept.norm]
        budgets = [budget.eps for budget in swept.budgets if budget.eps > 0]
        if own and budgets and len(chosen):
            eps = budgets[len(budgets) // 2]
            attack = replace(own[0], early_stop=False)
            job = Job(model, attack, images[chosen], targets[chosen], eps, f"{seed} picture {swept.norm}")
            (adversarial,) = one_by_one([job])
            found[swept.norm] = eps, gather(model, images, targets, swept.predicted, attack.family, chosen, adversarial)
    return found


def task_of(
    family: Family, model: nn.Module, images: Float[Tensor, "images *shape"], targets: Shaped[Tensor, "images *_"]
) -> tuple[Task | None, tuple[list[str], list[str]] | None]:
    """Return what a model's task is, with its metrics, and targets and predictions in words; of classes, nothing."""
    if isinstance(family, Categorical):
        return None, None
    metrics, said = TaskMetrics(family), []
    with torch.no_grad():
        for chunk, of in zip(images.split(100), targets.split(100), strict=True):
            outputs = model(chunk)
            metrics.update(outputs, of)
            said += [family.words(entry) for entry in family.predict(outputs)]
    task = Task(family=type(family).__name__, right=family.right_means, metrics=dict(metrics.value()))
    return task, ([family.words(target) for target in targets], said)


def results_of(
    models: Sequence[Model],
    attacks: Sequence[Attack],
    certificates: Sequence[Certificate] = (),
    *,
    seed: int,
    device: str,
    split: str = "test",
    independent: bool = False,
) -> Results:
    """Return what ``robustness.json`` holds of evaluated models."""
    return Results.model_validate(
        {
            "split": split,
            "independent": independent,
            "seed": seed,
            "device": device,
            "versions": versions(),
            **git_state(),
            "attacks": {attack.name: parameters(attack) for attack in attacks},
            "certificates": {asked.name: parameters(asked, "certificate") for asked in certificates},
            "models": list(models),
        }
    )


def model_results(
    name: str,
    labels: Int[Tensor, "images"],
    sweeps: Sequence[Sweep],
    checks: Sequence[Check],
    certified: Sequence[Certified] = (),
    *,
    classes: int,
    data: str,
    class_names: Sequence[str] | None = None,
    **known: Any,
) -> Model:
    """Return the accounting of one model.

    Args:
        name: of the model.
        labels: the true classes.
        sweeps: the attacks' results, one a norm.
        checks: the sanity checks.
        certified: what each certificate says.
        classes: number of classes; 0 for another task.
        data: which images they are, in words.
        class_names: what the classes are called; ``None`` for their numbers.
        known: further fields of :class:`Model`.
    """
    unknown: dict[str, Any] = dict.fromkeys(
        (
            "checkpoint",
            "sha256",
            "training_seed",
            "settings",
            "epochs",
            "seconds_per_epoch",
            "wandb",
            "first_order",
            "calibration",
        )
    )
    return Model(
        name=name,
        data=data,
        verdict=verdict(checks) if checks else None,
        checks=[SanityCheck(**asdict(check)) for check in checks],
        images=len(labels),
        clean_correct=sweeps[0].clean_correct,
        clean_accuracy=sweeps[0].clean_accuracy,
        threats=[
            _threat(swept, [found for found in certified if found.certificate.norm == swept.norm]) for swept in sweeps
        ],
        certificates=[
            _certification(found, swept)
            for found in certified
            for swept in sweeps
            if swept.norm == found.certificate.norm
        ],
        classes=_classes(labels, sweeps, class_names or [None] * classes),
        **{**unknown, "noise": [], "out_of_distribution": [], **known},
    )


def write_tables(results: Results, details: Sequence[Details], directory: Path) -> list[dict[str, Any]]:
    """Write ``robustness.csv`` and ``images.csv``; return the rows of the first."""
    rows = table_rows(results)
    with write_atomically(directory / "robustness.csv") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with write_atomically(directory / "images.csv") as file:
        csv.writer(file).writerows(image_rows(results, details))
    return rows


def _threat(swept: Sweep, certified: Sequence[Certified]) -> Threat:
    """Return the budgets of a norm, each with the images that one certificate or more of the network covers."""
    covering = [found.bounded.certified for found in certified if not found.certificate.smoothed]
    covered = torch.stack(covering).any(0).sum(0).tolist() if covering else [None] * len(swept.budgets)
    return Threat(
        norm=swept.norm,
        budgets=[
            Budget(
                eps=budget.eps,
                attacked=budget.attacked,
                correct=budget.correct,
                images=budget.images,
                share_of_attacked=budget.share_of_attacked,
                robust_accuracy=budget.robust_accuracy,
                attacks=[AttackOutcome(**asdict(attack)) for attack in budget.attacks],
                certified=count,
                certified_accuracy=None if count is None else count / budget.images,
            )
            for budget, count in zip(swept.budgets, covered, strict=True)
        ],
    )


def _certification(found: Certified, swept: Sweep) -> Certification:
    certificate, bounded, images = found.certificate, found.bounded, swept.images
    counts = bounded.certified.sum(0).tolist()
    radii = bounded.radius[bounded.correct & bounded.radius.isfinite()]
    return Certification(
        certificate=certificate.name,
        norm=certificate.norm,
        smoothed=certificate.smoothed,
        budgets=[
            CertifiedBudget(eps=eps, certified=count, certified_accuracy=count / images)
            for eps, count in zip(found.eps, counts, strict=True)
        ],
        correct=int(bounded.correct.sum()),
        abstained=int(bounded.abstained.sum()),
        samples=certificate.samples_of(images),
        median_radius=radii.median().item() if len(radii) else None,
        pairs=found.pairs(swept),
        broken=found.broken(swept.smallest),
    )


def _classes(labels: Tensor, sweeps: Sequence[Sweep], names: Sequence[str | None]) -> list[ClassAccuracy]:
    return [
        ClassAccuracy(
            label=label,
            name=name,
            images=int((labels == label).sum()),
            clean_correct=int((sweeps[0].predicted[labels == label] == label).sum()),
            robust_correct={
                swept.norm: [int(robust[labels == label].sum()) for robust in swept.robust] for swept in sweeps
            },
        )
        for label, name in enumerate(names)
    ]


def parameters(of: Attack | Certificate, kind: str = "attack") -> dict[str, Any]:
    """Return an attack's or a certificate's class, as ``kind``, and its parameters, as JSON has them."""
    parameters = {key: value for key, value in asdict(of).items() if key not in ("name", "family")}
    if parameters.get("eps_linf") is None:
        parameters.pop("eps_linf", None)
    if not isinstance(of.family, Categorical):
        parameters["family"] = {"name": type(of.family).__name__} | asdict(of.family)
    plain_parameters: dict[str, Any] = json.loads(json.dumps({kind: type(of).__name__} | parameters))
    return plain_parameters


def image_rows(results: Results, details: Sequence[Details]) -> Iterator[list[Any]]:
    """Return a heading, and a row for each model and image: its classes, where it is robust and certified."""
    columns = ["name", "image", "label", "predicted", "confidence"]
    for swept in details[0].sweeps:
        columns += [f"robust_{swept.norm}_{budget.eps:g}" for budget in swept.budgets] + [f"smallest_{swept.norm}"]
    for found in details[0].certified:
        columns += [f"certified_{found.certificate.name}_{eps:g}" for eps in found.eps]
        columns += [f"radius_{found.certificate.name}"] if found.certificate.norm == "l2" else []
    geometry = ["delta", "boundary", "jacobian_frobenius", "jacobian_spectral", "predicted_l2", "smallest_known_l2"]
    yield columns + (geometry if details[0].radii else [])
    for detail in details:
        said = detail.said or (detail.labels.tolist(), detail.sweeps[0].predicted.tolist())
        values: list[list[Any]] = [*said, _lengths(detail.confidence)]
        for swept in detail.sweeps:
            values += [robust.int().tolist() for robust in swept.robust] + [_lengths(swept.smallest)]
        for found in detail.certified:
            values += [certified.int().tolist() for certified in found.bounded.certified.unbind(-1)]
            values += [_lengths(found.bounded.radius)] if found.certificate.norm == "l2" else []
        if detail.radii is not None and detail.smallest is not None:
            radii = detail.radii
            known = [radii.center, radii.boundary, radii.frobenius, radii.spectral, radii.predicted, detail.smallest]
            rest = [""] * (len(detail.labels) - len(detail.smallest))
            values += [_lengths(value) + rest for value in known]
        for image, row in enumerate(zip(*values, strict=True)):
            yield [detail.name, image, *row]


def _lengths(values: Tensor) -> list[str]:
    """Return numbers as text, and nothing for what is not known."""
    return [f"{value:.6g}" if math.isfinite(value) else "" for value in values.tolist()]

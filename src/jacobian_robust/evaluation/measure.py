"""What an evaluation measures at one classifier: attacks, checks, geometry, reliability, diagnostics."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from jacobian_robust.attacks import Norm, Transfer
from jacobian_robust.checkpoints import Checkpoint
from jacobian_robust.data import FashionMNISTDataModule, ImageDataModule, MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.classifiers import Classifier, described_data, device, weights_hash
from jacobian_robust.evaluation.journal import Bars, FileJournal, identity_of, once
from jacobian_robust.evaluation.options import Evaluation
from jacobian_robust.geometry.families import Categorical
from jacobian_robust.robustness import prediction as first_order
from jacobian_robust.robustness import reliability
from jacobian_robust.robustness.budgets import Sweep, predictions, sweep
from jacobian_robust.robustness.certificates import Certificate, Certified, certify
from jacobian_robust.robustness.results import Details, model_results, parameters, pictured, task_of
from jacobian_robust.robustness.sanity import Check, checks_of, sanity_checks
from jacobian_robust.robustness.schema import FirstOrder, Model, settings_hash
from jacobian_robust.robustness.workers import Attackers

__all__ = ["Room", "measure"]


@dataclass(frozen=True)
class Room:
    """What the measurements of all classifiers of an evaluation use.

    Attributes:
        models: all classifiers; each is a source of transferred examples for the others.
        evaluation: how they are evaluated.
        sources: by the name of an attack, the models that it names as its source.
        checked_with: further models whose examples the sanity checks transfer.
        progress: the directory of the unfinished evaluation's state.
        attackers: run the attacks.
    """

    models: Sequence[Classifier]
    evaluation: Evaluation
    sources: dict[str, list[Classifier]]
    checked_with: Sequence[Classifier]
    progress: Path
    attackers: Attackers


def measure(room: Room, i: int) -> tuple[Model, Details, Any]:
    """Return the results of the ``i``-th classifier, what is known of each image, and the diagnostics' measurement."""
    classifier, evaluation, attackers = room.models[i], room.evaluation, room.attackers
    others = [model for number, model in enumerate(room.models) if number != i]
    classifier.datamodule.setup("test" if evaluation.split == "test" else "validate")
    split = classifier.datamodule.split(evaluation.split)
    images, labels = (tensor.to(device()) for tensor in split.first(evaluation.limit))
    transfers = {attack.name: others for attack in evaluation.attacks if isinstance(attack, Transfer)}
    sweeps = [
        _sweep(
            classifier,
            images,
            labels,
            norm,
            transfers | room.sources,
            evaluation,
            room.progress / f"{i}_{norm}.pt",
            attackers,
        )
        for norm in evaluation.norms
    ]
    certified = [_certified(room, i, images, labels, certificate) for certificate in evaluation.certificates]
    checks = _checks_once(room, i, images, labels, sweeps, certified, [*others, *room.checked_with])
    if not isinstance(classifier.datamodule.family, Categorical):
        return _of_task(room, i, images, labels, sweeps, certified, checks)
    log_p = reliability.log_probabilities(classifier.network, images)
    sample = _nearest(classifier, images, labels, sweeps, evaluation, room.progress / f"{i}_geometry.pt", attackers)
    predicted, smallest, compared = _first_order(sample, evaluation)
    diagnosed = _diagnosed(classifier, sample, evaluation, room.progress / f"{i}_geometry_training.pt", attackers)
    model = model_results(
        classifier.name,
        labels,
        sweeps,
        checks,
        certified,
        classes=classifier.datamodule.classes,
        class_names=classifier.datamodule.class_names,
        data=described_data(classifier.datamodule, evaluation),
        sha256=weights_hash(classifier),
        first_order=compared,
        **_training_of(classifier),
        **(_reliability(classifier, images, labels, log_p, evaluation) if evaluation.reliability else {}),
    )
    confidence = log_p.exp().amax(-1)
    shown = (classifier.datamodule.pictures, classifier.datamodule.class_names)
    details = Details(classifier.name, labels, confidence, sweeps, certified, predicted, smallest, *shown)
    return model, details, diagnosed


def _of_task(
    room: Room,
    i: int,
    images: Tensor,
    targets: Tensor,
    sweeps: list[Sweep],
    certified: list[Certified],
    checks: list[Check],
) -> tuple[Model, Details, None]:
    """Return the results of another task than classification."""
    classifier, evaluation = room.models[i], room.evaluation
    if not i and (evaluation.reliability or evaluation.geometry_images != 0):
        Console().print(
            "left out: geometry, calibration and images of another kind, for task=classification alone", soft_wrap=True
        )
    datamodule = classifier.datamodule
    task, said = task_of(datamodule.family, classifier.network, images, targets)
    labels = torch.zeros_like(sweeps[0].predicted)
    model = model_results(
        classifier.name,
        labels,
        sweeps,
        checks,
        certified,
        classes=0,
        data=described_data(datamodule, evaluation),
        sha256=weights_hash(classifier),
        task=task,
        **_training_of(classifier),
    )
    confidence = torch.full_like(sweeps[0].smallest, torch.nan)
    details = Details(
        *(classifier.name, labels, confidence, sweeps, certified),
        pictures=datamodule.pictures,
        family=datamodule.family,
        unit=datamodule.unit,
        said=said,
        pictured=pictured(classifier.network, images, targets, evaluation.attacks, sweeps, evaluation.seed),
    )
    return model, details, None


def _training_of(classifier: Classifier) -> dict[str, Any]:
    """Return what a checkpoint says of its training."""
    checkpoint = classifier.checkpoint
    seconds = [row["seconds"] for row in checkpoint.rows if "seconds" in row]
    return {
        "checkpoint": str(checkpoint.path) if checkpoint.path else None,
        "training_seed": checkpoint.config.get("seed"),
        "settings": settings_hash(checkpoint.config) if checkpoint.config else None,
        "epochs": checkpoint.epochs,
        "seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None,
        "plain_step_equivalents": _plain_step_equivalents(checkpoint),
        "wandb": checkpoint.wandb,
    }


def _plain_step_equivalents(checkpoint: Checkpoint) -> float | None:
    """Return what the summary of the run that a checkpoint lies in says of its cost."""
    if checkpoint.path is None:
        return None
    path = checkpoint.path.resolve()
    run = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    try:
        cost = json.loads((run / "summary.json").read_text(encoding="utf-8"))["cost"]["plain_step_equivalents"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is an older one
        return None
    return float(cost) if isinstance(cost, int | float) else None


def _reliability(
    classifier: Classifier, images: Tensor, labels: Tensor, log_p: Tensor, evaluation: Evaluation
) -> dict[str, Any]:
    others = _other_images(classifier.datamodule, images, evaluation)
    return {
        "calibration": reliability.calibration(log_p, labels),
        "noise": reliability.noise_accuracy(classifier.network, images, labels, seed=evaluation.seed),
        "out_of_distribution": reliability.out_of_distribution(classifier.network, log_p, others),
    }


def _certified(room: Room, i: int, images: Tensor, labels: Tensor, certificate: Certificate) -> Certified:
    """Return what a certificate says of a classifier at the attacked budgets of its norm."""
    classifier, evaluation = room.models[i], room.evaluation
    eps = evaluation.budgets(certificate.norm)
    identity = identity_of(classifier, images, [certificate], evaluation) | {"eps": eps}
    title = f"{certificate.name} certificate of {classifier.name}"
    with tqdm(total=len(images), desc=title, unit="image") as bar:

        def progress(done: int, of: int, certified: int) -> None:
            bar.set_postfix(certified=certified, refresh=False)
            bar.update(done - bar.n)

        return certify(
            *(classifier.network, images, labels, certificate, eps),
            seed=evaluation.seed,
            progress=progress,
            journal=FileJournal(room.progress / f"{i}_certificate_{certificate.name}.pt", identity),
        )


def _checks_once(
    room: Room,
    i: int,
    images: Tensor,
    labels: Tensor,
    sweeps: Sequence[Sweep],
    certified: Sequence[Certified],
    surrogates: Sequence[Classifier],
) -> list[Check]:
    """Return the sanity checks of a classifier, made now or before an interruption."""
    classifier, evaluation = room.models[i], room.evaluation
    identity = identity_of(classifier, images, evaluation.attacks, evaluation) | {
        "sanity_images": evaluation.sanity_images,
        "others": [weights_hash(other) for other in surrogates],
        "certificates": {of.certificate.name: parameters(of.certificate) for of in certified},
    }

    def checked() -> dict[str, Any]:
        followed = [other.network for other in surrogates]
        checks = _checks(classifier, images, labels, sweeps, certified, followed, evaluation, room.attackers)
        return {"checks": [asdict(check) for check in checks]}

    made = once(FileJournal(room.progress / f"{i}_checks.pt", identity), checked)
    return [Check(**check) for check in made["checks"]]


def _sweep(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    norm: Norm,
    surrogates: dict[str, list[Classifier]],
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> Sweep:
    """Attack one of the models in one norm."""
    attacks = [attack for attack in evaluation.attacks if attack.norm == norm]
    followed = {attack.name: surrogates[attack.name] for attack in attacks if attack.name in surrogates}
    identity = identity_of(classifier, images, attacks, evaluation)
    if followed:
        identity["surrogates"] = {name: [weights_hash(other) for other in others] for name, others in followed.items()}
    bars = Bars(classifier.name, norm)
    try:
        return sweep(
            classifier.network,
            images,
            labels,
            attacks,
            seed=evaluation.seed,
            independent=evaluation.independent,
            surrogates={name: [other.network for other in others] for name, others in followed.items()},
            progress=bars,
            journal=FileJournal(progress, identity),
            attackers=attackers,
        )
    finally:
        bars.close()


def _checks(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    sweeps: Sequence[Sweep],
    certified: Sequence[Certified],
    others: Sequence[nn.Module],
    evaluation: Evaluation,
    attackers: Attackers,
) -> list[Check]:
    """Return the sanity checks of the evaluation of a model."""
    of = len(checks_of([swept.norm for swept in sweeps], certified, evaluation.sanity_images))
    if not of:
        return []
    training_images = None
    with contextlib.suppress(UserError):  # its files need not be on this machine, or be named
        trained_on = classifier.checkpoint.datamodule()
        trained_on.for_task(classifier.datamodule.family)
        trained_on.setup("fit")
        training_images = trained_on.split("train").images  # none of pictures that are read one by one
    with tqdm(total=of, desc=f"sanity checks of {classifier.name}", unit="check") as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        return sanity_checks(
            classifier.network,
            images,
            labels,
            evaluation.attacks,
            sweeps,
            certified=certified,
            sample=evaluation.sanity_images,
            seed=evaluation.seed,
            training_images=training_images,
            others=others,
            progress=progress,
            attackers=attackers,
        )


def _nearest(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    sweeps: Sequence[Sweep],
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> first_order.Sample | None:
    """Return the first images with the geometry there and the smallest ℓ2 perturbations known, if anything needs it."""
    asked = len(images) if evaluation.geometry_images is None else evaluation.geometry_images
    number = max(asked, evaluation.diagnostics.images if evaluation.diagnostics else 0)
    if not number:
        return None
    images, labels = images[:number], labels[:number]
    sample = _sample(classifier, images, labels, f"geometry of {classifier.name}", evaluation, progress, attackers)
    smallest = sample.smallest
    for swept in sweeps:
        if swept.norm == "l2":
            smallest = torch.minimum(smallest, swept.smallest[:number])
    return replace(sample, smallest=smallest)


def _sample(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    title: str,
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> first_order.Sample:
    """Return what the geometry and FAB say of images."""
    correct = predictions(classifier.network, images) == labels

    def measured() -> dict[str, Any]:
        with tqdm(total=len(images) + int(correct.sum()), desc=title, unit="image") as bar:
            predicted = first_order.radii(classifier.network, images, bar.update, evaluation.prediction)
            nearest = first_order.smallest_perturbations(
                *(classifier.network, images, labels, correct),
                seed=evaluation.seed,
                progress=bar.update,
                attackers=attackers,
            )
        return {"radii": asdict(predicted), "nearest": asdict(nearest)}

    identity = identity_of(classifier, images, [], evaluation) | {"prediction": evaluation.prediction}
    made = once(FileJournal(progress, identity), measured)
    nearest = first_order.Nearest(**made["nearest"])
    return first_order.Sample(images, correct, first_order.Radii(**made["radii"]), nearest, nearest.length)


L2_RADII = (0.5, 1.0, 1.5, 2.0)
"""Where the note's condition is looked at if no ℓ2 budget was attacked."""


def l2_budgets(evaluation: Evaluation) -> Sequence[float]:
    """Return the ℓ2 radii that are attacked, or else the usual ones."""
    budgets = {eps for attack in evaluation.attacks if attack.norm == "l2" for eps in attack.eps if eps > 0}
    return sorted(budgets) or L2_RADII


def _first_order(
    sample: first_order.Sample | None, evaluation: Evaluation
) -> tuple[first_order.Radii | None, Tensor | None, FirstOrder | None]:
    """Return the radii at the first images, the smallest ℓ2 perturbations known there, and the comparison."""
    number = evaluation.geometry_images
    if sample is None or number == 0:
        return None, None, None
    sample = sample if number is None else sample.first(number)
    compared = first_order.compare(sample.radii, sample.smallest, sample.correct, l2_budgets(evaluation))
    return sample.radii, sample.smallest, compared


def _diagnosed(
    classifier: Classifier,
    sample: first_order.Sample | None,
    evaluation: Evaluation,
    progress: Path,
    attackers: Attackers,
) -> Any:
    """Measure the diagnostics, if there are any."""
    diagnostics = evaluation.diagnostics
    if sample is None or diagnostics is None:
        return None
    training, split = None, None
    with contextlib.suppress(UserError):  # a foreign model does not say on what; the files need not be on this machine
        trained_on = classifier.checkpoint.datamodule()
        trained_on.setup("fit")
        split = trained_on.split("train")
    if split is not None:
        images, labels = (tensor.to(device()) for tensor in split.first(diagnostics.images))
        title = f"geometry of {classifier.name}, training images"
        training = _sample(classifier, images, labels, title, evaluation, progress, attackers)
    return diagnostics.measure(classifier, sample.first(diagnostics.images), training, l2_budgets(evaluation))


def _other_images(datamodule: ImageDataModule, images: Tensor, evaluation: Evaluation) -> dict[str, Tensor]:
    """Return images of another kind: made from the evaluated ones, and the other data set where its files are."""
    found = reliability.transformed(images, seed=evaluation.seed, pictures=datamodule.pictures)
    if not datamodule.pictures:
        what = f"the points of {datamodule.data_name} are no pictures"
        Console().print(f"left out: rotated and inverted images, {what}", soft_wrap=True)
    if not isinstance(datamodule, MNISTDataModule):
        return found
    other = MNISTDataModule if isinstance(datamodule, FashionMNISTDataModule) else FashionMNISTDataModule
    shipped = ["data"] if other is MNISTDataModule else []
    for root in (str(datamodule.root), *shipped):
        elsewhere = other(root=root, validation_size=0)
        # In a folder of bare files the other set's are these ones.
        if elsewhere.files() not in (None, datamodule.files()):
            elsewhere.setup("test")
            found[elsewhere.data_name] = elsewhere.split("test").first(len(images))[0].to(images)
            break
    return found

"""Evaluate the robustness of a model: one plain function for those who have a model, images and labels."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor, nn

from jacobian_robust.attacks import PGD, Attack, check_pixels
from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.provenance import git_state, versions
from jacobian_robust.robustness.budgets import Sweep, sweep
from jacobian_robust.robustness.certificates import (
    CROWN,
    Certificate,
    Certified,
    IntervalBounds,
    Lipschitz,
    Smoothing,
    certify,
    require_certifiable,
    unattacked,
)
from jacobian_robust.robustness.prediction import Radii
from jacobian_robust.robustness.sanity import Check, Status, sanity_checks, verdict
from jacobian_robust.robustness.schema import (
    AttackOutcome,
    Budget,
    Certification,
    CertifiedBudget,
    ClassAccuracy,
    Model,
    Results,
    SanityCheck,
    Threat,
    groups,
    table_rows,
)
from jacobian_robust.robustness.workers import Attackers, full_precision, several

__all__ = [
    "Details",
    "RobustnessEvaluation",
    "evaluate_robustness",
    "image_rows",
    "model_results",
    "parameters",
    "results_of",
    "write_tables",
]


@dataclass(frozen=True)
class Details:
    """What is known of each image, for the figures and ``images.csv``.

    Attributes:
        name: of the model.
        labels: the true classes.
        confidence: the probability of each predicted class.
        sweeps: the attacks' results, one a norm.
        certified: what each certificate says.
        radii: the geometry at the first images, where it was asked for.
        smallest: the length of the smallest ℓ2 perturbation known there.
        pictures: whether the images are pictures, not points.
    """

    name: str
    labels: Int[Tensor, "images"]
    confidence: Float[Tensor, "images"]
    sweeps: list[Sweep]
    certified: list[Certified] = field(default_factory=list)
    radii: Radii | None = None
    smallest: Float[Tensor, "first"] | None = None
    pictures: bool = True


@dataclass(frozen=True)
class RobustnessEvaluation:
    """The result of :func:`evaluate_robustness`; ``print`` shows it as a table.

    Attributes:
        results: what ``robustness.json`` holds.
        details: what is known of each image.
    """

    results: Results
    details: Details

    @property
    def verdict(self) -> Status | None:
        """The worst status of the sanity checks; ``None`` if none were made."""
        return self.results.models[0].verdict

    @property
    def robust_accuracy(self) -> dict[float, float]:
        """The share of all images that are classified correctly under attack, by budget."""
        return {budget.eps: budget.robust_accuracy for budget in self.results.models[0].threats[0].budgets}

    def __str__(self) -> str:
        from jacobian_robust.reporting.console import print_results

        console = Console()
        with console.capture() as shown:
            print_results(self.results, [], console)
        return shown.get().rstrip()

    def save(self, directory: str | Path) -> None:
        """Write ``robustness.json``, ``robustness.csv``, ``images.csv``, ``report.html`` and the figures.

        Args:
            directory: made if need be.

        Raises:
            UserError: if it holds an evaluation already.
        """
        from jacobian_robust.reporting.evaluation import write_evaluation

        directory = Path(directory)
        if (directory / "robustness.json").exists():
            raise UserError(f"{directory} already holds a result (robustness.json): choose another directory")
        directory.mkdir(parents=True, exist_ok=True)
        write_evaluation(self.results, groups(self.results.models), [self.details], directory, config={})
        with write_atomically(directory / "robustness.json") as file:
            file.write(self.results.model_dump_json(indent=2))


def evaluate_robustness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: Sequence[float],
    *,
    norm: str = "linf",
    attacks: Sequence[str | Attack] | None = None,
    certificates: Sequence[str | Certificate] = (),
    family: Family = CATEGORICAL,
    seed: int = 0,
    sanity_images: int = 100,
    batch_size: int | None = None,
    processes: int = 1,
) -> RobustnessEvaluation:
    """Attack a model at several budgets, check the evaluation itself, and return the accounting.

    An image counts as robust at a budget only if no attack breaks it there. The model is put into evaluation mode and
    moved nowhere: images and labels are moved to its device; its mode and torch's random stream are left as they were.

    Args:
        model: returns logits ``(images, classes)`` for pixels in [0, 1].
        images: float pixels ``(images, …)`` in [0, 1].
        labels: the true classes, integers ``(images,)``; or the targets of the family.
        eps: radii of the ball, in units of pixels.
        norm: of the ball: ``linf`` or ``l2``.
        attacks: :class:`Attack` objects, whose own budgets are replaced by ``eps``, or the names ``pgd``, ``fgsm`` (ℓ∞
            only), ``square`` and ``autoattack``; by default the note's PGD: 40 steps of 0.01 in ℓ∞, of 0.1 in ℓ2.
        certificates: :class:`Certificate` objects or the names ``interval`` and ``crown`` (ℓ∞), ``lipschitz`` and
            ``smoothing`` (ℓ2); each says at which of the budgets an image is certified, and every attack tries it.
        family: of the distribution that the model's outputs describe; "correct" is what it calls right. Of another than
            the categorical one there are no certificates and no sanity checks, and PGD and FGSM alone.
        seed: of the attacks.
        sanity_images: how many images the sanity checks attack anew; 0 for no checks but that of the certificates.
        batch_size: images attacked at once; ``None`` for what suits the device.
        processes: how many attack; the results do not depend on it.

    Raises:
        UserError: if an argument is at fault; one line says which.
    """
    chosen = [attack.with_family(family) for attack in _attacks(attacks, norm, eps, batch_size)]
    certifying = _certificates(certificates)
    classification = isinstance(family, Categorical)
    if certifying and not classification:
        raise UserError("certificates: they are for classification alone; leave them out")
    unattacked(certifying, [attack.norm for attack in chosen])
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        images, labels = _inputs(model, images, labels, device, family)
        require_certifiable(certifying, model, images[:1])
        with full_precision(), several(processes, [model]) as attackers:
            kept = 8 if classification else 0
            swept = sweep(model, images, labels, chosen, seed=seed, examples=kept, attackers=attackers)
            if not classification:
                return _of_task(type(model).__name__, swept, chosen, seed, images)
            certified = [certify(model, images, labels, asked, eps, seed=seed) for asked in certifying]
            checks = _checks(model, images, labels, chosen, swept, certified, sanity_images, seed, attackers)
        with torch.no_grad():
            logits = torch.cat([model(chunk) for chunk in images.split(100)])
    finally:
        for module, mode in modes.items():
            module.training = mode
    name = type(model).__name__
    result = model_results(name, labels, [swept], checks, certified, classes=logits.shape[-1], data="given images")
    details = Details(name, labels, logits.softmax(-1).amax(-1), [swept], certified, pictures=images.ndim == 4)
    return RobustnessEvaluation(results_of([result], chosen, certifying, seed=seed, device=device.type), details)


def _of_task(name: str, swept: Sweep, attacks: Sequence[Attack], seed: int, images: Tensor) -> RobustnessEvaluation:
    """Return the evaluation of a model of another family, whose only classes are right, 0, and wrong, 1."""
    right = torch.zeros(len(images), dtype=torch.long, device=images.device)
    result = model_results(name, right, [swept], [], classes=1, data="given images")
    unknown = torch.full(right.shape, torch.nan, device=images.device)
    details = Details(name, right, unknown, [swept], pictures=images.ndim == 4)
    return RobustnessEvaluation(results_of([result], attacks, seed=seed, device=images.device.type), details)


def _checks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Sequence[Attack],
    swept: Sweep,
    certified: Sequence[Certified],
    sample: int,
    seed: int,
    attackers: Attackers,
) -> list[Check]:
    options: dict[str, Any] = {"certified": certified, "sample": sample, "seed": seed, "attackers": attackers}
    return sanity_checks(model, images, labels, attacks, [swept], **options)


def _certificates(certificates: Sequence[str | Certificate]) -> list[Certificate]:
    """Return the certificates that are given as objects or by their names in ``conf/certificate``."""
    makers = {"interval": IntervalBounds, "crown": CROWN, "lipschitz": Lipschitz, "smoothing": Smoothing}
    for certificate in certificates:
        if not isinstance(certificate, Certificate) and certificate not in makers:
            raise UserError(
                f"certificates: there is no {certificate!r}; choose of {', '.join(makers)}, or a Certificate"
            )
    found = [c if isinstance(c, Certificate) else makers[c](name=c) for c in certificates]
    if len({certificate.name for certificate in found}) < len(found):
        raise UserError("certificates: give each another name")
    return found


def _attacks(
    attacks: Sequence[str | Attack] | None, norm: str, eps: Sequence[float], batch_size: int | None
) -> list[Attack]:
    """Return the attacks at the budgets.

    Raises:
        UserError: if there is no such attack, or one is of another norm or of unfit budgets.
    """
    from jacobian_robust.attacks import FGSM, AutoAttack, Square

    if norm not in ("linf", "l2"):
        raise UserError(f"norm={norm!r}: choose linf or l2")
    budgets = tuple(float(radius) for radius in eps)
    if not budgets or not all(math.isfinite(radius) and radius >= 0 for radius in budgets):
        raise UserError(f"eps={list(eps)}: give one radius or more, all finite and not negative")
    common: dict[str, Any] = {"norm": norm, "eps": budgets, "batch_size": batch_size}
    # Named as in conf/attack: the name chooses the random stream, so that evaluate.py finds the same.
    suffix = "" if norm == "linf" else "_l2"
    makers = {
        "pgd": lambda: PGD(name=f"pgd_{norm}", steps=40, step_size=0.01 if norm == "linf" else 0.1, **common),
        "square": lambda: Square(name=f"square{suffix}", queries=1000, **common),
        "autoattack": lambda: AutoAttack(name=f"autoattack{suffix}", **common),
    } | ({"fgsm": lambda: FGSM(name="fgsm", **common)} if norm == "linf" else {})
    found = []
    for attack in ["pgd"] if attacks is None else attacks:
        if isinstance(attack, Attack):
            if attack.norm != norm:
                raise UserError(f"attacks: {attack.name} is an attack in {attack.norm}, not in {norm}")
            found.append(replace(attack, eps=budgets, batch_size=batch_size or attack.batch_size))
        elif attack in makers:
            found.append(makers[attack]())
        else:
            raise UserError(f"attacks: there is no {attack!r} in {norm}; choose of {', '.join(makers)}, or an Attack")
    if len({attack.name for attack in found}) < len(found) or not found:
        raise UserError("attacks: give one or more, each with another name")
    return found


def _inputs(
    model: nn.Module, images: Tensor, labels: Tensor, device: torch.device, family: Family
) -> tuple[Tensor, Tensor]:
    """Return images and labels on the device of the model.

    Raises:
        UserError: if they do not fit each other or the model.
    """
    if not images.is_floating_point() or images.ndim < 2 or not len(images):
        raise UserError(f"images: give float pixels (images, …), not {images.dtype} of shape {tuple(images.shape)}")
    check_pixels(images)
    classification = isinstance(family, Categorical)
    if classification and (
        labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool
    ):
        raise UserError(f"labels: give {len(images)} integers, not {labels.dtype} of shape {tuple(labels.shape)}")
    if labels.shape[:1] != images.shape[:1]:
        raise UserError(f"labels: give the targets of {len(images)} images, not a shape {tuple(labels.shape)}")
    images, labels = images.detach().to(device, torch.float32), labels.detach().to(device)
    labels = labels.long() if classification else labels
    with torch.no_grad():
        try:
            logits = model(images[:1])
        except Exception as error:  # a model can fail in any way
            text = " ".join(str(error).split())[:200]
            raise UserError(f"model: takes no image of shape {tuple(images.shape[1:])}: {text}") from error
    if not classification:
        return images, _require_targets(logits, labels, family)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise UserError("model: must return logits, a float tensor (images, classes)")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise UserError(f"labels: must be in [0, {logits.shape[1] - 1}], the model's classes")
    return images, labels


def _require_targets(outputs: Any, targets: Tensor, family: Family) -> Tensor:
    """Return the targets, if the model's outputs for the first image are of the family and they fit each other."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or not family.fits(outputs):
        raise UserError(f"model: must return {family.expects}, a float tensor")
    try:
        family.loss(outputs, targets[:1])
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"labels: are no targets of such outputs: {' '.join(str(error).split())[:200]}") from error
    return targets


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
    **known: Any,
) -> Model:
    """Return the accounting of one model.

    Args:
        name: of the model.
        labels: the true classes.
        sweeps: the attacks' results, one a norm.
        checks: the sanity checks.
        certified: what each certificate says.
        classes: number of classes.
        data: which images they are, in words.
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
        classes=_classes(labels, sweeps, classes),
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


def _classes(labels: Tensor, sweeps: Sequence[Sweep], classes: int) -> list[ClassAccuracy]:
    return [
        ClassAccuracy(
            label=label,
            images=int((labels == label).sum()),
            clean_correct=int((sweeps[0].predicted[labels == label] == label).sum()),
            robust_correct={
                swept.norm: [int(robust[labels == label].sum()) for robust in swept.robust] for swept in sweeps
            },
        )
        for label in range(classes)
    ]


def parameters(of: Attack | Certificate, kind: str = "attack") -> dict[str, Any]:
    """Return an attack's or a certificate's class, as ``kind``, and its parameters, as JSON has them."""
    parameters = {key: value for key, value in asdict(of).items() if key not in ("name", "family")}
    if isinstance(of, Attack) and not isinstance(of.family, Categorical):
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
        values: list[list[Any]] = [detail.labels.tolist(), detail.sweeps[0].predicted.tolist()]
        values.append([f"{confidence:.6g}" for confidence in detail.confidence.tolist()])
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

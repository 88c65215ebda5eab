"""Evaluate the robustness of a model: one plain function for those who have a model, images and labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from jacobian_robust.attacks import PGD, Attack, check_pixels
from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
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
from jacobian_robust.robustness.results import Details, model_results, pictured, results_of, task_of
from jacobian_robust.robustness.sanity import Check, Status, sanity_checks
from jacobian_robust.robustness.schema import (
    Results,
    Task,
    groups,
)
from jacobian_robust.robustness.workers import Attackers, full_precision, several

__all__ = ["RobustnessEvaluation", "evaluate_robustness"]


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
    task: Family = CATEGORICAL,
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
        task: the family of distributions that the model's outputs describe, as the configurations ``task=`` make it;
            "correct" is what it calls right. Of another than classification there are no AutoAttack and no certificates
            but ``interval``.
        seed: of the attacks.
        sanity_images: how many images the sanity checks attack anew; 0 for no checks but that of the certificates.
        batch_size: images attacked at once; ``None`` for what suits the device.
        processes: how many attack; the results do not depend on it.

    Raises:
        UserError: if an argument is at fault; one line says which.
    """
    chosen = [attack.with_family(task) for attack in _attacks(attacks, norm, eps, batch_size)]
    certifying = [certificate.with_family(task) for certificate in _certificates(certificates)]
    unattacked(certifying, [attack.norm for attack in chosen])
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        images, labels = _inputs(model, images, labels, device, task)
        require_certifiable(certifying, model, images[:1])
        with full_precision(), several(processes, [model]) as attackers:
            swept = sweep(model, images, labels, chosen, seed=seed, attackers=attackers)
            certified = [certify(model, images, labels, asked, eps, seed=seed) for asked in certifying]
            checks = _checks(model, images, labels, chosen, swept, certified, sanity_images, seed, attackers)
        judged, said = task_of(task, model, images, labels)
        classes, confidence = _confidence(model, images, judged)
        shown = pictured(model, images, labels, chosen, [swept], seed) if judged is not None else {}
    finally:
        for module, mode in modes.items():
            module.training = mode
    name = type(model).__name__
    if judged is not None:
        labels = torch.zeros_like(swept.predicted)
    result = model_results(name, labels, [swept], checks, certified, classes=classes, data="given images", task=judged)
    of_task: dict[str, Any] = {"family": task, "said": said, "pictured": shown}
    details = Details(name, labels, confidence, [swept], certified, pictures=images.ndim == 4, **of_task)
    return RobustnessEvaluation(results_of([result], chosen, certifying, seed=seed, device=device.type), details)


def _confidence(model: nn.Module, images: Tensor, task: Task | None) -> tuple[int, Tensor]:
    """Return the number of classes, and the probability of each predicted one; of another task, 0 and nan."""
    if task is not None:
        return 0, torch.full((len(images),), torch.nan, device=images.device)
    with torch.no_grad():
        logits = torch.cat([model(chunk) for chunk in images.split(100)])
    return logits.shape[-1], logits.softmax(-1).amax(-1)


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
            found.append(replace(attack, eps=budgets, eps_linf=None, batch_size=batch_size or attack.batch_size))
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
        return family.as_targets(targets, outputs.shape[1:])
    except ValueError as error:
        raise UserError(f"labels: {error}") from error

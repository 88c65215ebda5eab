"""Is a robust accuracy to be believed? Checks that run with every evaluation, each with a sentence why.

They look for what has made published defences fall: gradients that mislead the attack, losses that saturate, an attack
that was stopped early, a model that is not what it seems. Sources: N. Carlini et al., "On evaluating adversarial
robustness", 2019; F. Croce & M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", 2020.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from jacobian_robust.attacks import PGD, Attack, Square
from jacobian_robust.robustness import Sweep, is_allowed, predictions, sweep

__all__ = ["CHECKS", "Check", "Status", "sanity_checks", "verdict"]

CHECKS = 12
"""How many there are."""

Status = Literal["pass", "warn", "fail", "skip"]

FEW = 0.01
"""Share of the images up to which what a check finds is a warning, above which the check fails."""

UNCONVERGED = 0.05
"""The same for what a longer run of the same attack finds: a figure is an upper bound, and a little above is usual."""

SATURATED = 15.0
"""Lead of a logit (e^-15 = 3e-7) above which the float32 cross-entropy of an image has lost its digits."""

QUERIES = 300
"""Of the gradient-free attack."""

STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        name: of the check.
        status: ``skip`` where there was nothing to check with.
        why: a sentence.
    """

    name: str
    status: Status
    why: str


@dataclass(frozen=True)
class _Subject:
    """What is checked: the model, a sample of the evaluated images, and the attack."""

    model: nn.Module
    images: Float[Tensor, "sample *shape"]
    labels: Int[Tensor, "sample"]
    attack: Attack
    seed: int

    def __len__(self) -> int:
        return len(self.labels)

    def attacked(self, attack: Attack, images: Tensor, labels: Tensor) -> Sweep:
        return sweep(self.model, images, labels, attack, seed=self.seed, examples=0)

    def white_box(self, eps: float, *, steps: int) -> PGD:
        """A strong attack of the ball, whatever the evaluation's own."""
        return PGD(
            name="pgd",
            norm=self.attack.norm,
            eps=(eps,),
            steps=steps,
            step_size=max(2.5 * eps / steps, 1e-6),
            batch_size=self.attack.batch_size,
        )


def verdict(checks: Sequence[Check]) -> Status:
    """Return the worst status of the checks: ``fail``, ``warn`` or ``pass``."""
    found = {check.status for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def sanity_checks(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Int[Tensor, "images"],
    attack: Attack,
    result: Sweep,
    *,
    sample: int = 100,
    seed: int = 0,
    training_images: UInt8[Tensor, "training *shape"] | None = None,
    others: Sequence[nn.Module] = (),
    progress: Callable[[str], None] = lambda name: None,
) -> list[Check]:
    """Return the outcome of all checks of an evaluation. The model and torch's random stream are left as they were.

    Args:
        model: returns logits; on the device of the images.
        images: the evaluated images, pixels in [0, 1].
        labels: their true classes.
        attack: the attack of the evaluation.
        result: its result.
        sample: number of images, the first ones, for the checks that attack anew.
        seed: seed of these attacks.
        training_images: what the model was trained on, in steps of 1/255, where it is known.
        others: other models of the same task, from which examples are transferred.
        progress: called with the name of each check before it begins.
    """
    subject = _Subject(model, images[:sample], labels[:sample], attack, seed)
    checks: list[Check] = []

    def run(name: str, check: Callable[[], tuple[Status, str]]) -> None:
        progress(name)
        checks.append(Check(name, *check()))

    run("evaluation mode", lambda: _evaluation_mode(model))
    run("deterministic", lambda: _deterministic(subject))
    run("logits", lambda: _logits(subject))
    run("unseen images", lambda: _unseen(images, training_images))
    run("budget zero", lambda: _budget_zero(subject))
    run("monotone", lambda: _monotone(result))
    run("gradients", lambda: _gradients(subject))
    run("chance at a large budget", lambda: _chance(subject))
    survivors = _survivors(subject, result)
    # Each goes on with what withstood the ones before, so that an image is held against one cause only.
    run("convergence", lambda: _convergence(survivors))
    run("saturation", lambda: _saturation(survivors))
    run("gradient-free", lambda: _gradient_free(survivors))
    run("transfer", lambda: _transfer(survivors, others))
    return checks


def _share(count: int, of: int, few: float = FEW) -> Status:
    return "pass" if not count else "warn" if count <= few * of else "fail"


def _evaluation_mode(model: nn.Module) -> tuple[Status, str]:
    training = [name for name, module in model.named_modules() if module.training and isinstance(module, STOCHASTIC)]
    if training:
        return "fail", f"{training[0]} is in training mode: call model.eval() before the evaluation"
    return "pass", "no dropout or batch normalisation is in training mode"


def _outputs(subject: _Subject) -> Float[Tensor, "sample classes"]:
    with torch.no_grad():
        return torch.cat([subject.model(chunk) for chunk in subject.images.split(100)])


def _deterministic(subject: _Subject) -> tuple[Status, str]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        first, second = _outputs(subject), _outputs(subject)
    changed = int((first.argmax(-1) != second.argmax(-1)).sum())
    difference = (first - second).abs().max() / first.abs().max().clamp_min(torch.finfo(first.dtype).tiny)
    if changed or difference > 1e-3:
        return "fail", (
            f"asked twice, the model gives other logits (up to {difference:.1%} of the largest) and {changed} other "
            "classes: attack the mean over its randomness instead"
        )
    return "pass", "asked twice, the model gives the same answer"


def _logits(subject: _Subject) -> tuple[Status, str]:
    outputs = _outputs(subject).double()
    if (outputs >= 0).all() and ((outputs.sum(-1) - 1).abs() < 1e-4).all():
        return "fail", (
            "the outputs are probabilities (no row has a negative entry, all rows sum to 1): the attack's own softmax "
            "flattens its gradients; return logits"
        )
    return "pass", "the outputs are not probabilities"


def _unseen(images: Tensor, training_images: Tensor | None) -> tuple[Status, str]:
    if training_images is None:
        return "skip", "the training images are not known"
    seen = {image.tobytes() for image in training_images.numpy(force=True)}
    known = sum(image.tobytes() in seen for image in (images * 255).round().to(torch.uint8).numpy(force=True))
    if known > FEW * len(images):
        return "fail", f"{known} of {len(images)} images are training images"
    return ("warn" if known else "pass"), f"{known or 'none'} of {len(images)} images are training images"


def _budget_zero(subject: _Subject) -> tuple[Status, str]:
    few = subject.images[:20], subject.labels[:20]
    result = subject.attacked(replace(subject.attack, eps=(0.0,), restarts=1), *few)
    changed = result.clean_correct - result.budgets[0].correct
    if changed:
        return "fail", f"with a budget of 0 the attack changes {changed} of {result.clean_correct} predictions"
    return "pass", "with a budget of 0 the accuracy is the clean one"


def _monotone(result: Sweep) -> tuple[Status, str]:
    ordered = sorted(result.budgets, key=lambda budget: budget.eps)
    for smaller, larger in itertools.pairwise(ordered):
        gained = larger.correct - smaller.correct
        if gained > 0:
            return _share(gained, result.images), (
                f"at ε {larger.eps:g} {gained} more images stay correct than at {smaller.eps:g}: a larger ball "
                "contains the smaller one's examples, so the attack is not converged"
            )
    return "pass", "accuracy never rises with the budget"


def _gradients(subject: _Subject) -> tuple[Status, str]:
    zero = 0
    with torch.enable_grad(), torch.inference_mode(False):
        for images, labels in zip(subject.images.split(100), subject.labels.split(100), strict=True):
            inputs = images.clone().requires_grad_()
            loss = nn.functional.cross_entropy(subject.model(inputs), labels, reduction="sum")
            gradient = torch.autograd.grad(loss, inputs, allow_unused=True)[0] if loss.requires_grad else None
            zero += len(inputs) if gradient is None else int((gradient.flatten(1).abs().amax(-1) == 0).sum())
    if zero:
        return _share(zero, len(subject)), (
            f"the loss has a gradient of exactly zero at {zero} of {len(subject)} images: an attack by gradients "
            "cannot move them"
        )
    return "pass", "the loss has a gradient at every image"


def _chance(subject: _Subject) -> tuple[Status, str]:
    """At an ℓ∞ budget of 0.5 every image can become the same grey one, and none can tell their classes apart."""
    pixels = subject.images[0].numel()
    eps = 0.5 if subject.attack.norm == "linf" else 0.5 * math.sqrt(pixels)
    result = subject.attacked(subject.white_box(eps, steps=50), subject.images, subject.labels)
    most = int(subject.labels.bincount().max())  # what a constant answer gets right
    left = result.budgets[0].correct
    sentence = f"at ε {eps:g}, where all images can become one, {left} of {len(subject)} stay correct"
    if left > most:
        return "fail", f"{sentence}; no classifier can do better than {most}: the attack fails on this model"
    return "pass", sentence


@dataclass(frozen=True)
class _Survivors:
    """The images of the sample that withstood the attack at a budget; fewer after each check that breaks some."""

    subject: _Subject
    eps: float
    standing: Bool[Tensor, "sample"]

    def attacked_again(
        self, attacks: Sequence[tuple[Attack, nn.Module]], what: str, few: float = FEW
    ) -> tuple[Status, str]:
        """Attack them, each time along the gradients of the model that is named, and say how many fell to ``what``."""
        subject, before = self.subject, int(self.standing.sum())
        if not before:
            return "skip", "no image of the sample is left to break"
        for attack, model in attacks:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(subject.seed)
                for _ in range(attack.restarts):
                    left = self.standing.nonzero().squeeze(-1)
                    for chunk in left.split(attack.batch_size) if len(left) else ():
                        images, labels = subject.images[chunk], subject.labels[chunk]
                        adversarial = attack.perturb(model, images, labels, self.eps)
                        fallen = is_allowed(images, adversarial, attack.norm, self.eps)
                        fallen &= predictions(subject.model, adversarial) != labels
                        self.standing[chunk[fallen]] = False
        broken = before - int(self.standing.sum())
        stood = f"of the {before} images that stood at ε {self.eps:g}"
        return _share(broken, len(subject), few), f"{what} breaks {broken or 'none'} {stood}"


def _survivors(subject: _Subject, result: Sweep) -> _Survivors:
    """Return who withstood the largest budget that a tenth of the sample withstood, or else the most of them did."""
    sample = len(subject)
    by_budget = [(b.eps, r[:sample]) for b, r in zip(result.budgets, result.robust, strict=True) if b.eps > 0]
    if not by_budget:
        return _Survivors(subject, 0.0, result.robust[0][:sample] & False)
    enough = [(eps, robust) for eps, robust in by_budget if int(robust.sum()) >= sample / 10]
    if enough:
        eps, standing = max(enough, key=lambda pair: pair[0])
    else:
        eps, standing = max(by_budget, key=lambda pair: int(pair[1].sum()))
    return _Survivors(subject, eps, standing.clone())


def _convergence(survivors: _Survivors) -> tuple[Status, str]:
    subject, attack = survivors.subject, survivors.subject.attack
    harder, what = subject.white_box(survivors.eps, steps=100), "PGD of 100 steps"
    if isinstance(attack, PGD):
        harder = replace(attack, steps=2 * attack.steps, restarts=attack.restarts + 1)
        what = "twice the steps and one more start"
    return survivors.attacked_again([(harder, subject.model)], what, UNCONVERGED)


class _Rescaled(nn.Module):
    """A model whose logits are in double precision and divided by a constant: the same classes, another loss."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).double() / self.scale
        return logits


def _saturation(survivors: _Survivors) -> tuple[Status, str]:
    subject = survivors.subject
    top = _outputs(subject).double().topk(2, dim=-1).values
    lead = (top[:, 0] - top[:, 1]).median().item()
    if lead <= SATURATED:
        return "pass", f"the largest logit leads by {lead:.1f} in the median: the loss has its digits in float32"
    rescaled = (subject.white_box(survivors.eps, steps=50), _Rescaled(subject.model, lead))
    status, why = survivors.attacked_again([rescaled], "PGD on rescaled logits in float64")
    return status, f"the largest logit leads by {lead:.0f} in the median, where float32 loses the loss's digits; {why}"


def _gradient_free(survivors: _Survivors) -> tuple[Status, str]:
    attack = survivors.subject.attack
    square = Square(name="square", norm=attack.norm, eps=(survivors.eps,), queries=QUERIES)
    return survivors.attacked_again([(square, survivors.subject.model)], f"Square ({QUERIES} queries, no gradients)")


def _transfer(survivors: _Survivors, others: Sequence[nn.Module]) -> tuple[Status, str]:
    if not others:
        return "skip", "there is no other model to transfer examples from: evaluate two checkpoints together"
    attack = survivors.subject.white_box(survivors.eps, steps=50)
    return survivors.attacked_again([(attack, other) for other in others], "what breaks another model")

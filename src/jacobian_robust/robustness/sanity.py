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

from jacobian_robust.attacks import FAB, FGSM, PGD, SQUARES, Attack, AutoAttack, Ball, Norm, Square, Transfer
from jacobian_robust.robustness.budgets import Sweep, attack_standing, sweep
from jacobian_robust.robustness.workers import Attackers, one_by_one

__all__ = ["Check", "Status", "checks_of", "sanity_checks", "verdict"]

Status = Literal["pass", "warn", "fail", "skip"]

TOLERATED = 0.01
"""Share of the images up to which what a check finds is a warning, above which the check fails."""

UNCONVERGED, OF_STANDING = 0.05, 0.1
"""The same for what a longer run of the same attack breaks: a figure is an upper bound, and a little above is usual.
The one is a share of the sample, the other of the images looked at, those that stood; neither may be exceeded, but by
one image alone, however few there are."""

SATURATED = 15.0
"""Lead of a logit (e^-15 = 3e-7) above which the float32 cross-entropy of an image has lost its digits."""

DIFFERENT = 1e-3
"""Change of the logits between two answers to the same batch, as a share of the largest, that is no rounding."""

DIFFERENT_ALONE = 1e-2
"""The same for an image alone: kernels for another size of batch round in another way, on a GPU to three digits."""

ROUNDED = 2e-2
"""How far a sum of probabilities may be from 1, or from another constant as a share of it: half precision rounds."""

VARIED, ENOUGH = 0.5, 20
"""Range of a class's output, as a share of the most that it could be, and number of images from which on numbers that
are probabilities but for a constant, or for their sum, are no accident: a classifier's first, small logits can be."""

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


Outcome = tuple[Status, str]
"""Status and sentence."""


@dataclass(frozen=True)
class _Subject:
    """What is checked.

    Attributes:
        model: the model.
        evaluated: all images of the evaluation.
        images: the first of them, for the checks that attack anew.
        labels: their true classes.
        norm: of the ball.
        attacks: the attacks of the evaluation in that norm.
        result: their result.
        seed: of further attacks.
        training_images: what the model was trained on, where it is known.
        others: other models of the same task.
        eps: the budget at which further attacks try to break what withstood the evaluation's.
        standing: which images of the sample did; fewer after each check that breaks some, so that an image is held
            against one cause only.
        attackers: who attacks.
    """

    model: nn.Module
    evaluated: Float[Tensor, "images *shape"]
    images: Float[Tensor, "sample *shape"]
    labels: Int[Tensor, "sample"]
    norm: Norm
    attacks: Sequence[Attack]
    result: Sweep
    seed: int
    training_images: UInt8[Tensor, "training *shape"] | Float[Tensor, "training *shape"] | None
    others: Sequence[nn.Module]
    eps: float
    standing: Bool[Tensor, "sample"]
    attackers: Attackers

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ball(self) -> Ball:
        """The norm, of a check that attacks."""
        assert self.norm != "gaussian"
        return self.norm

    def outputs(self, batch_size: int = 100) -> Float[Tensor, "sample classes"]:
        with torch.no_grad():
            return torch.cat([self.model(chunk) for chunk in self.images.split(batch_size)])

    def white_box(self, eps: float, *, steps: int, kind: type[PGD] = PGD) -> PGD:
        """Return a strong attack of the ball, whatever the evaluation's own."""
        return kind(name="pgd", norm=self.ball, eps=(eps,), steps=steps, step_size=max(2.5 * eps / steps, 1e-6))

    def swept(self, attacks: Sequence[Attack], first: int | None = None) -> Sweep:
        """Return the result of other attacks of the first images, or of all."""
        images, labels = self.images[:first], self.labels[:first]
        return sweep(self.model, images, labels, attacks, seed=self.seed, examples=0, attackers=self.attackers)

    def attacked_again(
        self,
        attack: Attack,
        what: str,
        *,
        surrogates: Sequence[nn.Module] = (),
        tolerated: float | None = None,
    ) -> Outcome:
        """Attack what stands, following the surrogates or else the model itself, and say how many fell to ``what``.

        More than ``tolerated`` are a failure; by default, of the whole sample a hundredth.
        """
        before = int(self.standing.sum())
        if not before:
            return "skip", "no image of the sample is left to break"
        for _ in attack_standing(
            self.model,
            self.images,
            self.labels,
            self.standing,
            attack,
            self.eps,
            seed=self.seed,
            surrogates=surrogates or None,
            attackers=self.attackers,
        ):
            pass
        broken = before - int(self.standing.sum())
        status = _judged(broken, TOLERATED * len(self) if tolerated is None else tolerated)
        return status, f"{what} breaks {broken or 'none'} of the {before} images that stood at ε {self.eps:g}"


def verdict(checks: Sequence[Check]) -> Status:
    """Return the worst status of the checks: ``fail``, ``warn`` or ``pass``."""
    found = {check.status for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def sanity_checks(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Int[Tensor, "images"],
    attacks: Sequence[Attack],
    sweeps: Sequence[Sweep],
    *,
    sample: int = 100,
    seed: int = 0,
    training_images: UInt8[Tensor, "training *shape"] | Float[Tensor, "training *shape"] | None = None,
    others: Sequence[nn.Module] = (),
    progress: Callable[[str], None] = lambda name: None,
    attackers: Attackers = one_by_one,
) -> list[Check]:
    """Return the outcome of the checks of an evaluation. Model and random stream are left as they were.

    Args:
        model: returns logits; on the device of the images.
        images: the evaluated images, pixels in [0, 1].
        labels: their true classes.
        attacks: the attacks of the evaluation.
        sweeps: their result for each norm.
        sample: number of images, the first ones, for the checks that attack anew.
        seed: seed of these attacks.
        training_images: what the model was trained on, in steps of 1/255, where it is known.
        others: other models of the same task, from which examples are transferred.
        progress: called with the name of each check before it begins.
        attackers: who attacks.
    """
    subjects = {}
    for swept in sweeps:
        eps, standing = _hardest_budget(swept, len(labels[:sample]))
        subjects[swept.norm] = _Subject(
            model=model,
            evaluated=images,
            images=images[:sample],
            labels=labels[:sample],
            norm=swept.norm,
            attacks=[attack for attack in attacks if attack.norm == swept.norm],
            result=swept,
            seed=seed,
            training_images=training_images,
            others=others,
            eps=eps,
            standing=standing,
            attackers=attackers,
        )
    checks = []
    for name, check, norm in checks_of(list(subjects)):
        progress(name)
        checks.append(Check(name, *check(subjects[norm])))
    return checks


def checks_of(norms: Sequence[Norm]) -> list[tuple[str, "_Check", Norm]]:
    """Return the checks of an evaluation in some norms, by name and in order: those of the model, and of each ball."""
    balls = [norm for norm in norms if norm != "gaussian"]
    of_model = [(name, check, norms[0]) for name, check in MODEL_CHECKS.items()]
    return of_model + [
        (f"{name}, {_BALLS[norm]}" if len(balls) > 1 else name, check, norm)
        for norm in balls
        for name, check in BALL_CHECKS.items()
    ]


_BALLS: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2"}


def _hardest_budget(result: Sweep, sample: int) -> tuple[float, Bool[Tensor, "sample"]]:
    """Return the largest budget that a tenth of the sample withstood, or else the most of it, and which images did."""
    by_budget = [(b.eps, r[:sample]) for b, r in zip(result.budgets, result.robust, strict=True) if b.eps > 0]
    if not by_budget:
        return 0.0, torch.zeros_like(result.robust[0][:sample])
    enough = [(eps, robust) for eps, robust in by_budget if int(robust.sum()) >= sample / 10]
    if enough:
        eps, standing = max(enough, key=lambda pair: pair[0])
    else:
        eps, standing = max(by_budget, key=lambda pair: int(pair[1].sum()))
    return eps, standing.clone()


def _share(count: int, of: int) -> Status:
    return _judged(count, TOLERATED * of)


def _judged(count: int, tolerated: float) -> Status:
    return "pass" if not count else "warn" if count <= tolerated else "fail"


def _evaluation_mode(subject: _Subject) -> Outcome:
    modules = subject.model.named_modules()
    training = [name for name, module in modules if module.training and isinstance(module, STOCHASTIC)]
    if training:
        return "fail", f"{training[0]} is in training mode: call model.eval() before the evaluation"
    return "pass", "no dropout or batch normalisation is in training mode"


def _deterministic(subject: _Subject) -> Outcome:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        first, second = subject.outputs(), subject.outputs()
        apart = subject.outputs(batch_size=1)
    difference, changed = _difference(first, second)
    if changed or difference > DIFFERENT:
        return "fail", (
            f"asked twice, the model gives other logits (up to {difference:.1%} of the largest) and {changed} other "
            "classes: attack the mean over its randomness instead"
        )
    difference, changed = _difference(first, apart)
    if difference > DIFFERENT_ALONE:
        return "fail", (
            f"asked for each image alone, the model gives other logits (up to {difference:.1%} of the largest) and "
            f"{changed} other classes: the images of a batch influence each other, as in batch normalisation by the "
            "batch's own statistics"
        )
    return "pass", "asked twice, and for each image alone, the model gives the same answer"


def _difference(first: Tensor, second: Tensor) -> tuple[float, int]:
    """Return the largest change of a logit, as a share of the largest logit, and how many classes change."""
    difference = (first - second).abs().max() / first.abs().max().clamp_min(torch.finfo(first.dtype).tiny)
    return float(difference), int((first.argmax(-1) != second.argmax(-1)).sum())


def _logits(subject: _Subject) -> Outcome:
    outputs = subject.outputs().double()
    if without := int((~outputs.isfinite()).any(-1).sum()):
        return "fail", (
            f"the logits of {without} of {len(subject)} images are not finite: no class is predicted, and no loss to "
            "climb is defined; look for an overflow or a division by zero in the model"
        )
    positive, sums = bool((outputs >= 0).all()), outputs.sum(-1)
    flattened = "the attack's own softmax flattens its gradients; return logits"
    if positive and ((sums - 1).abs() < ROUNDED).all():
        return "fail", f"the outputs are probabilities (no row has a negative entry, all rows sum to 1): {flattened}"
    if not positive or len(subject) < ENOUGH:
        return "pass", "the outputs are not probabilities"
    varied, total = (outputs.amax(0) - outputs.amin(0)).max(), sums.mean()
    if (outputs <= 1).all() and varied > VARIED:
        return "warn", f"all outputs are in [0, 1], as after a sigmoid or a softmax that was clamped: then {flattened}"
    if ((sums - total).abs() < ROUNDED * total).all() and varied > VARIED * total:
        return "warn", (
            f"no output is negative and all rows sum to {total:.3g}, as probabilities times a constant do: then the "
            "attack's own softmax comes on top of the model's and misleads its gradients; return logits"
        )
    return "pass", "the outputs are not probabilities"


def _unseen(subject: _Subject) -> Outcome:
    if subject.training_images is None:
        return "skip", "the training images are not known"
    seen = {image.tobytes() for image in subject.training_images.numpy(force=True)}
    evaluated = subject.evaluated
    if not subject.training_images.is_floating_point():
        evaluated = (evaluated * 255).round().to(torch.uint8)
    known = sum(image.tobytes() in seen for image in evaluated.numpy(force=True))
    return _share(known, len(evaluated)), f"{known or 'none'} of {len(evaluated)} images are training images"


def _budget_zero(subject: _Subject) -> Outcome:
    cheap = [attack for attack in subject.attacks if isinstance(attack, PGD | FGSM)]
    nothing = [replace(attack, eps=(0.0,), restarts=1) for attack in cheap or [subject.white_box(0.0, steps=20)]]
    result = subject.swept(nothing, first=20)
    changed = result.clean_correct - result.budgets[0].correct
    if changed:
        return "fail", f"with a budget of 0 the attacks change {changed} of {result.clean_correct} predictions"
    return "pass", "with a budget of 0 the accuracy is the clean one"


def _monotone(subject: _Subject) -> Outcome:
    """Look at each budget on its own: the evaluation's own counts can only fall, unless its budgets are independent."""
    budgets = sorted({budget.eps for budget in subject.result.budgets if budget.eps > 0})
    anew = [subject.swept([subject.white_box(eps, steps=20)]).budgets[0] for eps in budgets]
    rises = [
        (larger.correct - smaller.correct, of, smaller.eps, larger.eps)
        for of, counts in ((subject.result.images, subject.result.budgets), (len(subject), anew))
        for smaller, larger in itertools.combinations(sorted(counts, key=lambda budget: budget.eps), 2)
    ]
    gained, of, smaller, larger = max(rises, key=lambda rise: rise[0] / rise[1], default=(0, 1, 0.0, 0.0))
    if gained > 0:
        return _share(gained, of), (
            f"at ε {larger:g} {gained} more images stay correct than at {smaller:g}: a larger ball contains the "
            "smaller one's examples, so the attack is not converged"
        )
    return "pass", "accuracy never rises with the budget, also where each is attacked on its own"


def _gradients(subject: _Subject) -> Outcome:
    zero = undefined = 0
    with torch.enable_grad(), torch.inference_mode(False):
        for images, labels in zip(subject.images.split(100), subject.labels.split(100), strict=True):
            inputs = images.clone().requires_grad_()
            loss = nn.functional.cross_entropy(subject.model(inputs), labels, reduction="sum")
            gradient = torch.autograd.grad(loss, inputs, allow_unused=True)[0] if loss.requires_grad else None
            largest = inputs.new_zeros(len(inputs)) if gradient is None else gradient.flatten(1).abs().amax(-1)
            zero += int((largest == 0).sum())
            undefined += int((~largest.isfinite()).sum())
    faults = []
    if undefined:
        faults.append(f"that is not finite at {undefined}: an attack by gradients cannot follow it")
    if zero:
        faults.append(f"of exactly zero at {zero}: an attack by gradients cannot move them")
    if faults:
        why = f"of {len(subject)} images the loss has a gradient {'; and one '.join(faults)}"
        return _share(zero + undefined, len(subject)), why
    return "pass", "the loss has a gradient at every image"


def _chance(subject: _Subject) -> Outcome:
    """At an ℓ∞ budget of 0.5 every image can become the same grey one, and none can tell their classes apart."""
    pixels = subject.images[0].numel()
    eps = 0.5 if subject.norm == "linf" else 0.5 * math.sqrt(pixels)
    attack = subject.white_box(eps, steps=50)
    result = subject.swept([attack])
    most = int(subject.labels.bincount().max())  # what a constant answer gets right
    left = result.budgets[0].correct
    sentence = f"at ε {eps:g}, where all images can become one, {left} of {len(subject)} stay correct"
    if left > most:
        return "fail", f"{sentence}; no classifier can do better than {most}: the attack fails on this model"
    return "pass", sentence


def _convergence(subject: _Subject) -> Outcome:
    """Attack what stood at one budget for longer.

    A warning is what breaks up to 5% of the sample and up to 10% of the images looked at, or one image alone; more is a
    failure. Where few stood, a small share of the sample is much of the figure.
    """
    standing = int(subject.standing.sum())
    harder, what = subject.white_box(subject.eps, steps=100), "PGD of 100 steps"
    own = [attack for attack in subject.attacks if isinstance(attack, PGD) and not isinstance(attack, Transfer)]
    if own:
        strongest = max(own, key=lambda attack: attack.steps * attack.restarts)
        harder = replace(strongest, name="harder", steps=2 * strongest.steps, restarts=strongest.restarts + 1)
        what = "twice the steps and one more start"
    tolerated = max(1.0, min(UNCONVERGED * len(subject), OF_STANDING * standing))
    status, why = subject.attacked_again(harder, what, tolerated=tolerated)
    if status == "skip":
        return status, why
    which = "largest budget that a tenth of the sample" if standing >= len(subject) / 10 else "budget that the most"
    return status, f"{why}, the {which} withstood"


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


def _saturation(subject: _Subject) -> Outcome:
    top = subject.outputs().double().topk(2, dim=-1).values
    leads = top[:, 0] - top[:, 1]
    saturated = leads > SATURATED
    if not saturated.any():
        return "pass", f"the largest logit leads by {leads.max():.1f} at most: the loss has its digits in float32"
    attack = subject.white_box(subject.eps, steps=50)
    rescaled = _Rescaled(subject.model, leads[saturated].median().item())
    status, why = subject.attacked_again(attack, "PGD on rescaled logits in float64", surrogates=[rescaled])
    return status, (
        f"the largest logit leads by more than {SATURATED:g} at {int(saturated.sum())} of {len(subject)} images, where "
        f"float32 loses the loss's digits; {why}"
    )


def _gradient_free(subject: _Subject) -> Outcome:
    if subject.ball == "l2" and min(subject.images.shape[-2:]) < SQUARES:
        return "warn", f"Square in ℓ2 tiles an image with {SQUARES} squares a side, and these have fewer pixels"
    square = Square(name="square", norm=subject.ball, eps=(subject.eps,), queries=QUERIES)
    again = subject.attacked_again(square, f"Square ({QUERIES} queries, no gradients)")
    return _with_the_evaluations_own(subject, Square, again)


def _transfer(subject: _Subject) -> Outcome:
    again: Outcome = ("warn", "there is no other model of such images to transfer examples from: name sanity_source")
    if subject.others:
        attack = subject.white_box(subject.eps, steps=50, kind=Transfer)
        again = subject.attacked_again(attack, "what breaks another model", surrogates=subject.others)
    return _with_the_evaluations_own(subject, Transfer, again)


def _with_the_evaluations_own(subject: _Subject, kind: type[Square | Transfer], again: Outcome) -> Outcome:
    """Return an outcome with what the evaluation's own attacks of a kind broke after gradients had been followed.

    It is a warning at most: those images count as broken already.
    """
    of = {attack.name: attack for attack in subject.attacks}
    worst = (0, 0, 0.0)
    for budget in subject.result.budgets:
        followed = False
        for made in budget.attacks:
            attack = of[made.attack]
            if followed and isinstance(attack, kind):
                worst = max(worst, (made.broken, made.met, budget.eps))
            followed |= isinstance(attack, PGD | AutoAttack | FAB) and not isinstance(attack, Transfer)
    broken, met, eps = worst
    status, why = again
    if not broken:
        return again
    return "fail" if status == "fail" else "warn", (
        f"at ε {eps:g} {broken} of the {met} images that gradients had left fell to the evaluation's own "
        f"{kind.__name__}; {why}"
    )


_Check = Callable[[_Subject], Outcome]

MODEL_CHECKS: dict[str, _Check] = {
    "evaluation mode": _evaluation_mode,
    "deterministic": _deterministic,
    "logits": _logits,
    "unseen images": _unseen,
    "gradients": _gradients,
}
"""The checks of a model and its images, by name."""

BALL_CHECKS: dict[str, _Check] = {
    "budget zero": _budget_zero,
    "monotone": _monotone,
    "chance at a large budget": _chance,
    "convergence": _convergence,
    "saturation": _saturation,
    "gradient-free": _gradient_free,
    "transfer": _transfer,
}
"""The checks of what was attacked in one norm, by name."""

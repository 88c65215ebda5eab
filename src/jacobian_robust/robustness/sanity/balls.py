"""Checks of what was attacked in one norm, most of which attack anew."""

import itertools
import math
from dataclasses import replace

from torch import Tensor, nn

from jacobian_robust.attacks import FAB, FGSM, PGD, SQUARES, AutoAttack, Square, Transfer
from jacobian_robust.robustness.sanity.base import Evaluated, Outcome, SanityCheck, share_judged

__all__ = ["BALL_CHECKS", "Rescaled"]

UNCONVERGED, OF_ROBUST = 0.05, 0.1
"""The same for what a longer run of the same attack breaks: a figure is an upper bound, and a little above is usual.
The one is a share of the sample, the other of its robust images; neither may be exceeded, but by one image alone,
however few there are."""

SATURATED = 15.0
"""Lead of a logit (e^-15 = 3e-7) above which the float32 cross-entropy of an image has lost its digits."""

QUERIES = 300
"""Of the gradient-free attack."""


def _budget_zero(evaluated: Evaluated) -> Outcome:
    cheap = [attack for attack in evaluated.attacks if isinstance(attack, PGD | FGSM)]
    cheap = cheap or [evaluated.white_box(0.0, steps=20)]
    nothing = [replace(attack, eps=(0.0,), eps_linf=None, restarts=1) for attack in cheap]
    result = evaluated.swept(nothing, first=20)
    changed = result.clean_correct - result.budgets[0].correct
    if changed:
        return "fail", f"with a budget of 0 the attacks change {changed} of {result.clean_correct} predictions"
    return "pass", "with a budget of 0 the accuracy is the clean one"


def _monotone(evaluated: Evaluated) -> Outcome:
    """Look at each budget on its own: the evaluation's own counts can only fall, unless its budgets are independent."""
    budgets = sorted({budget.eps for budget in evaluated.result.budgets if budget.eps > 0})
    anew = [evaluated.swept([evaluated.white_box(eps, steps=20)]).budgets[0] for eps in budgets]
    rises = [
        (larger.correct - smaller.correct, of, smaller.eps, larger.eps)
        for of, counts in ((evaluated.result.images, evaluated.result.budgets), (len(evaluated), anew))
        for smaller, larger in itertools.combinations(sorted(counts, key=lambda budget: budget.eps), 2)
    ]
    gained, of, smaller, larger = max(rises, key=lambda rise: rise[0] / rise[1], default=(0, 1, 0.0, 0.0))
    if gained > 0:
        return share_judged(gained, of), (
            f"at ε {larger:g} {gained} more images stay correct than at {smaller:g}: a larger ball contains the "
            "smaller one's examples, so the attack is not converged"
        )
    return "pass", "accuracy never rises with the budget, also where each is attacked on its own"


def _chance(evaluated: Evaluated) -> Outcome:
    """At an ℓ∞ budget of 0.5 every image can become the same grey one, and none can tell their classes apart."""
    pixels = evaluated.images[0].numel()
    eps = 0.5 if evaluated.norm == "linf" else 0.5 * math.sqrt(pixels)
    attack = evaluated.white_box(eps, steps=50)
    result = evaluated.swept([attack])
    most = evaluated.family.most_alike(evaluated.labels)  # what a constant answer gets right
    left = result.budgets[0].correct
    sentence = f"at ε {eps:g}, where all images can become one, {left} of {len(evaluated)} stay correct"
    if left > most:
        return "fail", f"{sentence}; no model can do better than {most}: the attack fails on this model"
    if most == len(evaluated):
        return "skip", f"{sentence}; but one answer could be right for all of them, so that nothing follows"
    return "pass", sentence


def _convergence(evaluated: Evaluated) -> Outcome:
    """Attack the robust images at one budget for longer.

    A warning is what breaks up to 5% of the sample and up to 10% of the images looked at, or one image alone; more is a
    failure. Where few are robust, a small share of the sample is much of the figure.
    """
    robust = int(evaluated.robust.sum())
    harder, what = evaluated.white_box(evaluated.eps, steps=100), "PGD of 100 steps"
    own = [attack for attack in evaluated.attacks if isinstance(attack, PGD) and not isinstance(attack, Transfer)]
    if own:
        strongest = max(own, key=lambda attack: attack.steps * attack.restarts)
        harder = replace(strongest, name="harder", steps=2 * strongest.steps, restarts=strongest.restarts + 1)
        what = "twice the steps and one more start"
    tolerated = max(1.0, min(UNCONVERGED * len(evaluated), OF_ROBUST * robust))
    status, why = evaluated.attacked_again(harder, what, tolerated=tolerated)
    if status == "skip":
        return status, why
    which = "largest budget with a tenth" if robust >= len(evaluated) / 10 else "budget with the most"
    return status, f"{why}, the {which} of the sample robust"


class Rescaled(nn.Module):
    """A model whose logits are in double precision and divided by a constant: the same classes, another loss."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Return the rescaled logits."""
        logits: Tensor = self.model(images).double() / self.scale
        return logits


def _saturation(evaluated: Evaluated) -> Outcome:
    leads = evaluated.family.leads(evaluated.outputs().double())
    if leads is None:
        return "pass", "a likelihood of numbers does not saturate: its slope is no difference of probabilities"
    saturated = leads > SATURATED
    if not saturated.any():
        return "pass", f"the largest logit leads by {leads.max():.1f} at most: the loss has its digits in float32"
    attack = evaluated.white_box(evaluated.eps, steps=50)
    rescaled = Rescaled(evaluated.model, leads[saturated].median().item())
    status, why = evaluated.attacked_again(attack, "PGD on rescaled logits in float64", surrogates=[rescaled])
    return status, (
        f"the largest logit leads by more than {SATURATED:g} at {int(saturated.sum())} of {len(evaluated)} images, "
        f"where float32 loses the loss's digits; {why}"
    )


def _gradient_free(evaluated: Evaluated) -> Outcome:
    if evaluated.ball == "l2" and min(evaluated.images.shape[-2:]) < SQUARES:
        return "warn", f"Square in ℓ2 tiles an image with {SQUARES} squares a side, and these have fewer pixels"
    square = Square(name="square", norm=evaluated.ball, eps=(evaluated.eps,), queries=QUERIES, family=evaluated.family)
    again = evaluated.attacked_again(square, f"Square ({QUERIES} queries, no gradients)")
    return _with_the_evaluations_own(evaluated, Square, again)


def _transfer(evaluated: Evaluated) -> Outcome:
    again: Outcome = ("warn", "there is no other model of such images to transfer examples from: name sanity_source")
    if evaluated.others:
        attack = evaluated.white_box(evaluated.eps, steps=50, kind=Transfer)
        again = evaluated.attacked_again(attack, "what breaks another model", surrogates=evaluated.others)
    return _with_the_evaluations_own(evaluated, Transfer, again)


def _with_the_evaluations_own(evaluated: Evaluated, kind: type[Square | Transfer], again: Outcome) -> Outcome:
    """Return an outcome with what the evaluation's own attacks of a kind broke after gradients had been followed.

    It is a warning at most: those images count as broken already.
    """
    of = {attack.name: attack for attack in evaluated.attacks}
    worst = (0, 0, 0.0)
    for budget in evaluated.result.budgets:
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
        f"at ε {eps:g} the evaluation's own {kind.__name__} breaks {broken} of the {met} images that gradients did "
        f"not; {why}"
    )


BALL_CHECKS: dict[str, SanityCheck] = {
    "budget zero": _budget_zero,
    "monotone": _monotone,
    "chance at a large budget": _chance,
    "convergence": _convergence,
    "saturation": _saturation,
    "gradient-free": _gradient_free,
    "transfer": _transfer,
}
"""The checks of what was attacked in one norm, by name."""

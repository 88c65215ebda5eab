"""Is a robust accuracy to be believed? Checks that run with every evaluation, each with a sentence why.

They look for what has misled published evaluations: gradients that mislead the attack, losses that saturate, an attack
that was stopped early, a model that is not what it seems. Sources: N. Carlini et al., "On evaluating adversarial
robustness", 2019; F. Croce & M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", 2020.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn

from jacobian_robust.attacks import Attack, Norm
from jacobian_robust.robustness.budgets import Sweep
from jacobian_robust.robustness.certificates import Certified
from jacobian_robust.robustness.sanity.balls import BALL_CHECKS
from jacobian_robust.robustness.sanity.base import Check, Evaluated, SanityCheck, Status
from jacobian_robust.robustness.sanity.certificates import certificate_check
from jacobian_robust.robustness.sanity.models import MODEL_CHECKS
from jacobian_robust.robustness.workers import Attackers, one_by_one

__all__ = ["BALL_CHECKS", "MODEL_CHECKS", "Check", "Status", "checks_of", "sanity_checks", "verdict"]


def verdict(checks: Sequence[Check]) -> Status:
    """Return the worst status of the checks: ``fail``, ``warn`` or ``pass``."""
    found = {check.status for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def sanity_checks(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Shaped[Tensor, "images *_"],
    attacks: Sequence[Attack],
    sweeps: Sequence[Sweep],
    *,
    certified: Sequence[Certified] = (),
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
        labels: their true classes, or the targets of the attacks' family.
        attacks: the attacks of the evaluation, all of one family.
        sweeps: their result for each norm.
        certified: what each certificate says; all of them are checked.
        sample: number of images, the first ones, for the checks that attack anew; 0 for no check but that the
            evaluation's attacks broke no certified image.
        seed: seed of these attacks.
        training_images: what the model was trained on, in steps of 1/255, where it is known.
        others: other models of the same task, from which examples are transferred.
        progress: called with the name of each check before it begins.
        attackers: who attacks.
    """
    models = {}
    for swept in sweeps:
        eps, robust = _hardest_budget(swept, len(labels[:sample]))
        models[swept.norm] = Evaluated(
            model=model,
            all_images=images,
            images=images[:sample],
            labels=labels[:sample],
            norm=swept.norm,
            attacks=[attack for attack in attacks if attack.norm == swept.norm],
            result=swept,
            seed=seed,
            training_images=training_images,
            others=others,
            eps=eps,
            robust=robust,
            attackers=attackers,
        )
    checks = []
    for name, check, norm in checks_of(list(models), certified, sample):
        progress(name)
        checks.append(Check(name, *check(models[norm])))
    return checks


def checks_of(
    norms: Sequence[Norm], certified: Sequence[Certified] = (), sample: int = 1
) -> list[tuple[str, SanityCheck, Norm]]:
    """Return the checks of an evaluation in some norms, by name and in order.

    Those of the certificates, which are made without a sample, too; and those of the model, and of each ball.
    """
    found: list[tuple[str, SanityCheck, Norm]] = [
        (f"certificate {of.certificate.name}", functools.partial(certificate_check, certified=of), of.certificate.norm)
        for of in certified
    ]
    if not sample:
        return found
    balls = [norm for norm in norms if norm != "gaussian"]
    found += [(name, check, norms[0]) for name, check in MODEL_CHECKS.items()]
    return found + [
        (f"{name}, {_BALLS[norm]}" if len(balls) > 1 else name, check, norm)
        for norm in balls
        for name, check in BALL_CHECKS.items()
    ]


_BALLS: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2"}


def _hardest_budget(result: Sweep, sample: int) -> tuple[float, Bool[Tensor, "sample"]]:
    """Return the largest budget at which a tenth of the sample is robust, or else the most of it, and these images."""
    by_budget = [(b.eps, r[:sample]) for b, r in zip(result.budgets, result.robust, strict=True) if b.eps > 0]
    if not by_budget:
        return 0.0, torch.zeros_like(result.robust[0][:sample])
    enough = [(eps, robust) for eps, robust in by_budget if int(robust.sum()) >= sample / 10]
    if enough:
        eps, left = max(enough, key=lambda pair: pair[0])
    else:
        eps, left = max(by_budget, key=lambda pair: int(pair[1].sum()))
    return eps, left.clone()

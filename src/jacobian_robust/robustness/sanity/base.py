"""What is checked, and how what a check finds is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn

from jacobian_robust.attacks import PGD, Attack, Ball, Norm
from jacobian_robust.geometry.families import Family
from jacobian_robust.robustness.budgets import Sweep, attack_standing, sweep
from jacobian_robust.robustness.workers import Attackers

__all__ = ["TOLERATED", "Check", "Evaluated", "Outcome", "SanityCheck", "Status", "judged", "share_judged"]

Status = Literal["pass", "warn", "fail", "skip"]

TOLERATED = 0.01
"""Share of the images up to which what a check finds is a warning, above which the check fails."""


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
class Evaluated:
    """What is checked.

    Attributes:
        model: the model.
        all_images: all images of the evaluation.
        images: the first of them, for the checks that attack anew.
        labels: their true classes, or the targets of the attacks' family.
        norm: of the ball.
        attacks: the attacks of the evaluation in that norm.
        result: their result.
        seed: of further attacks.
        training_images: what the model was trained on, where it is known.
        others: other models of the same task.
        eps: the budget at which further attacks try to break the images that the evaluation's attacks did not.
        robust: which images of the sample these are; fewer after each check that breaks some, so that an image
            counts for one cause only.
        attackers: who attacks.
    """

    model: nn.Module
    all_images: Float[Tensor, "images *shape"]
    images: Float[Tensor, "sample *shape"]
    labels: Shaped[Tensor, "sample *_"]
    norm: Norm
    attacks: Sequence[Attack]
    result: Sweep
    seed: int
    training_images: UInt8[Tensor, "training *shape"] | Float[Tensor, "training *shape"] | None
    others: Sequence[nn.Module]
    eps: float
    robust: Bool[Tensor, "sample"]
    attackers: Attackers

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ball(self) -> Ball:
        """The norm, of a check that attacks."""
        assert self.norm != "gaussian"
        return self.norm

    @property
    def family(self) -> Family:
        """Of the distribution that the model's outputs describe."""
        return self.attacks[0].family

    def outputs(self, batch_size: int = 100) -> Float[Tensor, "sample *outputs"]:
        """Return the logits of the sample."""
        with torch.no_grad():
            return torch.cat([self.model(chunk) for chunk in self.images.split(batch_size)])

    def white_box(self, eps: float, *, steps: int, kind: type[PGD] = PGD) -> PGD:
        """Return a strong attack of the ball, whatever the evaluation's own."""
        step_size = max(2.5 * eps / steps, 1e-6)
        return kind(name="pgd", norm=self.ball, eps=(eps,), steps=steps, step_size=step_size, family=self.family)

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
        """Attack the robust images, following the surrogates or else the model itself; say how many ``what`` breaks.

        More than ``tolerated`` are a failure; by default, of the whole sample a hundredth.
        """
        before = int(self.robust.sum())
        if not before:
            return "skip", "no image of the sample is still robust"
        for _ in attack_standing(
            self.model,
            self.images,
            self.labels,
            self.robust,
            attack,
            self.eps,
            seed=self.seed,
            surrogates=surrogates or None,
            attackers=self.attackers,
        ):
            pass
        broken = before - int(self.robust.sum())
        status = judged(broken, TOLERATED * len(self) if tolerated is None else tolerated)
        return status, f"{what} breaks {broken or 'none'} of the {before} robust images at ε {self.eps:g}"


def share_judged(count: int, of: int) -> Status:
    """Judge a number of images as a share of so many."""
    return judged(count, TOLERATED * of)


def judged(count: int, tolerated: float) -> Status:
    """Return ``pass`` for none, ``warn`` for what is tolerated, ``fail`` for more."""
    return "pass" if not count else "warn" if count <= tolerated else "fail"


SanityCheck = Callable[[Evaluated], Outcome]

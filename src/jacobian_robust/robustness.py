"""Sweeps of an attack over budgets, with an accounting that believes only what it has checked."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from jacobian_robust.attacks import Attack, Norm

__all__ = [
    "Attacked",
    "BudgetResult",
    "Examples",
    "Sweep",
    "attack_standing",
    "distances",
    "is_allowed",
    "predictions",
    "seeded",
    "sweep",
]

BALL_TOLERANCE = 1e-6
"""How far rounding may carry an example outside its ball; in ℓ2, times the radius where that is above 1."""


@dataclass(frozen=True)
class Examples:
    """Images that an attack broke, with the classes predicted before and after."""

    clean: Float[Tensor, "examples *shape"]
    adversarial: Float[Tensor, "examples *shape"]
    clean_class: Int[Tensor, "examples"]
    adversarial_class: Int[Tensor, "examples"]


@dataclass(frozen=True)
class BudgetResult:
    """What was left of the correct predictions at one budget.

    Attributes:
        eps: the budget.
        attacked: images attacked, those that the model classifies correctly.
        correct: attacked images that are still classified correctly.
        images: all images of the evaluation.
        discarded: examples that the attack returned outside the ball or outside [0, 1]; they break nothing.
    """

    eps: float
    attacked: int
    correct: int
    images: int
    discarded: int

    @property
    def share_of_attacked(self) -> float | None:
        """The note's convention: still correct among the images classified correctly; ``None`` where none was."""
        return self.correct / self.attacked if self.attacked else None

    @property
    def robust_accuracy(self) -> float:
        """The field's convention: still correct among all images."""
        return self.correct / self.images


@dataclass(frozen=True)
class Sweep:
    """The result of an attack at several budgets.

    Attributes:
        images: number of images.
        clean_correct: how many of them are classified correctly.
        predicted: the class predicted for each clean image.
        budgets: the counts at each budget.
        robust: for each budget, which images are classified correctly, clean and under attack.
        examples: for each budget, some images that the attack broke.
    """

    images: int
    clean_correct: int
    predicted: Int[Tensor, "images"]
    budgets: list[BudgetResult] = field(default_factory=list)
    robust: list[Bool[Tensor, "images"]] = field(default_factory=list)
    examples: list[Examples] = field(default_factory=list)

    @property
    def clean_accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return self.clean_correct / self.images


def predictions(model: nn.Module, images: Float[Tensor, "batch *shape"], batch_size: int = 100) -> Int[Tensor, "batch"]:
    """Return the predicted classes, with the model in the mode it is in."""
    with torch.no_grad():
        return torch.cat([model(chunk).argmax(-1) for chunk in images.split(batch_size)])


def distances(
    images: Float[Tensor, "batch *shape"], adversarial: Float[Tensor, "batch *shape"], norm: Norm
) -> Float[Tensor, "batch"]:
    """Return the ℓ∞ or ℓ2 distance of each pair."""
    return torch.linalg.vector_norm((adversarial - images).flatten(1), ord=2 if norm == "l2" else torch.inf, dim=-1)


def is_allowed(
    images: Float[Tensor, "batch *shape"], adversarial: Float[Tensor, "batch *shape"], norm: Norm, eps: float
) -> Bool[Tensor, "batch"]:
    """Return which attacked images are inside the ball around the clean one, up to rounding, and inside [0, 1]."""
    tolerance = BALL_TOLERANCE * (max(1.0, eps) if norm == "l2" else 1.0)
    pixels = adversarial.flatten(1)
    return (distances(images, adversarial, norm) <= eps + tolerance) & (pixels.amin(-1) >= 0) & (pixels.amax(-1) <= 1)


def sweep(
    model: nn.Module,
    images: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, "batch"],
    attack: Attack,
    *,
    seed: int = 0,
    independent: bool = False,
    examples: int = 8,
    progress: Callable[[int], None] = lambda attacked: None,
) -> Sweep:
    """Attack the correctly classified images at every budget, from the smallest to the largest.

    An example counts only if it is inside its ball and inside [0, 1] and the model, asked again, errs on it. A ball
    contains the smaller ones, so that an image that a smaller budget broke is not attacked again, nor is it by later
    restarts. Torch's global random stream is left as it was.

    Args:
        model: returns logits, in evaluation mode, on the device of the images.
        images: pixels in [0, 1].
        labels: the true classes.
        attack: the attack and its budgets.
        seed: seed of the attack, set anew for each budget.
        independent: attack all correct images anew at each budget, as if it were the only one: the protocol of the
            note's Table 1.
        examples: how many broken images to keep for each budget, first of those that it takes that budget to break.
        progress: called with the number of images after each batch: budgets × restarts × correct images in all.

    Raises:
        UserError: if a pixel is outside [0, 1].
    """
    predicted = predictions(model, images)
    correct = predicted == labels
    result = Sweep(images=len(images), clean_correct=int(correct.sum()), predicted=predicted)
    standing = correct.clone()
    broken: list[_Broken] = []
    by_budget = {}
    for eps in sorted(attack.eps):
        if independent:
            standing, broken = correct.clone(), []
        before, broken = broken, []
        discarded = 0
        spared = result.clean_correct * attack.restarts  # less those that a restart meets
        with seeded(seed):
            for batch in attack_standing(model, images, labels, standing, attack, eps):
                discarded += int((~batch.allowed).sum())
                for i in batch.fallen.nonzero().squeeze(-1)[: examples - len(broken)].tolist():
                    broken.append(_Broken(int(batch.indices[i]), batch.adversarial[i], int(batch.adversarial_class[i])))
                spared -= len(batch.indices)
                progress(len(batch.indices))
        progress(spared)
        broken += before[: examples - len(broken)]
        by_budget[eps] = (
            BudgetResult(eps, result.clean_correct, int(standing.sum()), len(images), discarded),
            standing.clone(),
            _gather(images, predicted, broken),
        )
    for eps in attack.eps:
        counts, robust, kept = by_budget[eps]
        result.budgets.append(counts)
        result.robust.append(robust)
        result.examples.append(kept)
    return result


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start torch's global random stream anew from a seed, and go on with the old one afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed reseeds them all
        torch.manual_seed(seed)
        yield


class Attacked(NamedTuple):
    """A batch that was attacked.

    Attributes:
        indices: which images they are.
        adversarial: what the attack made of them.
        adversarial_class: the classes predicted for that.
        allowed: whether it is inside the ball and inside [0, 1].
        fallen: whether it is, and the prediction is wrong.
    """

    indices: Int[Tensor, "batch"]
    adversarial: Float[Tensor, "batch *shape"]
    adversarial_class: Int[Tensor, "batch"]
    allowed: Bool[Tensor, "batch"]
    fallen: Bool[Tensor, "batch"]


def attack_standing(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Int[Tensor, "images"],
    standing: Bool[Tensor, "images"],
    attack: Attack,
    eps: float,
    *,
    surrogate: nn.Module | None = None,
) -> Iterator[Attacked]:
    """Attack the images that stand, start after start, and take those that fall out of ``standing``.

    Args:
        model: whose predictions count.
        images: pixels in [0, 1].
        labels: the true classes.
        standing: which images to attack; changed as they fall.
        attack: the attack.
        eps: radius of the ball, instead of the attack's own budgets.
        surrogate: the model whose answers the attack follows; by default the model itself.

    Raises:
        UserError: if a pixel is outside [0, 1].
    """
    for _ in range(attack.restarts):
        survivors = standing.nonzero().squeeze(-1)
        for index in survivors.split(attack.batch_size) if len(survivors) else ():
            adversarial = attack.perturb(surrogate or model, images[index], labels[index], eps)
            adversarial_class = predictions(model, adversarial)
            allowed = is_allowed(images[index], adversarial, attack.norm, eps)
            fallen = allowed & (adversarial_class != labels[index])
            standing[index[fallen]] = False
            yield Attacked(index, adversarial, adversarial_class, allowed, fallen)


class _Broken(NamedTuple):
    """An image, by its number, with what broke it."""

    image: int
    adversarial: Tensor
    adversarial_class: int


def _gather(images: Tensor, predicted: Tensor, broken: list[_Broken]) -> Examples:
    index = torch.tensor([b.image for b in broken], dtype=torch.long, device=images.device)
    adversarial = torch.stack([b.adversarial for b in broken]) if broken else images[:0]
    adversarial_class = torch.tensor([b.adversarial_class for b in broken], dtype=torch.long, device=images.device)
    return Examples(images[index], adversarial, predicted[index], adversarial_class)

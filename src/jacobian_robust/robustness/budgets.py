"""Sweeps of attacks over budgets, with an accounting that believes only what it has checked."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from jacobian_robust.attacks import Attack, Norm, distances
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.robustness.examples import Examples, gather, in_turn, sample_order
from jacobian_robust.robustness.workers import Attackers, Job, one_by_one

__all__ = [
    "AttackResult",
    "Attacked",
    "BudgetResult",
    "Journal",
    "Position",
    "Sweep",
    "attack_standing",
    "is_allowed",
    "judged",
    "predictions",
    "sweep",
]

BALL_TOLERANCE = 1e-6
"""How far rounding may carry an example outside its ball; in ℓ2, times the radius where that is above 1."""


@dataclass(frozen=True)
class AttackResult:
    """What one attack did at one budget.

    Attributes:
        attack: its name.
        met: images that it attacked, those still robust before it.
        broken: how many of them it broke.
        discarded: examples that it returned outside the ball or outside [0, 1]; they break nothing.
    """

    attack: str
    met: int
    broken: int
    discarded: int


@dataclass(frozen=True)
class BudgetResult:
    """What was left of the correct predictions at one budget, after all attacks.

    Attributes:
        eps: the budget.
        attacked: images attacked, those that the model classifies correctly.
        correct: attacked images that no attack broke, at this budget or at a smaller one, nor at a larger one by an
            example that lies in this ball (each budget on its own: at this one).
        images: all images of the evaluation.
        attacks: attack by attack, each on the images still robust after the one before.
    """

    eps: float
    attacked: int
    correct: int
    images: int
    attacks: tuple[AttackResult, ...] = ()

    @property
    def share_of_attacked(self) -> float | None:
        """The note's convention: still correct among the images classified correctly; ``None`` where none was."""
        return self.correct / self.attacked if self.attacked else None

    @property
    def robust_accuracy(self) -> float:
        """The field's convention: still correct among all images."""
        return self.correct / self.images

    @property
    def discarded(self) -> int:
        """Examples outside the ball or outside [0, 1], of all attacks."""
        return sum(attack.discarded for attack in self.attacks)


@dataclass(frozen=True)
class Sweep:
    """The result of attacks at several budgets of one norm.

    Attributes:
        norm: what the budgets bound.
        images: number of images.
        clean_correct: how many of them are classified correctly.
        predicted: the class predicted for each clean image.
        smallest: for each image the length, in that norm, of the smallest change that broke it; infinite where none
            did.
        budgets: the counts at each budget, in ascending order.
        robust: for each budget, which images are classified correctly, clean and under attack.
        examples: for each budget, some images that it took that budget to break.
        robust_examples: some images that no budget broke.
        wrong_examples: some images that are misclassified without an attack.
    """

    norm: Norm
    images: int
    clean_correct: int
    predicted: Int[Tensor, "images"]
    smallest: Float[Tensor, "images"]
    budgets: list[BudgetResult] = field(default_factory=list)
    robust: list[Bool[Tensor, "images"]] = field(default_factory=list)
    examples: list[Examples] = field(default_factory=list)
    robust_examples: Examples | None = None
    wrong_examples: Examples | None = None

    @property
    def clean_accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return self.clean_correct / self.images


def predictions(model: nn.Module, images: Float[Tensor, "batch *shape"], batch_size: int = 100) -> Int[Tensor, "batch"]:
    """Return the predicted classes, with the model in the mode it is in; -1, which is nobody's label, where one is nan.

    The largest of numbers among which one is nan would be that one: an image of the class in its place would be right,
    clean and under every attack.
    """
    with torch.no_grad():
        return torch.cat([CATEGORICAL.predict(model(chunk)) for chunk in images.split(batch_size)])


def judged(
    model: nn.Module,
    images: Float[Tensor, "batch *shape"],
    labels: Shaped[Tensor, "batch *_"],
    family: Family,
) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
    """Return what is predicted and what would be right, as classes: of another family, 0 is right and 1 is wrong."""
    if isinstance(family, Categorical):
        return predictions(model, images), labels
    with torch.no_grad():
        parts = zip(images.split(100), labels.split(100), strict=True)
        right = torch.cat([family.right(model(chunk), targets) for chunk, targets in parts])
    return (~right).long(), torch.zeros_like(right, dtype=torch.long)


def is_allowed(
    images: Float[Tensor, "batch *shape"], adversarial: Float[Tensor, "batch *shape"], norm: Norm, eps: float
) -> Bool[Tensor, "batch"]:
    """Return which attacked images are inside the ball around the clean one, up to rounding, and inside [0, 1].

    Noise of a given standard deviation has no ball to be inside of.
    """
    pixels = adversarial.flatten(1)
    allowed = (pixels.amin(-1) >= 0) & (pixels.amax(-1) <= 1)
    if norm == "gaussian":
        return allowed
    tolerance = BALL_TOLERANCE * (max(1.0, eps) if norm == "l2" else 1.0)
    return allowed & (distances(images, adversarial, norm) <= eps + tolerance)


class Position(NamedTuple):
    """How far an attack is.

    Attributes:
        start: number of the start, from 0.
        survivors: which images were still robust when it began.
        batch: number of the batch of these, from 0.
    """

    start: int
    survivors: Int[Tensor, "survivors"]
    batch: int


class Attacked(NamedTuple):
    """A batch that was attacked.

    Attributes:
        indices: which images they are.
        adversarial: what the attack made of them.
        adversarial_class: the classes predicted for that.
        allowed: whether it is inside the ball and inside [0, 1].
        fallen: whether it is allowed and misclassified.
        position: where the attack has got to.
    """

    indices: Int[Tensor, "batch"]
    adversarial: Float[Tensor, "batch *shape"]
    adversarial_class: Int[Tensor, "batch"]
    allowed: Bool[Tensor, "batch"]
    fallen: Bool[Tensor, "batch"]
    position: Position


def attack_standing(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Shaped[Tensor, "images *_"],
    standing: Bool[Tensor, "images"],
    attack: Attack,
    eps: float,
    *,
    seed: int = 0,
    surrogates: Sequence[nn.Module] | None = None,
    after: Position | None = None,
    attackers: Attackers = one_by_one,
) -> Iterator[Attacked]:
    """Attack the images of ``standing``, start after start, and take those that are broken out of it.

    Each batch has its own random stream, given by the seed and its place, so that going on ``after`` one of them is
    the same as not having stopped. Torch's global stream is left as it was.

    Args:
        model: whose predictions count.
        images: pixels in [0, 1].
        labels: the true classes, or the targets of the attack's family.
        standing: which images to attack; changed as they are broken.
        attack: the attack.
        eps: radius of the ball, instead of the attack's own budgets.
        seed: seed of the attack.
        surrogates: the models whose answers the attack follows, one after the other; by default the model itself.
        after: the last position that was dealt with; by default none was.
        attackers: who attacks; what they return is checked here, and the same whoever they are.

    Raises:
        UserError: if a pixel is outside [0, 1].
    """
    followed = [model] if surrogates is None else surrogates
    for start in range(after.start if after else 0, attack.restarts * len(followed)):
        resumed = after if after and after.start == start else None
        survivors = resumed.survivors if resumed else _easiest_first(model, images, labels, standing, attack.family)
        batches = survivors.split(attack.images_at_once(images.device)) if len(survivors) else ()
        left = list(enumerate(batches))[resumed.batch + 1 if resumed else 0 :]
        source = followed[start % len(followed)]
        jobs = (
            Job(source, attack, images[indices], labels[indices], eps, f"{seed} {attack.name} {eps!r} {start} {batch}")
            for batch, indices in left
        )
        for (batch, indices), adversarial in zip(left, attackers(jobs), strict=True):
            adversarial_class, true_class = judged(model, adversarial, labels[indices], attack.family)
            allowed = is_allowed(images[indices], adversarial, attack.norm, eps)
            fallen = allowed & (adversarial_class != true_class)
            standing[indices[fallen]] = False
            position = Position(start, survivors, batch)
            yield Attacked(indices, adversarial, adversarial_class, allowed, fallen, position)


def _easiest_first(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Shaped[Tensor, "images *_"],
    standing: Bool[Tensor, "images"],
    family: Family,
) -> Int[Tensor, "survivors"]:
    """Return the images to attack, by the lead of their logit: those broken early are in batches that end early."""
    survivors = standing.nonzero().squeeze(-1)
    if not len(survivors):
        return survivors
    with torch.no_grad():
        logits = torch.cat([model(images[chunk]) for chunk in survivors.split(100)])
    if not isinstance(family, Categorical):
        lead = family.signed_distance_to_boundary(logits, labels[survivors])
        return survivors[lead.argsort(stable=True)]
    own = labels[survivors, None]
    lead = logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).amax(-1)
    return survivors[lead.argsort(stable=True)]


@runtime_checkable
class Journal(Protocol):
    """Where a sweep notes how far it is, so that it can be resumed: plain containers and tensors."""

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, if anything was."""

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keep the state that a function returns, or leave it: called after every batch and every attack."""


def _silent(attack: str, eps: float, met: int, of: int, standing: int) -> None:
    pass


def sweep(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Shaped[Tensor, "images *_"],
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    independent: bool = False,
    examples: int = 10,
    surrogates: Mapping[str, Sequence[nn.Module]] | None = None,
    progress: Callable[[str, float, int, int, int], None] = _silent,
    journal: Journal | None = None,
    attackers: Attackers = one_by_one,
) -> Sweep:
    """Attack the correctly classified images at every budget, from the smallest to the largest, attack after attack.

    An example counts only if it is inside its ball and inside [0, 1] and the model, asked again, errs on it. A ball
    contains the smaller ones, so that an image that a smaller budget broke is not attacked again, nor is it by later
    attacks and restarts: what is robust at a budget is the worst case over all attacks, those at larger budgets among
    them, where their example lies in the smaller ball. Torch's global random stream is left as it was.

    Args:
        model: returns logits, in evaluation mode, on the device of the images.
        images: pixels in [0, 1].
        labels: the true classes, or the targets of the attacks' family.
        attacks: one or more, all of one norm and one family, each at its own budgets, in the order given.
        seed: seed of the attacks.
        independent: attack all correct images anew at each budget, as if it were the only one: the protocol of the
            note's Table 1.
        examples: how many broken images to keep for each budget, first of those that it takes that budget to break: a
            random sample, given by the seed, with all classes in turn.
        surrogates: by the name of an attack, the models that it follows instead of the attacked one.
        progress: called before the first batch and after each with the attack's name, the budget, the number of images
            that it attacked so far and at most (its starts times the robust ones), and how many are still robust.
        journal: where to note the state after each batch, and to go on from.
        attackers: who attacks the batches.

    Raises:
        UserError: if a pixel is outside [0, 1], or an attack is not for such images or so few classes.
        ValueError: if the attacks are of several norms.
    """
    (norm, *others) = {attack.norm for attack in attacks}
    if others:
        raise ValueError("a sweep is of one norm")
    with torch.no_grad():
        classes = model(images[:1]).shape[-1]
    attacks = [attack.for_images(images.shape[1:]) for attack in attacks]
    for attack in attacks:
        attack.require(classes, images.shape[1:])
    predicted, true_class = judged(model, images, labels, attacks[0].family)
    correct = predicted == true_class
    state = _State(correct.clone(), images.new_full((len(images),), torch.inf))
    if journal and (saved := journal.load()):
        state = _State.restored(saved, images.device)
    stages = _stages(attacks)
    first_in_turn = functools.partial(in_turn, order=sample_order(true_class, seed), labels=true_class.cpu())
    for number in range(state.stage, len(stages)):
        eps, attack = stages[number]
        if state.after is None:
            first = number == 0 or stages[number - 1][0] != eps
            state.begin(correct if independent and first else None, first=first)
        followed = (surrogates or {}).get(attack.name)
        of = attack.restarts * (len(followed) if followed is not None else 1) * state.stood
        if of:
            progress(attack.name, eps, state.met, of, int(state.standing.sum()))  # the first batch may take minutes
        for batch in attack_standing(
            *(model, images, labels, state.standing, attack, eps),
            seed=seed,
            surrogates=followed,
            after=state.after,
            attackers=attackers,
        ):
            state.take(batch, images, norm, eps, first_in_turn, examples)
            progress(attack.name, eps, state.met, of, int(state.standing.sum()))
            if journal:
                journal.save(state.saved)
        state.end(attack.name, eps, last=number + 1 == len(stages) or stages[number + 1][0] != eps)
        if journal:
            journal.save(state.saved)
    gathered = functools.partial(_gather, model, images, labels, predicted, true_class, attacks[0].family)
    result = _result(images, norm, predicted, correct, state, independent, examples, gathered)
    return _with_survivors(result, images, correct, first_in_turn, examples, gathered) if examples else result


def _stages(attacks: Sequence[Attack]) -> list[tuple[float, Attack]]:
    """Return each budget with each attack that has it, budget by budget."""
    budgets = sorted({eps for attack in attacks for eps in attack.eps})
    return [(eps, attack) for eps in budgets for attack in attacks if eps in attack.eps]


def _result(
    images: Float[Tensor, "images *shape"],
    norm: Norm,
    predicted: Int[Tensor, "images"],
    correct: Bool[Tensor, "images"],
    state: "_State",
    independent: bool,
    examples: int,
    gathered: Callable[[list["_Broken"]], Examples],
) -> Sweep:
    """Return the accounting of a sweep that is done."""
    result = Sweep(norm, len(images), int(correct.sum()), predicted, state.smallest)
    kept: list[_Broken] = []
    for eps, standing, attacks_made, broken in state.finished:
        if not independent and norm != "gaussian":
            # A larger budget may have led to an example that lies in a smaller ball.
            standing = standing & ~(state.smallest <= eps)
        counts = tuple(AttackResult(*made) for made in attacks_made)
        result.budgets.append(BudgetResult(eps, result.clean_correct, int(standing.sum()), len(images), counts))
        result.robust.append(standing)
        kept = broken + ([] if independent else kept)[: examples - len(broken)]
        result.examples.append(gathered(kept))
    return result


def _with_survivors(
    result: Sweep,
    images: Float[Tensor, "images *shape"],
    correct: Bool[Tensor, "images"],
    first: Callable[[Sequence[int]], list[int]],
    examples: int,
    gathered: Callable[[list["_Broken"]], Examples],
) -> Sweep:
    """Return a sweep with some of the images that nothing broke, and of those that were wrong before."""
    robust = torch.stack(result.robust).all(0) if result.robust else correct
    kept = []
    for which in (robust, ~correct):
        numbers = which.nonzero().flatten().tolist()
        kept.append(gathered([(numbers[place], images[numbers[place]]) for place in first(numbers)[:examples]]))
    return replace(result, robust_examples=kept[0], wrong_examples=kept[1])


_Broken = tuple[int, Tensor]
"""An image, by its number, and what broke it."""


@dataclass
class _State:
    """How far a sweep is.

    Attributes:
        standing: which images are not broken yet, at the current budget.
        smallest: length of the smallest change that broke each image.
        stage: number of the current attack at its budget.
        after: where that has got to.
        stood: how many images were still robust when it began.
        met: how many it attacked so far, each start counted.
        discarded: how many of its examples were not allowed.
        attacks: the fields of :class:`AttackResult` of the attacks at this budget so far.
        broken: examples of this budget.
        finished: eps, standing, attacks and broken of the budgets that are done with.
    """

    standing: Tensor
    smallest: Tensor
    stage: int = 0
    after: Position | None = None
    stood: int = 0
    met: int = 0
    discarded: int = 0
    attacks: list[tuple[str, int, int, int]] = field(default_factory=list)
    broken: list[_Broken] = field(default_factory=list)
    finished: list[tuple[float, Tensor, list[tuple[str, int, int, int]], list[_Broken]]] = field(default_factory=list)

    def saved(self) -> dict[str, Any]:
        """Return the state as plain containers and tensors."""
        return {**asdict(self), "after": self.after and self.after._asdict()}

    @classmethod
    def restored(cls, saved: Mapping[str, Any], device: torch.device) -> "_State":
        """Return the state that was saved."""
        after = saved["after"]
        return cls(
            **{
                **saved,
                "standing": saved["standing"].to(device),
                "smallest": saved["smallest"].to(device),
                "after": after and Position(after["start"], after["survivors"].to(device), after["batch"]),
                "finished": [(eps, standing.to(device), *rest) for eps, standing, *rest in saved["finished"]],
            }
        )

    def begin(self, standing: Tensor | None, *, first: bool) -> None:
        """Begin with an attack, the first of its budget or not, and from given images or from those still robust."""
        if standing is not None:
            self.standing = standing.clone()
        if first:
            self.attacks, self.broken = [], []
        self.stood, self.met, self.discarded = int(self.standing.sum()), 0, 0

    def take(
        self,
        batch: Attacked,
        images: Tensor,
        norm: Norm,
        eps: float,
        first: Callable[[Sequence[int]], list[int]],
        examples: int,
    ) -> None:
        """Count a batch, and keep the broken images that are first."""
        self.met += len(batch.indices)
        self.discarded += int((~batch.allowed).sum())
        fallen = batch.indices[batch.fallen]
        lengths = distances(images[fallen], batch.adversarial[batch.fallen], norm).clamp_max(
            torch.inf if norm == "gaussian" else eps
        )
        self.smallest[fallen] = torch.minimum(self.smallest[fallen], lengths)
        if examples:
            known = [*(image for image, _ in self.broken), *fallen.tolist()]
            made = batch.adversarial[batch.fallen]
            self.broken = [
                self.broken[place] if place < len(self.broken) else (known[place], made[place - len(self.broken)].cpu())
                for place in first(known)[:examples]
            ]
        self.after = batch.position

    def end(self, attack: str, eps: float, *, last: bool) -> None:
        """Count an attack that is done, the last of its budget or not, and go on to the next."""
        self.attacks.append((attack, self.stood, self.stood - int(self.standing.sum()), self.discarded))
        self.after = None
        if last:
            self.finished.append((eps, self.standing.clone(), self.attacks, self.broken))
        self.stage += 1


def _gather(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Shaped[Tensor, "images *_"],
    predicted: Int[Tensor, "images"],
    true_class: Int[Tensor, "images"],
    family: Family,
    broken: list[_Broken],
) -> Examples:
    index = torch.tensor([image for image, _ in broken], dtype=torch.long, device=images.device)
    adversarial = torch.stack([made.to(images.device) for _, made in broken]) if broken else images[index]
    return gather(model, images, labels, predicted, family, index, adversarial, true_class)

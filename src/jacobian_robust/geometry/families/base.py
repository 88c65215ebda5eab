"""What a family of distributions is, and the categorical one."""

import abc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.geometry import simplex
from jacobian_robust.geometry.factors import FisherFactor, tangent_directions
from jacobian_robust.options import STRICT

__all__ = [
    *("CATEGORICAL", "Categorical", "Factor", "Family", "Flat", "Outputs", "Targets"),
    *("OfClasses", "at_least_float32", "flat", "own_least"),
]

Outputs = Float[Tensor, "batch *shape"]
Targets = Shaped[Tensor, "batch *_"]
Flat = Float[Tensor, "batch n"]


@runtime_checkable
class Factor(Protocol):
    """``L`` with ``L Lᵀ = I(s)``, of each sample."""

    def __matmul__(self, w: Tensor) -> Tensor:
        """Return ``L w`` of vectors ``(…, batch, n)``."""

    def transposed(self, v: Tensor) -> Tensor:
        """Return ``Lᵀ v`` of vectors ``(batch, n)``."""


def flat(outputs: Shaped[Tensor, "batch *shape"]) -> Shaped[Tensor, "batch n"]:
    """Return the outputs of each sample as one vector; two-dimensional outputs are returned as they are."""
    return outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]


def at_least_float32(outputs: Tensor) -> Tensor:
    """Return the outputs, of the same shape, in single precision at least: half precision loses the norm's digits."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def own_least(lower: Outputs, upper: Outputs, targets: Targets) -> Outputs:
    """Return logits ``(batch, C, …)``: those of the true classes from ``lower``, all others from ``upper``."""
    own = nn.functional.one_hot(targets, lower.shape[1]).movedim(-1, 1).bool()
    return torch.where(own, lower, upper)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Family(abc.ABC):
    """A family of distributions, with what it means for a prediction to be right."""

    expects: ClassVar[str]
    """The outputs that the family takes, in words."""

    target_dtype: ClassVar[torch.dtype] = torch.float32
    """The type of the targets that the loss takes."""

    @abc.abstractmethod
    def fits(self, outputs: Tensor) -> bool:
        """Return whether outputs of this shape are parameters of the family."""

    def target_shape(self, outputs: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a sample's targets for the shape of its outputs."""
        return tuple(outputs)

    def target_range(self, outputs: Sequence[int]) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return which numbers may be targets, in words and as the test of each entry.

        Args:
            outputs: the shape of a model's outputs for one sample.
        """
        return "finite numbers", torch.isfinite

    def as_targets(self, targets: Shaped[Tensor, "samples *_"], outputs: Sequence[int]) -> Shaped[Tensor, "samples *_"]:
        """Return targets as the loss takes them, ``(samples, *target_shape)``.

        Args:
            targets: of any real type; ``(samples,)`` where there is one number a sample.
            outputs: the shape of a model's outputs for one sample.

        Raises:
            ValueError: if their shape, type or range does not fit; one line says what must be and what is.
        """
        shape, (wanted, fits) = self.target_shape(outputs), self.target_range(outputs)
        whole = not self.target_dtype.is_floating_point
        shaped = targets.shape[1:] == shape or (targets.ndim == 1 and math.prod(shape) == 1)
        found = f"{targets.dtype} of shape {tuple(targets.shape)}"
        if shaped and not targets.is_complex() and not (whole and targets.is_floating_point()):
            values = targets.long() if whole else targets.double()
            if fits(values).all():
                return values.to(self.target_dtype).reshape(-1, *shape)
            low, high = values.aminmax()
            found += f" from {low:g} to {high:g}"
        raise ValueError(f"the targets must be {wanted}, of shape {(len(targets), *shape)}, not {found}")

    @abc.abstractmethod
    def factor(self, outputs: Outputs) -> Factor:
        """Return ``L`` at the outputs, differentiable with respect to them."""

    @abc.abstractmethod
    def rank(self, outputs: Outputs) -> int:
        """Return the number of directions of a basis: the vector–Jacobian products of an exact norm."""

    @abc.abstractmethod
    def directions(self, outputs: Outputs, size: int, signs: Flat | None = None) -> Iterable[Flat]:
        """Return orthonormal directions ``w``, the most important first, and a random one of the rest.

        They are constants, and the derivative of ``Σ_w ‖(L w)ᵀ J_s‖²`` is right all the same.

        Args:
            outputs: the point; no graph is made.
            size: number of directions, from 0 to :meth:`rank`. All of them are a basis.
            signs: independent signs ``±1``, ``n`` a sample. With them one more direction follows, whose mean square is
                the projection onto the directions that are left.
        """

    def probes(self, outputs: Outputs, number: int, signs: Flat) -> Iterable[Flat]:
        """Return ``number`` directions whose ``Σ_w ‖(L w)ᵀ J_s‖²`` is an unbiased estimate of ``‖Lᵀ J_s‖_F²``."""
        return self.directions(outputs, number - 1, signs)

    @abc.abstractmethod
    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return the Fisher–Rao distance between the distributions of two outputs."""

    @abc.abstractmethod
    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return the signed distances to the boundaries of what is right; the prediction is where all are positive."""

    def signed_distance_to_boundary(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch"]:
        """Return the distance to the boundary of what is right for the targets: negative where the prediction is not.

        Differentiable with respect to the outputs.
        """
        return self.signed_distances(outputs, targets).amin(-1)

    def distance_to_boundary(self, outputs: Outputs) -> Float[Tensor, "batch"]:
        """Return the distance to where the prediction would not be right if it is now: ``d_B`` for any target."""
        return self.signed_distance_to_boundary(outputs, self.predict(outputs))

    @abc.abstractmethod
    def largest_distance(self, outputs: Outputs) -> float:
        """Return the least upper bound of the distance that stands in eq. 15, ``δ_m`` of the categorical family.

        Raises:
            ValueError: if there is none.
        """

    def nearest_boundaries(
        self, outputs: Outputs, targets: Targets, number: int | None
    ) -> Iterator[tuple[Float[Tensor, "batch"], Outputs]]:
        """Yield the signed distances to the nearest boundaries, and their derivatives with respect to the outputs.

        Both are differentiable once more.

        Args:
            outputs: with a graph.
            targets: what is right.
            number: how many boundaries; ``None``, or more than there are, means all.
        """
        distances = self.signed_distances(at_least_float32(outputs), targets)
        found = distances.topk(min(number or distances.shape[1], distances.shape[1]), largest=False).values
        for distance in found.unbind(-1):
            (slope,) = torch.autograd.grad(distance.sum(), outputs, create_graph=True)
            yield distance, slope

    @abc.abstractmethod
    def unreduced_loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch *_"]:
        """Return the negative log-likelihood of each entry of the targets, in nats."""

    def negative_log_likelihood(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch"]:
        """Return the negative log-likelihood of each sample's targets, in nats; ``I(s)`` is its expected Hessian."""
        return flat(self.unreduced_loss(outputs, targets)).sum(-1)

    def loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, ""]:
        """Return the mean negative log-likelihood over all entries of the targets, as PyTorch's losses do."""
        return self.unreduced_loss(outputs, targets).mean()

    @abc.abstractmethod
    def extremes(self, lower: Outputs, upper: Outputs, targets: Targets) -> Iterator[Outputs]:
        """Yield outputs that are the worst of the box ``lower ≤ s ≤ upper``, each entry of the targets at one of them.

        An entry's negative log-likelihood is nowhere in the box larger than at all of them, and what is right at all of
        them is right in the whole box.
        """

    def worst_loss(self, lower: Outputs, upper: Outputs, targets: Targets) -> Float[Tensor, "batch"]:
        """Return the mean over a sample's entries of the largest negative log-likelihood in the box."""
        losses = [self.unreduced_loss(outputs, targets) for outputs in self.extremes(lower, upper, targets)]
        return flat(torch.stack(losses).amax(0)).mean(-1)

    def leads(self, outputs: Outputs) -> Float[Tensor, "batch"] | None:
        """Return by how much, in each sample, the least certain entry's likeliest value leads: a difference of logits.

        ``None`` for a family whose loss does not saturate: it has its digits everywhere.
        """
        return None

    @abc.abstractmethod
    def most_alike(self, targets: Targets) -> int:
        """Return for how many of the targets one and the same answer can be right, at most."""

    @property
    def right_means(self) -> str:
        """What the share of right predictions is called: ``accuracy``, or what the task asks for, in words."""
        return "accuracy"

    def words(self, entry: Shaped[Tensor, "*_"]) -> str:
        """Return one sample's target, or prediction, as a reader wants it: numbers."""
        return " ".join(f"{value:.3g}" for value in entry.flatten().tolist())

    @abc.abstractmethod
    def predict(self, outputs: Outputs) -> Tensor:
        """Return the prediction, in the form of the targets; a class is -1 where an output is nan."""

    @abc.abstractmethod
    def hits(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch *_"]:
        """Return which entries of the targets are predicted right."""

    def right(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch"]:
        """Return which samples are predicted right, as a whole."""
        return flat(self.hits(outputs, targets)).all(-1)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OfClasses(Family):
    """A family whose targets are numbers of classes: outputs ``(batch, C, *shape)``, targets ``(batch, *shape)``."""

    target_dtype = torch.int64

    def target_shape(self, outputs: Sequence[int]) -> tuple[int, ...]:
        """Return the shape without its axis of classes."""
        return tuple(outputs[1:])

    def target_range(self, outputs: Sequence[int]) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return that a target is one of so many classes."""
        return f"integers from 0 to {outputs[0] - 1}", lambda targets: (targets >= 0) & (targets < outputs[0])


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Categorical(OfClasses):
    """One of ``C`` classes: ``θ = softmax(s)``, ``I = diag(θ) - θθᵀ``. Outputs ``(batch, C)``, targets ``(batch,)``.

    A prediction is right if the likeliest class is the target.
    """

    expects = "logits (batch, classes ≥ 2)"

    def fits(self, outputs: Tensor) -> bool:
        """Return whether there are logits of at least two classes."""
        return outputs.ndim == 2 and outputs.shape[1] >= 2

    def factor(self, outputs: Outputs) -> FisherFactor:
        """Return ``diag(√θ) - θ√θᵀ``."""
        return FisherFactor(outputs)

    def rank(self, outputs: Outputs) -> int:
        """Return ``C - 1``."""
        return outputs.shape[1] - 1

    def directions(self, outputs: Outputs, size: int, signs: Flat | None = None) -> list[Flat]:
        """Return directions of the likeliest classes (:func:`tangent_directions`)."""
        return tangent_directions(outputs, size, signs)

    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return ``2 arccos Σ√(θφ)``, in ``[0, π]``."""
        return simplex.fisher_rao_distance(first.softmax(-1), second.softmax(-1))

    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return ``2 arcsin((√θ_y - √θ_j)/√2)`` of the likeliest other class ``j``."""
        return simplex.signed_distance_to_boundary(outputs.softmax(-1), targets)[:, None]

    def distance_to_boundary(self, outputs: Outputs) -> Float[Tensor, "batch"]:
        """Return ``2 arcsin((√θ_(1) - √θ_(2))/√2)``."""
        return simplex.distance_to_boundary(outputs.softmax(-1))

    def largest_distance(self, outputs: Outputs) -> float:
        """Return ``δ_m``, the note's: of a vertex to the center."""
        return simplex.max_distance_to_center(outputs.shape[1])

    def nearest_boundaries(
        self, outputs: Outputs, targets: Targets, number: int | None
    ) -> Iterator[tuple[Float[Tensor, "batch"], Outputs]]:
        """Yield the distances to the likeliest other classes and their derivatives, in closed form.

        No root is differentiated where a probability underflows.
        """
        logits = at_least_float32(outputs)
        for difference in self.rivalries(outputs, targets, number):
            theta, roots = logits.softmax(-1), (logits.log_softmax(-1) / 2).exp()
            signed = roots * difference
            u = signed.sum(-1, keepdim=True) / math.sqrt(2)  # u² ≤ 1/2
            slope = (signed - u * math.sqrt(2) * theta) / (2 * (1 - u.square())).sqrt()
            yield 2 * u.squeeze(-1).asin(), slope

    def rivalries(self, outputs: Outputs, targets: Targets, number: int | None) -> Iterator[Shaped[Tensor, "batch n"]]:
        """Yield 1 for the true class and -1 for another, 0 elsewhere, of the ``number`` likeliest others."""
        classes = outputs.shape[1]
        own = nn.functional.one_hot(targets, classes)
        others = outputs.detach().masked_fill(own.bool(), -torch.inf)
        for rival in others.topk(min(number or classes, classes - 1), dim=-1).indices.unbind(-1):
            yield own - nn.functional.one_hot(rival, classes)

    def unreduced_loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch *_"]:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, ""]:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(outputs, targets)

    def extremes(self, lower: Outputs, upper: Outputs, targets: Targets) -> Iterator[Outputs]:
        """Yield the logits with the true class's least and the others' largest."""
        yield own_least(lower, upper, targets)

    def leads(self, outputs: Outputs) -> Float[Tensor, "batch"]:
        """Return by how much the largest logit leads."""
        top = outputs.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]

    def most_alike(self, targets: Targets) -> int:
        """Return the size of the largest class."""
        return int(targets.bincount().max())

    def predict(self, outputs: Outputs) -> Tensor:
        """Return the likeliest class; -1, which is nobody's label, where an output is nan.

        The largest of numbers among which one is nan would be that one: an image of the class in its place would be
        right, clean and under every attack.
        """
        return outputs.argmax(1).masked_fill(outputs.isnan().any(1), -1)

    def hits(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch *_"]:
        """Return where the likeliest class is the target."""
        return self.predict(outputs) == targets


CATEGORICAL = Categorical()

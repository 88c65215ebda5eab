"""Families of distributions whose parameters a model gives: metric, distance, boundary and likelihood of each.

A model gives the parameters ``s(x)`` of the distribution of its target. The Fisher metric ``I(s)`` of the family,
pulled back to the inputs, is ``J_sᵀ I(s) J_s`` with the Jacobian ``J_s`` of the outputs. With a factor ``I = L Lᵀ`` its
norms are those of ``Lᵀ J_s``, and one vector–Jacobian product with ``v = L z``, ``z`` random signs, has the mean square
``‖Lᵀ J_s‖_F²``, however many outputs there are. A family is the factor, the Fisher–Rao distance, the distance to the
boundary of what counts as right, and the negative log-likelihood.

The outputs of a batch are ``(batch, *shape)``. Factors and directions act on one flat vector a sample, ``(batch, n)``.
"""

import abc
import math
from collections.abc import Iterable, Iterator
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.geometry import simplex
from jacobian_robust.geometry.factors import FisherFactor, tangent_directions
from jacobian_robust.options import STRICT, Magnitude

__all__ = [
    "CATEGORICAL",
    "BernoulliProduct",
    "Categorical",
    "Factor",
    "Family",
    "Gaussian",
    "GaussianMeanScale",
    "PixelCategorical",
    "Poisson",
    "flat",
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


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Family(abc.ABC):
    """A family of distributions, with what it means for a prediction to be right."""

    expects: ClassVar[str]
    """The outputs that the family takes, in words."""

    @abc.abstractmethod
    def fits(self, outputs: Tensor) -> bool:
        """Return whether outputs of this shape are parameters of the family."""

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
        distances = self.signed_distances(_at_least_float32(outputs), targets)
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
    def predict(self, outputs: Outputs) -> Tensor:
        """Return the prediction, in the form of the targets; a class is -1 where an output is nan."""

    @abc.abstractmethod
    def hits(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch *_"]:
        """Return which entries of the targets are predicted right."""

    def right(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch"]:
        """Return which samples are predicted right, as a whole."""
        return flat(self.hits(outputs, targets)).all(-1)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Categorical(Family):
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
        logits = _at_least_float32(outputs)
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


class _PixelFactor:
    """The categorical factor of each pixel, on the vectors of a whole image."""

    def __init__(self, outputs: Outputs) -> None:
        self.samples, self.classes = outputs.shape[:2]
        self.factor = FisherFactor(_by_pixel(outputs.flatten(1), self.classes))

    def __matmul__(self, w: Tensor) -> Tensor:
        return _by_image(self.factor @ _by_pixel(w, self.classes), self.samples)

    def transposed(self, v: Tensor) -> Tensor:
        return _by_image(self.factor.transposed(_by_pixel(v, self.classes)), self.samples)


def _by_pixel(v: Tensor, classes: int) -> Tensor:
    """Return vectors ``(…, batch · pixels, classes)`` of ``(…, batch, classes · pixels)``."""
    return v.unflatten(-1, (classes, -1)).mT.flatten(-3, -2)


def _by_image(v: Tensor, samples: int) -> Tensor:
    """Return the inverse of :func:`_by_pixel`."""
    return v.unflatten(-2, (samples, -1)).mT.flatten(-2)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PixelCategorical(Family):
    """A class for each pixel, independent of each other. Outputs ``(batch, C, *pixels)``, targets ``(batch, *pixels)``.

    A prediction is right if a share of the pixels is. The distance to the boundary is exact: what it takes to change
    the cheapest pixels, so many that fewer than the share are right.

    Args:
        share: of the pixels that must be right, in (0, 1]; all of them by default.
    """

    expects = "logits (batch, classes ≥ 2, height, width)"

    share: Annotated[float, Field(gt=0, le=1)] = 1.0

    def fits(self, outputs: Tensor) -> bool:
        """Return whether there are logits of at least two classes for pixels."""
        return outputs.ndim >= 3 and outputs.shape[1] >= 2

    def factor(self, outputs: Outputs) -> Factor:
        """Return the categorical factor of each pixel."""
        return _PixelFactor(outputs)

    def rank(self, outputs: Outputs) -> int:
        """Return ``C - 1`` times the number of pixels."""
        return (outputs.shape[1] - 1) * outputs[0, 0].numel()

    def directions(self, outputs: Outputs, size: int, signs: Flat | None = None) -> Iterator[Flat]:
        """Yield the directions of single pixels, of the least confident ones and the likeliest classes first."""
        samples, classes = outputs.shape[:2]
        logits = _by_pixel(outputs.detach().flatten(1), classes)
        pixels = len(logits) // samples
        fields = [_by_image(field, samples) for field in tangent_directions(logits, -(-size // pixels))]
        doubt = 1 - _at_least_float32(logits).softmax(-1).amax(-1)
        order = doubt.view(samples, pixels).argsort(-1, descending=True)
        for number in range(size):
            field, pixel = fields[number // pixels], order[:, number % pixels]
            chosen = nn.functional.one_hot(pixel, pixels).to(field.dtype)
            yield (field.unflatten(-1, (classes, pixels)) * chosen[:, None]).flatten(1)
        if signs is None:
            return
        (left,) = tangent_directions(logits, 0, _by_pixel(signs, classes))
        rest = _by_image(left, samples)
        for direction in self.directions(outputs, size):
            rest = rest - (rest * direction).sum(-1, keepdim=True) * direction
        yield rest

    def probes(self, outputs: Outputs, number: int, signs: Flat) -> Iterator[Flat]:
        """Yield one random direction for each of ``number`` parts of the pixels: each halving halves the variance."""
        samples, classes = outputs.shape[:2]
        logits = _by_pixel(outputs.detach().flatten(1), classes)
        (whole,) = tangent_directions(logits, 0, _by_pixel(signs, classes))
        part = torch.arange(len(whole), device=whole.device) % (len(whole) // samples) % number
        for chosen in range(number):
            yield _by_image(whole * (part == chosen)[:, None], samples)

    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return the root of the sum of the pixels' squared distances."""
        of_pixels = simplex.fisher_rao_distance(first.movedim(1, -1).softmax(-1), second.movedim(1, -1).softmax(-1))
        return torch.linalg.vector_norm(of_pixels.flatten(1), dim=-1)

    def _needed(self, pixels: int) -> int:
        """Return how many pixels must be right."""
        return max(1, math.ceil(self.share * pixels - 1e-9))

    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return the distances of the pixels if all must be right, else the one distance of the image."""
        samples, classes = outputs.shape[:2]
        p = _by_pixel(outputs.flatten(1), classes).softmax(-1)
        of_pixels = simplex.signed_distance_to_boundary(p, targets.flatten()).view(samples, -1)
        needed = self._needed(of_pixels.shape[1])
        if needed == of_pixels.shape[1]:
            return of_pixels
        ordered = of_pixels.sort(dim=-1, descending=True).values
        lost = torch.linalg.vector_norm(ordered[:, needed - 1 :].relu(), dim=-1)
        missing = torch.linalg.vector_norm((-ordered[:, :needed]).relu(), dim=-1)
        return (lost - missing)[:, None]

    def largest_distance(self, outputs: Outputs) -> float:
        """Return ``π/2`` times the root of the number of pixels that have to change."""
        pixels = outputs[0, 0].numel()
        return math.pi / 2 * math.sqrt(pixels - self._needed(pixels) + 1)

    def unreduced_loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch *_"]:
        """Return the cross-entropy of each pixel."""
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def predict(self, outputs: Outputs) -> Tensor:
        """Return the likeliest class of each pixel; -1 where an output is nan."""
        return outputs.argmax(1).masked_fill(outputs.isnan().any(1), -1)

    def hits(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch *_"]:
        """Return the pixels whose likeliest class is the target."""
        return self.predict(outputs) == targets

    def right(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch"]:
        """Return the images of which the share is right."""
        hits = flat(self.hits(outputs, targets))
        return hits.sum(-1) >= self._needed(hits.shape[1])


class _DiagonalFactor:
    """``L = diag(√I)``."""

    def __init__(self, root: Flat) -> None:
        self.root = root

    def __matmul__(self, w: Tensor) -> Tensor:
        return self.root * w

    def transposed(self, v: Tensor) -> Tensor:
        return self.root * v


@dataclass(frozen=True, config=STRICT, kw_only=True)
class _Diagonal(Family):
    """A family whose Fisher metric is diagonal, of any number of independent outputs ``(batch, *shape)``."""

    expects = "parameters (batch, …)"

    def fits(self, outputs: Tensor) -> bool:
        """Return whether there is at least one output a sample."""
        return outputs.ndim >= 1 and outputs[:1].numel() >= 1

    @abc.abstractmethod
    def root_metric(self, outputs: Outputs) -> Outputs:
        """Return the root of the metric's diagonal."""

    def factor(self, outputs: Outputs) -> Factor:
        """Return ``diag(√I)``."""
        return _DiagonalFactor(flat(self.root_metric(_at_least_float32(outputs))))

    def rank(self, outputs: Outputs) -> int:
        """Return the number of outputs."""
        return outputs[0].numel()

    def directions(self, outputs: Outputs, size: int, signs: Flat | None = None) -> Iterator[Flat]:
        """Yield the directions of single outputs, those with the largest ``√I`` first."""
        root = flat(self.root_metric(_at_least_float32(outputs.detach())))
        leading = root.topk(size, dim=-1).indices
        for index in leading.unbind(-1):
            yield nn.functional.one_hot(index, root.shape[1]).to(root.dtype)
        if signs is not None:
            yield signs.to(root.dtype).scatter(-1, leading, 0.0)


def _entries(targets: Targets, of: Tensor) -> Tensor:
    """Return targets in the shape and type of what the model says of them.

    Raises:
        ValueError: if there are fewer or more.
    """
    if targets.shape[:1] != of.shape[:1] or targets.numel() != of.numel():
        raise ValueError(f"expected targets {tuple(of.shape)}, got {tuple(targets.shape)}")
    return targets.reshape(of.shape).to(of.dtype)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class BernoulliProduct(_Diagonal):
    """Independent yes-or-no labels: ``p = sigmoid(s)``, ``I = diag(p(1-p))``. Targets 0 or 1, in the outputs' shape.

    A prediction is right if all labels are. One output is binary classification.
    """

    def root_metric(self, outputs: Outputs) -> Outputs:
        """Return ``√(p(1-p))``."""
        return ((nn.functional.logsigmoid(outputs) + nn.functional.logsigmoid(-outputs)) / 2).exp()

    def _angle(self, outputs: Outputs) -> Flat:
        """Return ``2 arcsin√p - π/2``, the signed distance of each label to one half; its slope is ``√(p(1-p))``."""
        return 2 * (flat(outputs) / 4).tanh().atan()

    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return ``√Σ(2 arcsin√p - 2 arcsin√q)²``."""
        return torch.linalg.vector_norm(self._angle(first) - self._angle(second), dim=-1)

    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return ``±(2 arcsin√p_k - π/2)`` of each label."""
        return self._angle(outputs) * (2 * flat(_entries(targets, outputs)) - 1)

    def largest_distance(self, outputs: Outputs) -> float:
        """Return ``π/2``."""
        return math.pi / 2

    def unreduced_loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch *_"]:
        """Return the binary cross-entropy of each label."""
        return nn.functional.binary_cross_entropy_with_logits(outputs, _entries(targets, outputs), reduction="none")

    def predict(self, outputs: Outputs) -> Tensor:
        """Return the likelier value of each label; -1 where an output is nan."""
        return (outputs > 0).long().masked_fill(outputs.isnan(), -1)

    def hits(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch *_"]:
        """Return the labels whose likelier value is the target."""
        return self.predict(outputs) == _entries(targets, outputs)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class _Tolerant(_Diagonal):
    """A family of numbers, of which each must be within a tolerance of its target to be right.

    Args:
        tolerance: ``τ``, in units of the targets.
    """

    tolerance: Magnitude

    def hits(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch *_"]:
        """Return the numbers within the tolerance."""
        said = self.predict(outputs)
        return (said - _entries(targets, said)).abs() <= self.tolerance


def _gaussian_loss(mean: Tensor, log_sigma: Tensor, targets: Tensor) -> Tensor:
    standardised = (mean - targets) * (-log_sigma).exp()
    return standardised.square() / 2 + log_sigma + math.log(2 * math.pi) / 2


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Gaussian(_Tolerant):
    """Numbers with a known standard deviation: outputs are the means ``μ``, ``I = 1/σ²``. Targets as the outputs.

    Args:
        tolerance: ``τ``, in units of the targets.
        sigma: ``σ``, in units of the targets.
    """

    sigma: Magnitude = 1.0

    def root_metric(self, outputs: Outputs) -> Outputs:
        """Return ``1/σ``."""
        return torch.full_like(outputs, 1 / self.sigma)

    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return ``‖Δμ‖/σ``."""
        return torch.linalg.vector_norm(flat(first - second), dim=-1) / self.sigma

    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return ``(τ - |μ - y|)/σ`` of each number."""
        return (self.tolerance - flat(outputs - _entries(targets, outputs)).abs()) / self.sigma

    def largest_distance(self, outputs: Outputs) -> float:
        """Return ``τ/σ``."""
        return self.tolerance / self.sigma

    def unreduced_loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch *_"]:
        """Return ``(μ - y)²/(2σ²) + log σ + log(2π)/2``."""
        log_sigma = outputs.new_tensor(math.log(self.sigma))
        return _gaussian_loss(outputs, log_sigma, _entries(targets, outputs))

    def predict(self, outputs: Outputs) -> Tensor:
        """Return ``μ``."""
        return outputs


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GaussianMeanScale(_Tolerant):
    """Numbers with a standard deviation of the model's own: outputs ``(batch, 2K, *shape)`` are ``μ`` and ``log σ``.

    The first half of the second axis is ``μ``, the other ``log σ``; ``I = diag(1/σ², 2)``. Targets as ``μ``.
    """

    expects = "means and logarithms of standard deviations (batch, 2K, …)"

    def fits(self, outputs: Tensor) -> bool:
        """Return whether the outputs are two halves."""
        return outputs.ndim >= 2 and outputs.shape[1] >= 2 and outputs.shape[1] % 2 == 0

    def root_metric(self, outputs: Outputs) -> Outputs:
        """Return ``1/σ`` and ``√2``."""
        mean, log_sigma = outputs.chunk(2, dim=1)
        return torch.cat([(-log_sigma).exp(), torch.full_like(mean, math.sqrt(2))], dim=1)

    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return ``√2 ln((b+a)/(b-a))``, ``a² = Δμ² + 2(σ₁-σ₂)²``, ``b² = Δμ² + 2(σ₁+σ₂)²``; the root of the squares.

        Computed as ``2√2 arsinh(a/√(8σ₁σ₂))``, which is equal since ``b² - a² = 8σ₁σ₂``: exact for close ones.
        """
        (mean, log_sigma), (other, other_log_sigma) = first.chunk(2, dim=1), second.chunk(2, dim=1)
        shift = (mean - other) * (-(log_sigma + other_log_sigma) / 2).exp()
        growth = 2 * math.sqrt(2) * ((log_sigma - other_log_sigma) / 2).sinh()
        a = torch.linalg.vector_norm(torch.stack([flat(shift), flat(growth)]), dim=0)
        return 2 * math.sqrt(2) * torch.linalg.vector_norm((a / math.sqrt(8)).asinh(), dim=-1)

    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return ``√2 arsinh((τ - |μ - y|)/(√2 σ))`` of each number: to where ``μ`` is ``τ`` away, at any ``σ``."""
        mean, log_sigma = outputs.chunk(2, dim=1)
        left = (self.tolerance - (mean - _entries(targets, mean)).abs()) * (-log_sigma).exp()
        return math.sqrt(2) * flat((left / math.sqrt(2)).asinh())

    def largest_distance(self, outputs: Outputs) -> float:
        """Raise a ValueError: the distance grows as ``σ`` falls."""
        raise ValueError("delta_over_eps: no largest distance where a model gives σ; give eps")

    def unreduced_loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch *_"]:
        """Return ``(μ - y)²/(2σ²) + log σ + log(2π)/2``."""
        mean, log_sigma = outputs.chunk(2, dim=1)
        return _gaussian_loss(mean, log_sigma, _entries(targets, mean))

    def predict(self, outputs: Outputs) -> Tensor:
        """Return ``μ``."""
        return outputs.chunk(2, dim=1)[0]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Poisson(_Tolerant):
    """Counts: outputs are the logarithms ``s`` of the rates ``λ``, ``I = λ``. Targets as the outputs.

    A prediction is right if the rate is within the tolerance of the count: with 1/2, if it rounds to it.
    """

    tolerance: Magnitude = 0.5

    def root_metric(self, outputs: Outputs) -> Outputs:
        """Return ``√λ``."""
        return (outputs / 2).exp()

    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return ``2|√λ₁ - √λ₂|``; of several counts the root of the squares."""
        return 2 * torch.linalg.vector_norm(flat(self.root_metric(first) - self.root_metric(second)), dim=-1)

    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return the lesser of ``2(√(y+τ) - √λ)`` and, where ``y > τ``, ``2(√λ - √(y-τ))`` of each count."""
        root, counts = self.root_metric(outputs), _entries(targets, outputs)
        above = 2 * ((counts + self.tolerance).sqrt() - root)
        least = counts - self.tolerance
        positive = least > 0
        below = 2 * (root - torch.where(positive, least, 1.0).sqrt())
        return flat(torch.where(positive & (below < above), below, above))

    def largest_distance(self, outputs: Outputs) -> float:
        """Return ``2√τ``, the distance at the rate 0."""
        return 2 * math.sqrt(self.tolerance)

    def unreduced_loss(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch *_"]:
        """Return ``λ - y s + log y!``."""
        counts = _entries(targets, outputs)
        return outputs.exp() - counts * outputs + torch.lgamma(counts + 1)

    def predict(self, outputs: Outputs) -> Tensor:
        """Return ``λ``."""
        return outputs.exp()

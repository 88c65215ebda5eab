"""Families of independent outputs, whose Fisher metric is diagonal: labels, real numbers, counts."""

import abc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.geometry.families.base import (
    Factor,
    Family,
    Flat,
    Outputs,
    Targets,
    at_least_float32,
    flat,
)
from jacobian_robust.options import STRICT, Magnitude

__all__ = ["BernoulliProduct", "Gaussian", "GaussianMeanScale", "Poisson"]


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
        return _DiagonalFactor(flat(self.root_metric(at_least_float32(outputs))))

    def rank(self, outputs: Outputs) -> int:
        """Return the number of outputs."""
        return outputs[0].numel()

    def extremes(self, lower: Outputs, upper: Outputs, targets: Targets) -> Iterator[Outputs]:
        """Yield the two ends: each loss is convex in its output, and what is right is an interval of it."""
        yield lower
        yield upper

    def directions(self, outputs: Outputs, size: int, signs: Flat | None = None) -> Iterator[Flat]:
        """Yield the directions of single outputs, those with the largest ``√I`` first."""
        root = flat(self.root_metric(at_least_float32(outputs.detach())))
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

    def target_range(self, outputs: Sequence[int]) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return that a label is there or is not."""
        return "0 or 1", lambda targets: (targets == 0) | (targets == 1)

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

    def leads(self, outputs: Outputs) -> Float[Tensor, "batch"]:
        """Return the least ``|s_k|``."""
        return flat(outputs.abs()).amin(-1)

    def most_alike(self, targets: Targets) -> int:
        """Return how often the most frequent labels occur."""
        return int(flat(targets).unique(dim=0, return_counts=True)[1].max())

    @property
    def right_means(self) -> str:
        """What the share of right predictions is called."""
        return "share with all labels right"

    def words(self, entry: Shaped[Tensor, "*_"]) -> str:
        """Return the labels that are there."""
        return " ".join(str(label) for label in entry.flatten().nonzero().flatten().tolist()) or "–"

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

    def most_alike(self, targets: Targets) -> int:
        """Return how many targets an interval of twice the tolerance can hold; of several numbers, the fewest."""
        values = flat(targets).sort(dim=0).values.mT.contiguous()
        ends = torch.searchsorted(values, values + 2 * self.tolerance, right=True)
        return int((ends - torch.arange(values.shape[1], device=values.device)).amax(-1).amin())

    @property
    def right_means(self) -> str:
        """What the share of right predictions is called."""
        return f"share within {self.tolerance:g}"

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

    def target_shape(self, outputs: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the means, half of the outputs."""
        return (outputs[0] // 2, *outputs[1:])

    def extremes(self, lower: Outputs, upper: Outputs, targets: Targets) -> Iterator[Outputs]:
        """Yield the four corners of ``μ`` and ``log σ``."""
        means, log_sigmas = zip(lower.chunk(2, dim=1), upper.chunk(2, dim=1), strict=True)
        for mean, log_sigma in itertools.product(means, log_sigmas):
            yield torch.cat([mean, log_sigma], dim=1)

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
        raise ValueError("delta_over_eps: no largest distance where a model gives σ; give eps, and null for this")

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

    def target_range(self, outputs: Sequence[int]) -> tuple[str, Callable[[Tensor], Tensor]]:
        """Return that a target is a count."""
        return "whole numbers from 0", lambda targets: (targets >= 0) & (targets % 1 == 0)

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

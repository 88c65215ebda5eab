"""A class for each pixel."""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.geometry import simplex
from jacobian_robust.geometry.factors import FisherFactor, tangent_directions
from jacobian_robust.geometry.families.base import (
    Factor,
    Flat,
    OfClasses,
    Outputs,
    Targets,
    at_least_float32,
    flat,
    own_least,
)
from jacobian_robust.options import STRICT

__all__ = ["PixelCategorical"]


class _PixelFactor:
    """The categorical factor of each pixel, on the vectors of a whole image."""

    def __init__(self, outputs: Outputs) -> None:
        self.classes = outputs.shape[1]
        self.factor = FisherFactor(outputs.flatten(2), dim=-2)

    def __matmul__(self, w: Tensor) -> Tensor:
        return (self.factor @ w.unflatten(-1, (self.classes, -1))).flatten(-2)

    def transposed(self, v: Tensor) -> Tensor:
        return self.factor.transposed(v.unflatten(-1, (self.classes, -1))).flatten(-2)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PixelCategorical(OfClasses):
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
        logits = outputs.detach().flatten(2)
        pixels = logits.shape[2]
        fields = tangent_directions(logits, -(-size // pixels), dim=1)
        doubt = 1 - at_least_float32(logits).softmax(1).amax(1)
        order = doubt.argsort(-1, descending=True)
        for number in range(size):
            field, pixel = fields[number // pixels], order[:, number % pixels]
            chosen = nn.functional.one_hot(pixel, pixels).to(field.dtype)
            yield (field * chosen[:, None]).flatten(1)
        if signs is None:
            return
        (left,) = tangent_directions(logits, 0, signs.view_as(logits), dim=1)
        rest = left.flatten(1)
        for direction in self.directions(outputs, size):
            rest = rest - (rest * direction).sum(-1, keepdim=True) * direction
        yield rest

    def probes(self, outputs: Outputs, number: int, signs: Flat) -> Iterator[Flat]:
        """Yield one random direction for each of ``number`` parts of the pixels: each halving halves the variance."""
        logits = outputs.detach().flatten(2)
        (whole,) = tangent_directions(logits, 0, signs.view_as(logits), dim=1)
        part = torch.arange(logits.shape[2], device=logits.device) % number
        for chosen in range(number):
            yield (whole * (part == chosen)).flatten(1)

    def distance(self, first: Outputs, second: Outputs) -> Float[Tensor, "batch"]:
        """Return the root of the sum of the pixels' squared distances."""
        of_pixels = simplex.fisher_rao_distance(first.movedim(1, -1).softmax(-1), second.movedim(1, -1).softmax(-1))
        return torch.linalg.vector_norm(of_pixels.flatten(1), dim=-1)

    def _needed(self, pixels: int) -> int:
        """Return how many pixels must be right."""
        return max(1, math.ceil(self.share * pixels - 1e-9))

    def signed_distances(self, outputs: Outputs, targets: Targets) -> Float[Tensor, "batch boundaries"]:
        """Return the distances of the pixels if all must be right, else the one distance of the image."""
        p = outputs.flatten(2).softmax(1).mT  # not of the transposed: the softmax of the last axis is slow
        of_pixels = simplex.signed_distance_to_boundary(p, targets.flatten(1))
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

    def extremes(self, lower: Outputs, upper: Outputs, targets: Targets) -> Iterator[Outputs]:
        """Yield the logits with each pixel's true class's least and the others' largest."""
        yield own_least(lower, upper, targets)

    def leads(self, outputs: Outputs) -> Float[Tensor, "batch"]:
        """Return by how much the largest logit leads in the least certain pixel."""
        top = outputs.topk(2, dim=1).values
        return flat(top[:, 0] - top[:, 1]).amin(-1)

    def most_alike(self, targets: Targets) -> int:
        """Return how many targets differ from one of them in no more pixels than two right answers can."""
        masks = flat(targets)
        apart = 2 * (masks.shape[1] - self._needed(masks.shape[1]))
        return max(int(((masks != mask).sum(-1) <= apart).sum()) for mask in masks)

    @property
    def right_means(self) -> str:
        """What the share of right predictions is called."""
        return f"share with {100 * self.share:g}% of the pixels right"

    def words(self, entry: Shaped[Tensor, "*_"]) -> str:
        """Return the classes that occur."""
        return " ".join(str(label) for label in entry.unique().tolist())

    def predict(self, outputs: Outputs) -> Tensor:
        """Return the likeliest class of each pixel; -1 where an output is nan."""
        likeliest = outputs.max(1).indices  # argmax takes five times as long
        return likeliest.masked_fill(outputs.isnan().any(1), -1)

    def hits(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch *_"]:
        """Return the pixels whose likeliest class is the target."""
        return self.predict(outputs) == targets

    def right(self, outputs: Outputs, targets: Targets) -> Bool[Tensor, "batch"]:
        """Return the images of which the share is right."""
        hits = flat(self.hits(outputs, targets))
        return hits.sum(-1) >= self._needed(hits.shape[1])

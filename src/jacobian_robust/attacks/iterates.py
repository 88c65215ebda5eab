"""A model as an iterating attack sees it: images that are broken stand still, and the loss can be chosen."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family

__all__ = ["Loss", "Watched", "ended_early", "labels_for_library"]

Loss = Literal["cross_entropy", "margin", "dlr"]


class _Broken(Exception):
    """All images of a batch are broken."""


@contextlib.contextmanager
def ended_early() -> Iterator[None]:
    """Within the context, an attack may be ended by its model because all images of the batch are broken."""
    with contextlib.suppress(_Broken):
        yield


def labels_for_library(labels: Shaped[Tensor, "batch *_"], family: Family) -> Int[Tensor, "batch"]:
    """Return the classes that a library's attack moves away from: of another family, the first of two logits."""
    return labels if isinstance(family, Categorical) else labels.new_zeros(len(labels), dtype=torch.long)


class Watched(nn.Module):
    """A model as an iterating attack sees it, which remembers for each image the first iterate that broke it.

    Later iterates can change nothing about an image that is broken: it is not shown to the model again, stands still
    for want of a gradient, and once all are broken the attack is ended, by an exception.

    Args:
        model: returns logits.
        labels: the true classes of the attacked batch.
        loss: what the attack is to climb with the cross-entropy that is built into it.
        early_stop: whether to remember, and to end the attack; otherwise its last iterate counts.
        family: of the distribution that the model's outputs describe; ``labels`` are its targets.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Shaped[Tensor, "batch *_"],
        loss: Loss,
        early_stop: bool,
        family: Family = CATEGORICAL,
    ) -> None:
        super().__init__()
        self.model, self.labels, self.loss, self.early_stop, self.family = model, labels, loss, early_stop, family
        self.broken = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        self.first: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits to climb; 0 for images that are broken."""
        standing = (~self.broken).nonzero().squeeze(-1)
        whole = len(standing) == len(images)
        logits: Tensor = self.model(images if whole else images[standing])
        if self.early_stop:
            self._look(images.detach(), standing, logits.detach())
        climbed = _climbed(logits, self.labels[standing], self.loss, self.family)
        return climbed if whole else climbed.new_zeros(len(images), climbed.shape[1]).index_copy(0, standing, climbed)

    def _look(self, images: Tensor, standing: Tensor, logits: Tensor) -> None:
        # by more than what rounding makes of the same image in another batch
        if isinstance(self.family, Categorical):
            own = logits.gather(1, self.labels[standing, None]).squeeze(1)
            new = standing[logits.amax(-1) - own > 1e-5 * logits.abs().amax(-1)]
        else:
            new = standing[self.family.signed_distance_to_boundary(logits, self.labels[standing]) < -1e-5]
        self.first = images.clone() if self.first is None else self.first
        self.first[new] = images[new]
        self.broken[new] = True
        if self.broken.all():
            raise _Broken

    def result(self, last: Tensor | None) -> Tensor:
        """Return the iterates that broke an image, and the last ones of the others."""
        if self.first is None:
            assert last is not None  # nothing was looked at, so nothing was ended
            return last
        if last is None:
            return self.first
        return torch.where(self.broken.reshape(-1, *[1] * (last.ndim - 1)), self.first, last)


def _climbed(
    logits: Float[Tensor, "batch *outputs"], labels: Shaped[Tensor, "batch *_"], loss: Loss, family: Family
) -> Tensor:
    """Return logits whose cross-entropy has a gradient along that of another loss of the given ones.

    The libraries' PGD looks at the direction of each image's gradient alone, and climbs the cross-entropy. Two classes
    at equal logits, one of them carrying the loss's gradient, have a cross-entropy with half that gradient; no
    softmax of the model's own logits is left in it, which could saturate. So are the losses of the other families
    climbed, whose only "classes" are right and wrong.
    """
    if not isinstance(family, Categorical):
        if loss == "margin":
            value = -family.signed_distance_to_boundary(logits, labels)
        else:
            value = family.negative_log_likelihood(logits, labels)
        return torch.stack([torch.zeros_like(value), value - value.detach()], dim=-1)
    if loss == "cross_entropy":
        return logits
    ordered = logits.sort(dim=-1, descending=True)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    leads = ordered.indices[:, 0] == labels
    other = torch.where(leads, ordered.values[:, 1], ordered.values[:, 0])
    value = other - own
    if loss == "dlr":  # Croce and Hein (2020), eq. 4
        value = value / (ordered.values[:, 0] - ordered.values[:, 2]).clamp_min(torch.finfo(logits.dtype).tiny ** 0.5)
    climbed = torch.full_like(logits, -torch.inf)
    rows = torch.arange(len(labels), device=labels.device)
    climbed[rows, labels] = 0.0
    climbed[rows, labels - 1] = value - value.detach()  # any other class; -1 is the last
    return climbed

"""Certificates: for each image, at which budgets no change within the ball can alter the prediction.

The bounds are those of :mod:`jacobian_robust.bounds`. An image counts as certified if it is certified and correctly
classified. All but smoothing certify the network itself and are computed in double precision: sound over the reals,
and a lead of the true class that the rounding of float32 could use up is not counted.
"""

import abc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.attacks import Ball, Norm, check_pixels
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.options import STRICT, Count
from jacobian_robust.robustness.budgets import BALL_TOLERANCE, Journal, Sweep, predictions

__all__ = [
    "CROWN",
    "STOCHASTIC",
    "Bounded",
    "Certificate",
    "Certified",
    "IntervalBounds",
    "Lipschitz",
    "Smoothing",
    "certify",
    "require_certifiable",
    "unattacked",
]

ROUNDING = 1e-5
"""Lead of the true logit, as a share of the largest, and share of a radius, that float32 may have rounded away."""

STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""Layers whose training mode draws at random or lets images influence each other."""


class Bounded(NamedTuple):
    """What a certificate says of a batch.

    Attributes:
        correct: whether the certified classifier is right on the clean image.
        certified: whether it is right in the whole ball, by budget.
        radius: the certified radius; nan for a certificate that has none.
        abstained: whether it makes no prediction.
    """

    correct: Bool[Tensor, "batch"]
    certified: Bool[Tensor, "batch budgets"]
    radius: Float[Tensor, "batch"]
    abstained: Bool[Tensor, "batch"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Certificate(abc.ABC):
    """A certificate in one norm: a frozen set of parameters with one method, ``bound``.

    Args:
        name: how the certificate is called in results.
        norm: norm of the ball, which is clipped to [0, 1].
        batch_size: images at once; ``None`` for the certificate's own number.
        family: of the distribution that the model's outputs describe; :meth:`with_family` sets it.
    """

    name: str
    norm: Ball
    batch_size: Count | None = None
    family: Family = CATEGORICAL

    any_family: ClassVar[bool] = False
    """Whether it is for outputs of every family, not for class logits alone."""

    smoothed: ClassVar[bool] = False
    """Whether it certifies the smoothed classifier in place of the network."""

    at_once: ClassVar[int] = 100

    def with_family(self, family: Family) -> "Certificate":
        """Return the certificate of models whose outputs are parameters of a family.

        Raises:
            UserError: if it is of class logits alone.
        """
        if not (self.any_family or isinstance(family, Categorical)):
            raise UserError(
                f"certificate.{self.name}: this certificate is for classification alone; choose certificate=interval"
            )
        return replace(self, family=family)

    def samples_of(self, images: int) -> int:
        """Return how many noisy images are classified for so many images."""
        return 0

    def cheaper(self) -> "Certificate":
        """Return a certificate that fails where this one does, for a trial on one image."""
        return self

    @abc.abstractmethod
    def bound(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch *shape"],
        labels: Shaped[Tensor, "batch *_"],
        eps: Sequence[float],
        stream: str,
    ) -> Bounded:
        """Return what holds in the balls of radii ``eps`` around a batch of images.

        Args:
            model: returns logits, in evaluation mode, on the device of the images.
            images: pixels in [0, 1].
            labels: the true classes, or the family's targets.
            eps: the budgets, in units of pixels.
            stream: a text that gives the random stream of this batch.

        Raises:
            ValueError: if the model has a layer without a rule; it is named.
        """


def _by_boxes(family: Family, model: nn.Module, images: Tensor, targets: Tensor, eps: Sequence[float]) -> Bounded:
    """Return what bounds of the outputs say of another family: right for all outputs of the box, with room to round."""
    from jacobian_robust.bounds import output_box, right_in_box

    outputs = model(images)
    correct = family.right(outputs, targets)
    slack = ROUNDING * outputs.double().abs().flatten(1).amax(-1)
    slack = slack.view(-1, *[1] * (outputs.ndim - 1))
    certified = []
    for radius in eps:
        lower, upper = output_box(model, images, targets, radius + BALL_TOLERANCE, family, float64=True)
        certified.append(correct & right_in_box(family, lower - slack, upper + slack, targets))
    radii = torch.full(correct.shape, torch.nan, dtype=torch.float64, device=images.device)
    return Bounded(correct, torch.stack(certified, -1), radii, torch.zeros_like(correct))


Margins = Callable[..., Float[Tensor, "batch classes"]]


def _by_margins(margins: Margins, model: nn.Module, images: Tensor, labels: Tensor, eps: Sequence[float]) -> Bounded:
    logits = model(images)
    slack = ROUNDING * logits.abs().amax(-1)
    others = nn.functional.one_hot(labels, logits.shape[-1]) == 0
    correct = predictions(model, images) == labels
    certified = []
    for radius in eps:
        upper = margins(model, images, labels, radius + BALL_TOLERANCE, float64=True)
        certified.append(correct & (upper.masked_fill(~others, -torch.inf).amax(-1) < -slack))
    radii = torch.full_like(slack, torch.nan, dtype=torch.float64)
    return Bounded(correct, torch.stack(certified, -1), radii, torch.zeros_like(correct))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class IntervalBounds(Certificate):
    """Interval bound propagation (Gowal et al., 2018), with the last linear layer merged with the difference.

    Of another family than the categorical one a prediction is certified if it is right for all outputs in their bounds.
    """

    at_once: ClassVar[int] = 500
    any_family: ClassVar[bool] = True

    norm: Literal["linf"] = "linf"

    def bound(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Sequence[float], stream: str) -> Bounded:
        """See :class:`Certificate`."""
        from jacobian_robust.bounds import margin_bounds  # not at the top: SciPy takes a second

        if not isinstance(self.family, Categorical):
            return _by_boxes(self.family, model, images, labels, eps)
        return _by_margins(margin_bounds, model, images, labels, eps)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CROWN(Certificate):
    """Backward linear bounds on interval bounds (CROWN-IBP, Zhang et al., 2020): tighter, and dearer."""

    at_once: ClassVar[int] = 20

    norm: Literal["linf"] = "linf"

    def bound(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Sequence[float], stream: str) -> Bounded:
        """See :class:`Certificate`."""
        from jacobian_robust.bounds import crown_margin_bounds

        return _by_margins(crown_margin_bounds, model, images, labels, eps)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Lipschitz(Certificate):
    """The margin over an upper bound of the network's l2 Lipschitz constant, pair of classes by pair of classes."""

    at_once: ClassVar[int] = 500

    norm: Literal["l2"] = "l2"

    def bound(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Sequence[float], stream: str) -> Bounded:
        """See :class:`Certificate`."""
        from jacobian_robust.bounds import lipschitz_margin

        radius = lipschitz_margin(model, images, labels) * (1 - ROUNDING)
        correct = predictions(model, images) == labels
        return _by_radius(correct, radius.where(correct, 0.0).clamp_min(0), eps)


def _by_radius(correct: Tensor, radius: Tensor, eps: Sequence[float], abstained: Tensor | None = None) -> Bounded:
    needed = radius.new_tensor([length + BALL_TOLERANCE * max(1.0, length) for length in eps])
    certified = correct[:, None] & (radius[:, None] >= needed)
    return Bounded(correct, certified, radius, torch.zeros_like(correct) if abstained is None else abstained)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Smoothing(Certificate):
    """Randomised smoothing (Cohen et al., 2019): certifies the smoothed classifier, of any network.

    Args:
        sigma: standard deviation of the noise, in units of pixels.
        samples: noisy images that estimate the probability of the class.
        selection: others, that choose it.
        confidence: that the radius of an image holds, for each image alone.
    """

    smoothed: ClassVar[bool] = True
    at_once: ClassVar[int] = 5

    norm: Literal["l2"] = "l2"
    sigma: float = Field(0.5, gt=0, le=1e3)
    samples: Count = 10000
    selection: Count = 100
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.999

    def samples_of(self, images: int) -> int:
        """See :class:`Certificate`."""
        return images * (self.samples + self.selection)

    def cheaper(self) -> "Certificate":
        """See :class:`Certificate`."""
        return replace(self, samples=2, selection=2)

    def bound(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Sequence[float], stream: str) -> Bounded:
        """See :class:`Certificate`."""
        from jacobian_robust.bounds import smoothed_radius

        for module in model.modules():
            if module.training and isinstance(module, STOCHASTIC):
                raise ValueError(f"{type(module).__name__} is in training mode; call model.eval()")
        seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big") >> 1
        generator = torch.Generator(images.device).manual_seed(seed)
        predicted, radius = smoothed_radius(
            *(model, images, self.sigma, self.samples, self.confidence, generator), selection=self.selection
        )
        correct = predicted == labels
        return _by_radius(correct, radius.to(images.device).where(correct, 0.0), eps, predicted == -1)


class Certified(NamedTuple):
    """What a certificate says of all images.

    Attributes:
        certificate: the certificate.
        eps: the budgets, in ascending order.
        bounded: by image.
    """

    certificate: Certificate
    eps: tuple[float, ...]
    bounded: Bounded

    @property
    def length(self) -> Float[Tensor, "images"]:
        """The largest change of each image that the certificate rules out; -1 where it rules out none."""
        budgets = self.bounded.radius.new_tensor(self.eps)
        by_budget = torch.where(self.bounded.certified, budgets, -1.0).amax(-1)
        by_radius = torch.where(self.bounded.radius > 0, self.bounded.radius * (1 - 1e-4), -1.0)
        return torch.maximum(by_budget, by_radius)

    def broken(self, smallest: Float[Tensor, "images"]) -> list[int]:
        """Return the images that a change no longer than what is ruled out broke; none of a smoothed classifier.

        Args:
            smallest: by image the length of the smallest change that broke it, infinite where none did.
        """
        if self.certificate.smoothed:
            return []
        within = smallest <= self.length.to(smallest)  # a budget as float32 has it is no shorter than itself
        found: list[int] = within.nonzero().flatten().tolist()
        return found

    def pairs(self, swept: Sweep) -> int:
        """Return how many pairs there are of a certified image and an attack that met it at a certified budget."""
        attacks = {budget.eps: len(budget.attacks) for budget in swept.budgets}
        counts = zip(self.eps, self.bounded.certified.sum(0).tolist(), strict=True)
        return 0 if self.certificate.smoothed else sum(count * attacks[eps] for eps, count in counts)


def unattacked(certificates: Sequence[Certificate], norms: Sequence[Norm]) -> None:
    """Raise a UserError for a certificate whose norm has no attack: it would have no budget, and stay unattacked."""
    for certificate in certificates:
        if certificate.norm not in norms:
            other = "attack=pgd_l2" if certificate.norm == "l2" else "attack=pgd_linf"
            raise UserError(
                f"certificate.{certificate.name} certifies in {certificate.norm}, and no attack has a budget there: "
                f"add one, as {other}, or leave the certificate out"
            )


def require_certifiable(
    certificates: Sequence[Certificate], model: nn.Module, image: Float[Tensor, "1 *shape"], what: str = "model"
) -> None:
    """Raise a UserError, which names the layer, if a certificate has no rule for the model: tried on one image."""
    for certificate in certificates:
        label = torch.zeros(1, dtype=torch.long, device=image.device)
        try:
            with torch.no_grad():
                if not isinstance(certificate.family, Categorical):
                    label = certificate.family.predict(model(image))
                certificate.cheaper().bound(model, image, label, (0.0,), "trial")
        except Exception as error:  # a foreign model can fail in any way
            text = " ".join(str(error).split()).removeprefix("bounds: ")[:300]
            raise UserError(f"certificate.{certificate.name}: {what}: {text}") from error


def _silent(done: int, of: int, certified: int) -> None:
    pass


@torch.no_grad()
def certify(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Shaped[Tensor, "images *_"],
    certificate: Certificate,
    eps: Sequence[float],
    *,
    seed: int = 0,
    progress: Callable[[int, int, int], None] = _silent,
    journal: Journal | None = None,
) -> Certified:
    """Return at which budgets each image is certified and correctly classified.

    Args:
        model: returns logits, in evaluation mode, on the device of the images.
        images: pixels in [0, 1].
        labels: the true classes, or the targets of the certificate's family.
        certificate: the certificate.
        eps: the budgets, in units of pixels.
        seed: of a certificate that draws noise; each batch has its own stream.
        progress: called after each batch with the images done, all of them, and how many are certified at the smallest
            budget.
        journal: where to note the state after each batch, and to go on from.

    Raises:
        UserError: if a pixel is outside [0, 1].
        ValueError: if the model has a layer without a rule.
    """
    check_pixels(images)
    budgets = tuple(sorted(set(eps)))
    parts: list[Bounded] = []
    if journal and (saved := journal.load()):
        parts = [Bounded(*(value.to(images.device) for value in saved["bounded"]))]
    done = sum(len(part.correct) for part in parts)
    size = certificate.batch_size or certificate.at_once

    def state() -> dict[str, Any]:
        return {"bounded": tuple(_joined(parts))}

    while done < len(images):
        chunk = slice(done, done + size)
        stream = f"{seed} {certificate.name} {done}"
        parts.append(certificate.bound(model, images[chunk], labels[chunk], budgets, stream))
        done += len(parts[-1].correct)
        progress(done, len(images), sum(int(part.certified[:, 0].sum()) for part in parts))
        if journal:
            journal.save(state)
    return Certified(certificate, budgets, _joined(parts))


def _joined(parts: Sequence[Bounded]) -> Bounded:
    return Bounded(*(torch.cat(values) for values in zip(*parts, strict=True)))

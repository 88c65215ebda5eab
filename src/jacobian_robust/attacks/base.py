"""The door to torchattacks and AutoAttack: everything that is specific to an attack library stops here.

An attack is a frozen set of parameters with one method, ``perturb``. Images are pixels in [0, 1]; budgets ``eps`` and
step sizes are in the same units. torchattacks: H. Kim, "Torchattacks: a PyTorch repository for adversarial attacks",
2020. AutoAttack: its authors' reference, packaged as pyautoattack; torchattacks' class of that name is another thing.
"""

import abc
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pyautoattack
import torch
import torchattacks
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.errors import UserError
from jacobian_robust.options import STRICT, Count, Listed, NonEmpty

__all__ = [
    "FAB",
    "FGSM",
    "PGD",
    "SQUARES",
    "Attack",
    "AutoAttack",
    "Ball",
    "DivergencePGD",
    "GaussianNoise",
    "Library",
    "Norm",
    "Square",
    "Transfer",
    "UniformNoise",
    "check_pixels",
    "distances",
]

Norm = Literal["linf", "l2", "gaussian"]
"""What a budget bounds: the largest change of a pixel, its Euclidean length; or, of noise, its standard deviation."""

Ball = Literal["linf", "l2"]
"""Those of them that bound what an adversary may do."""

Loss = Literal["cross_entropy", "margin", "dlr"]
Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

SQUARES = 5
"""A side of an image, in the starting pattern of torchattacks' Square in ℓ2."""

TARGETS = 9
"""Likeliest other classes that AutoAttack's targeted parts try, one after the other; fewer where there are fewer."""

Length = Annotated[float, Field(ge=0, le=1e6)]
"""In units of pixels; float32 can square it."""

Budgets = Annotated[tuple[Length, ...], Listed, Field(min_length=1)]


def check_pixels(images: Float[Tensor, "batch *shape"]) -> None:
    """Raise a UserError unless all pixels are in [0, 1]: an attack would clip them and report nonsense."""
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"an attack was given pixels in [{images.min():.3g}, {images.max():.3g}]; it needs [0, 1]: "
            "let the data hand out pixels in [0, 1] and the model normalise them itself"
        )


def distances(
    images: Float[Tensor, "batch *shape"], adversarial: Float[Tensor, "batch *shape"], norm: Norm
) -> Float[Tensor, "batch"]:
    """Return the distance of each pair: the ℓ∞ or ℓ2 norm, or for noise the root mean square over the pixels."""
    change = (adversarial - images).flatten(1)
    if norm == "gaussian":
        return change.square().mean(-1).sqrt()
    return torch.linalg.vector_norm(change, ord=2 if norm == "l2" else torch.inf, dim=-1)


_LIBRARY_NORM: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}

_ON_A_GPU = 1000
"""Images at once: a GPU wants to be filled."""


def _drawn_seed() -> int:
    """Return a seed from torch's global stream, for libraries that else start every batch and restart alike."""
    return int(torch.randint(2**31, ()))


@contextlib.contextmanager
def _attackable(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients for its parameters, and restore every module's state."""
    modes = {module: module.training for module in model.modules()}
    differentiated = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in differentiated:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in differentiated:
            parameter.requires_grad_(True)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Attack(abc.ABC):
    """An attack within a ball around each image.

    Args:
        name: how the attack is called in results.
        eps: the budgets to try, radii of the ball.
        norm: norm of the ball.
        restarts: independent starts; an image is broken if one of them breaks it.
        batch_size: images attacked at once; ``None`` for what suits the device.
    """

    name: str
    eps: Budgets
    norm: Norm
    restarts: Count = 1
    batch_size: Count | None = None

    on_a_cpu: ClassVar[int] = 50
    """Images at once by default: small batches fit a CPU's cache, and are done sooner where an image takes seconds."""

    def images_at_once(self, device: torch.device) -> int:
        """Return the number of images in a batch."""
        return self.batch_size or (_ON_A_GPU if device.type == "cuda" else self.on_a_cpu)

    def require(self, classes: int, shape: Sequence[int]) -> None:  # noqa: B027 - most attacks take all there are
        """Raise a UserError if such images or classifiers cannot be attacked so.

        Args:
            classes: number of logits.
            shape: of an image, ``(channels, height, width)``.
        """

    @abc.abstractmethod
    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the library's attack of images and labels; the model has been placed on its device, captured here."""

    def perturb(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        eps: float,
    ) -> Float[Tensor, "batch *shape"]:
        """Return the attacked images, from one start, drawing from torch's global random stream.

        Args:
            model: returns logits; its mode and its parameters are left as they were.
            images: pixels in [0, 1].
            labels: the true classes, which the attack moves away from.
            eps: radius of the ball.

        Raises:
            UserError: if a pixel is outside [0, 1].
        """
        check_pixels(images)
        with _attackable(model), torch.inference_mode(False), torch.enable_grad():
            adversarial: Tensor = self._library_attack(model, eps)(images.clone(), labels.clone())
        return adversarial.detach()


class _Broken(Exception):
    """All images of a batch are broken."""


class _Watched(nn.Module):
    """A model as an iterating attack sees it, which remembers for each image the first iterate that broke it.

    Later iterates can change nothing about an image that is broken: it is not shown to the model again, stands still
    for want of a gradient, and once all are broken the attack is ended, by an exception.

    Args:
        model: returns logits.
        labels: the true classes of the attacked batch.
        loss: what the attack is to climb with the cross-entropy that is built into it.
        early_stop: whether to remember, and to end the attack; otherwise its last iterate counts.
    """

    def __init__(self, model: nn.Module, labels: Int[Tensor, "batch"], loss: Loss, early_stop: bool) -> None:
        super().__init__()
        self.model, self.labels, self.loss, self.early_stop = model, labels, loss, early_stop
        self.broken = torch.zeros_like(labels, dtype=torch.bool)
        self.first: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        standing = (~self.broken).nonzero().squeeze(-1)
        whole = len(standing) == len(images)
        logits: Tensor = self.model(images if whole else images[standing])
        if self.early_stop:
            self._look(images.detach(), standing, logits.detach())
        climbed = _climbed(logits, self.labels[standing], self.loss)
        return climbed if whole else climbed.new_zeros(len(images), climbed.shape[1]).index_copy(0, standing, climbed)

    def _look(self, images: Tensor, standing: Tensor, logits: Tensor) -> None:
        own = logits.gather(1, self.labels[standing, None]).squeeze(1)
        # by more than what rounding makes of the same image in another batch
        new = standing[logits.amax(-1) - own > 1e-5 * logits.abs().amax(-1)]
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


def _climbed(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], loss: Loss) -> Tensor:
    """Return logits whose cross-entropy has a gradient along that of another loss of the given ones.

    The libraries' PGD looks at the direction of each image's gradient alone, and climbs the cross-entropy. Two classes
    at equal logits, one of them carrying the loss's gradient, have a cross-entropy with half that gradient; no
    softmax of the model's own logits is left in it, which could saturate.
    """
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


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent on a loss (Madry et al., 2018); an image is broken if one of the iterates breaks it.

    Args:
        steps: iterations.
        step_size: length of a step, in units of pixels and in the norm of the ball.
        random_start: start at a random point of the ball instead of at the image.
        loss: ``cross_entropy``; ``margin``, the lead of the best other class's logit over the true one's; or ``dlr``,
            that lead over the distance of the first to the third logit (Croce & Hein, 2020), free of the logits' scale.
        early_stop: take the first iterate that breaks an image, and end with the batch's last; otherwise the last
            iterate alone counts, as in the library.
    """

    norm: Ball
    steps: Count
    step_size: float = Field(gt=0, le=1e6)
    random_start: bool = True
    loss: Loss = "cross_entropy"
    early_stop: bool = True

    def require(self, classes: int, shape: Sequence[int]) -> None:
        """Raise a UserError where the DLR loss has no third logit."""
        if self.loss == "dlr" and classes < 3:
            raise UserError(
                f"attack.{self.name}.loss=dlr needs at least 3 classes, and there are {classes}: choose loss=margin"
            )

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        library = torchattacks.PGD if self.norm == "linf" else torchattacks.PGDL2

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            watched = _Watched(model, labels, self.loss, self.early_stop).eval()
            last = None
            with contextlib.suppress(_Broken):
                last = library(
                    watched, eps=eps, alpha=self.step_size, steps=self.steps, random_start=self.random_start
                )(images, labels)
            return watched.result(last)

        return attack


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DivergencePGD(Attack):
    """Projected gradient ascent on the divergence from the clean prediction, TRADES' attack (Zhang et al., 2019).

    The labels play no part in it; it starts at a millesimal normal displacement.

    Args:
        steps: iterations.
        step_size: length of a step, in units of pixels.
    """

    norm: Literal["linf"] = "linf"
    steps: Count
    step_size: float = Field(gt=0, le=1e6)

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return torchattacks.TPGD(model, eps=eps, alpha=self.step_size, steps=self.steps)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Transfer(PGD):
    """PGD along the gradients of other models: what breaks them is tried on the attacked one (Papernot et al., 2017).

    Args:
        source: the checkpoint of the other model; ``None`` for the other models of the same evaluation.
    """

    source: NonEmpty | None = None
    early_stop: Literal[False] = False  # the other model's first mistake is too small a step for this one


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FGSM(Attack):
    """The fast gradient sign method: one step to the border of the ball (Goodfellow et al., 2015)."""

    norm: Literal["linf"] = "linf"

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return torchattacks.FGSM(model, eps=eps)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FAB(Attack):
    """The fast adaptive boundary attack, which looks for the nearest adversarial example (Croce & Hein, 2020).

    Every target is tried for every image and the nearest example kept. (The library's own loop over targets leaves an
    image at the first that breaks it, however far away.) It begins at the image itself, so that there is one start.

    Args:
        steps: iterations.
        targets: how many of the likeliest other classes are tried, one after the other; more than there are means all.
    """

    norm: Ball
    steps: Count
    targets: Count = 9
    restarts: Annotated[Count, Field(le=1)] = 1

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        @torch.no_grad()
        def attack(images: Tensor, labels: Tensor) -> Tensor:
            classes = model(images[:1]).shape[-1]
            library = torchattacks.FAB(
                model, norm=_LIBRARY_NORM[self.norm], eps=eps, steps=self.steps, multi_targeted=True
            )
            nearest, length = images.clone(), images.new_full((len(images),), torch.inf)
            for rank in range(2, min(self.targets + 1, classes) + 1):
                library.target_class = rank  # the library counts classes by their logits, the largest being 1
                found: Tensor = library.attack_single_run_targeted(images, labels)
                away = distances(images, found, self.norm)
                nearer = (model(found).argmax(-1) != labels) & (away < length)
                nearest[nearer], length[nearer] = found[nearer], away[nearer]
            return nearest

        return attack


@dataclass(frozen=True, config=STRICT, kw_only=True)
class UniformNoise(Attack):
    """A point of the ℓ∞ ball drawn uniformly, clipped to [0, 1]."""

    norm: Literal["linf"] = "linf"

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda images, labels: (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GaussianNoise(Attack):
    """Normal noise of standard deviation ``eps`` in each pixel, clipped to [0, 1]; no ball bounds it."""

    norm: Literal["gaussian"] = "gaussian"

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return torchattacks.GN(model, std=eps)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Library(Attack):
    """Any other attack of torchattacks within a ball, by its name.

    Args:
        attack: the name of its class, as ``MIFGSM``; one that takes a model and a radius ``eps``.
        arguments: its other arguments.
    """

    norm: Ball
    attack: NonEmpty
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> "Library":
        """Say before any attack what would fail in the middle of an evaluation."""
        library = getattr(torchattacks, self.attack, None)
        if self.attack == "AutoAttack":
            raise ValueError("attack=AutoAttack: torchattacks' is not the reference; choose the one in conf/attack")
        if not (isinstance(library, type) and issubclass(library, torchattacks.attack.Attack)):
            raise ValueError(f"attack={self.attack}: torchattacks has no attack of that name")
        try:
            inspect.signature(library).bind(None, eps=0.0, **self.arguments)
        except TypeError as error:
            raise ValueError(f"arguments of {self.attack}: {error}") from error
        return self

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        library = getattr(torchattacks, self.attack)
        drawn = {"seed": _drawn_seed()} if "seed" in inspect.signature(library).parameters else {}
        made: Callable[[Tensor, Tensor], Tensor] = library(model, eps=eps, **drawn | self.arguments)
        return made


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Square(Attack):
    """The Square attack: random search by squares of pixels, without gradients (Andriushchenko et al., 2020).

    Args:
        queries: forward passes for each image and start.
    """

    norm: Ball
    queries: Count

    def require(self, classes: int, shape: Sequence[int]) -> None:
        """Raise a UserError where the starting pattern does not fit into the image."""
        if self.norm == "l2" and min(shape[-2:]) < SQUARES:
            raise UserError(
                f"{self.name}: Square in ℓ2 tiles an image with {SQUARES} squares a side, and these have "
                f"{shape[-2]}×{shape[-1]} pixels; leave it out"
            )

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        made: Callable[[Tensor, Tensor], Tensor] = torchattacks.Square(
            model, norm=_LIBRARY_NORM[self.norm], eps=eps, n_queries=self.queries, seed=_drawn_seed()
        )
        return made


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AutoAttack(Attack):
    """The reference AutoAttack (Croce & Hein, 2020): parts without parameters, each meeting what withstood the last.

    Args:
        parts: which of its attacks, with the library's settings of its custom version; ``None`` for the standard
            version, which is the one to quote: apgd-ce, apgd-t, fab-t and square.
    """

    on_a_cpu: ClassVar[int] = 20

    norm: Ball
    parts: Annotated[tuple[Part, ...], Listed, Field(min_length=1)] | None = None

    def require(self, classes: int, shape: Sequence[int]) -> None:
        """Raise a UserError where the DLR losses have no fourth logit."""
        if classes < 4 and (self.parts is None or not {"apgd-dlr", "apgd-t"}.isdisjoint(self.parts)):
            raise UserError(
                f"{self.name}: AutoAttack's DLR losses need 4 classes or more, and there are {classes}; leave it "
                f"out, or choose attack.{self.name}.parts=[apgd-ce]"
            )

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        def attack(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                classes = model(images[:1]).shape[-1]
            library = pyautoattack.AutoAttack(
                model,
                attacks=list(self.parts) if self.parts else None,
                device=images.device,
                eps=eps,
                norm=_LIBRARY_NORM[self.norm],
                seed=_drawn_seed(),
                version="custom" if self.parts else "standard",
            )
            # the library's 9 targets index classes that are not there
            library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(TARGETS, classes - 1)
            adversarial, *_ = library.run_standard_evaluation(images, labels, batch_size=len(images))
            return adversarial

        return attack

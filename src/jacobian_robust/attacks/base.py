"""The protocol of an attack: a frozen set of parameters with one method, ``perturb``.

Images are pixels in [0, 1]; budgets ``eps`` and step sizes are in the same units.
"""

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.options import STRICT, Count, Listed

__all__ = ["LIBRARY_NORM", "Attack", "Ball", "Budgets", "Norm", "check_pixels", "distances", "seed_from_torch"]

Norm = Literal["linf", "l2", "gaussian"]
"""What a budget bounds: the largest change of a pixel, its Euclidean length; or, of noise, its standard deviation."""

Ball = Literal["linf", "l2"]
"""Those of them that bound what an adversary may do."""

LIBRARY_NORM: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}
"""As torchattacks and AutoAttack call them."""

Length = Annotated[float, Field(ge=0, le=1e6)]
"""In units of pixels; float32 can square it."""

Budgets = Annotated[tuple[Length, ...], Listed, Field(min_length=1)]

_ON_A_GPU = 1000
"""Images at once: a GPU wants to be filled."""


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


def seed_from_torch() -> int:
    """Return a seed from torch's global stream, for libraries that else start every batch and restart alike."""
    return int(torch.randint(2**31, ()))


@contextlib.contextmanager
def attackable(model: nn.Module) -> Iterator[None]:
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
        eps_linf: radii of ℓ∞ balls, for an ℓ2 attack: in place of ``eps`` it tries the smallest balls that hold them,
            which :meth:`for_images` works out.
        norm: norm of the ball.
        restarts: independent starts; an image is broken if one of them breaks it.
        batch_size: images attacked at once; ``None`` for what suits the device.
        family: of the distribution that the model's outputs describe; :meth:`with_family` sets it.
    """

    name: str
    eps: Budgets = ()
    eps_linf: Budgets | None = None
    norm: Norm
    restarts: Count = 1
    batch_size: Count | None = None
    family: Family = CATEGORICAL

    any_family: ClassVar[bool] = False
    """Whether the attack is for outputs of every family, not for class logits alone."""

    on_a_cpu: ClassVar[int] = 50
    """Images at once by default: small batches fit a CPU's cache, and are done sooner where an image takes seconds."""

    @model_validator(mode="after")
    def _has_budgets(self) -> "Attack":
        if not (self.eps or self.eps_linf):
            raise ValueError("eps is missing: give one budget or more")
        if self.eps_linf and self.norm != "l2":
            raise ValueError(f"eps_linf is for attacks in ℓ2, and this one is in {self.norm}: give eps")
        return self

    def for_images(self, shape: Sequence[int]) -> "Attack":
        """Return the attack of such images: ``ε₂ = √n ε_∞`` for n numbers in one, the note's section 2.2.1."""
        if self.eps_linf is None:
            return self
        root = math.prod(shape) ** 0.5
        return replace(self, eps=tuple(float(f"{root * eps:.12g}") for eps in self.eps_linf))

    def images_at_once(self, device: torch.device) -> int:
        """Return the number of images in a batch."""
        return self.batch_size or (_ON_A_GPU if device.type == "cuda" else self.on_a_cpu)

    def with_family(self, family: Family) -> "Attack":
        """Return the attack of models whose outputs are parameters of a family.

        Raises:
            UserError: if the attack is of class logits alone.
        """
        if family == self.family:
            return self
        if not (self.any_family or isinstance(family, Categorical)):
            raise UserError(
                f"{self.name}: this attack is for classification alone; choose attack=pgd_linf, pgd_l2, fgsm or square"
            )
        return replace(self, family=family)

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
        labels: Shaped[Tensor, "batch *_"],
        eps: float,
    ) -> Float[Tensor, "batch *shape"]:
        """Return the attacked images, from one start, drawing from torch's global random stream.

        Args:
            model: returns logits; its mode and its parameters are left as they were.
            images: pixels in [0, 1].
            labels: the true classes, or the family's targets, which the attack moves away from.
            eps: radius of the ball.

        Raises:
            UserError: if a pixel is outside [0, 1].
        """
        check_pixels(images)
        with attackable(model), torch.inference_mode(False), torch.enable_grad():
            adversarial: Tensor = self._library_attack(model, eps)(images.clone(), labels.clone())
        return adversarial.detach()

"""The door to torchattacks and AutoAttack: everything that is specific to an attack library stops here.

An attack is a frozen set of parameters with one method, ``perturb``. Images are pixels in [0, 1]; budgets ``eps`` and
step sizes are in the same units. torchattacks: H. Kim, "Torchattacks: a PyTorch repository for adversarial attacks",
2020. AutoAttack: its authors' reference, packaged as pyautoattack; torchattacks' class of that name is another thing.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import pyautoattack
import torch
import torchattacks
from jaxtyping import Float, Int
from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.errors import UserError

__all__ = ["FGSM", "PGD", "Attack", "AutoAttack", "Norm", "Square", "check_pixels"]

Norm = Literal["linf", "l2"]
Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, int | float | str) else value


Budgets = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


def check_pixels(images: Float[Tensor, "batch *shape"]) -> None:
    """Raise a UserError unless all pixels are in [0, 1]: an attack would clip them and report nonsense."""
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"an attack was given pixels in [{images.min():.3g}, {images.max():.3g}]; it needs [0, 1]: "
            "let the data hand out pixels in [0, 1] and the model normalise them itself"
        )


_LIBRARY_NORM: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}


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


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Attack(abc.ABC):
    """An attack within a ball around each image.

    Args:
        name: how the attack is called in results.
        eps: the budgets to try, radii of the ball.
        norm: norm of the ball.
        restarts: independent starts; an image is broken if one of them breaks it.
        batch_size: images attacked at once. On a CPU small batches, which fit its cache, are fastest.
    """

    name: str
    eps: Budgets
    norm: Norm
    restarts: PositiveInt = 1
    batch_size: PositiveInt = 50

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


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class PGD(Attack):
    """Projected gradient descent on the cross-entropy (Madry et al., 2018); returns the last iterate.

    Args:
        steps: iterations.
        step_size: length of a step, in units of pixels and in the norm of the ball.
        random_start: start at a random point of the ball instead of at the image.
    """

    steps: PositiveInt
    step_size: PositiveFloat
    random_start: bool = True

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        library = torchattacks.PGD if self.norm == "linf" else torchattacks.PGDL2
        return library(model, eps=eps, alpha=self.step_size, steps=self.steps, random_start=self.random_start)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class FGSM(Attack):
    """The fast gradient sign method: one step to the border of the ball (Goodfellow et al., 2015)."""

    norm: Literal["linf"] = "linf"

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return torchattacks.FGSM(model, eps=eps)


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Square(Attack):
    """The Square attack: random search by squares of pixels, without gradients (Andriushchenko et al., 2020).

    Args:
        queries: forward passes for each image and start.
    """

    queries: PositiveInt

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        return torchattacks.Square(
            model, norm=_LIBRARY_NORM[self.norm], eps=eps, n_queries=self.queries, seed=_drawn_seed()
        )


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class AutoAttack(Attack):
    """The reference AutoAttack (Croce & Hein, 2020): parts without parameters, each meeting what withstood the last.

    Args:
        parts: which of its attacks; the standard version's four by default, with the library's numbers of steps.
    """

    parts: Annotated[tuple[Part, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        "apgd-ce",
        "apgd-t",
        "fab-t",
        "square",
    )

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        def attack(images: Tensor, labels: Tensor) -> Tensor:
            library = pyautoattack.AutoAttack(
                model,
                attacks=list(self.parts),
                device=images.device,
                eps=eps,
                norm=_LIBRARY_NORM[self.norm],
                seed=_drawn_seed(),
                version="custom",
            )
            adversarial, *_ = library.run_standard_evaluation(images, labels, batch_size=len(images))
            return adversarial

        return attack

"""Attacks of torchattacks, which is imported when the first of them runs.

Source: H. Kim, "Torchattacks: a PyTorch repository for adversarial attacks", 2020.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.attacks.base import LIBRARY_NORM, Attack, Ball, distances, seed_from_torch
from jacobian_robust.attacks.iterates import Loss, Watched, ended_early, labels_for_library
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import Categorical
from jacobian_robust.options import STRICT, Count, NonEmpty

__all__ = ["FAB", "FGSM", "PGD", "SQUARES", "DivergencePGD", "Library", "Square"]

SQUARES = 5
"""A side of an image, in the starting pattern of torchattacks' Square in ℓ2."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FGSM(Attack):
    """The fast gradient sign method: one step to the border of the ball (Goodfellow et al., 2015)."""

    norm: Literal["linf"] = "linf"
    any_family: ClassVar[bool] = True

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        import torchattacks

        if isinstance(self.family, Categorical):
            return torchattacks.FGSM(model, eps=eps)

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            watched = Watched(model, labels, "cross_entropy", False, self.family).eval()
            return torchattacks.FGSM(watched, eps=eps)(images, labels_for_library(labels, self.family))

        return attack


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent on a loss (Madry et al., 2018); an image is broken if one of the iterates breaks it.

    Args:
        steps: iterations.
        step_size: length of a step, in units of pixels and in the norm of the ball.
        random_start: start at a random point of the ball instead of at the image.
        loss: ``cross_entropy``; ``margin``, the lead of the best other class's logit over the true one's; or ``dlr``,
            that lead over the distance of the first to the third logit (Croce & Hein, 2020), free of the logits' scale.
            Of another family than the categorical one the first is the negative log-likelihood, the second the signed
            distance to the boundary of what is right, and there is no third.
        early_stop: take the first iterate that breaks an image, and end with the batch's last; otherwise the last
            iterate alone counts, as in the library.
    """

    norm: Ball
    steps: Count
    step_size: float = Field(gt=0, le=1e6)
    random_start: bool = True
    loss: Loss = "cross_entropy"
    early_stop: bool = True
    any_family: ClassVar[bool] = True

    def require(self, classes: int, shape: Sequence[int]) -> None:
        """Raise a UserError where the DLR loss has no third logit."""
        if self.loss == "dlr" and not isinstance(self.family, Categorical):
            raise UserError(f"attack.{self.name}.loss=dlr is of class logits: choose loss=margin")
        if self.loss == "dlr" and classes < 3:
            raise UserError(
                f"attack.{self.name}.loss=dlr needs at least 3 classes, and there are {classes}: choose loss=margin"
            )

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        import torchattacks

        library = torchattacks.PGD if self.norm == "linf" else torchattacks.PGDL2

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            watched = Watched(model, labels, self.loss, self.early_stop, self.family).eval()
            last = None
            with ended_early():
                last = library(
                    watched, eps=eps, alpha=self.step_size, steps=self.steps, random_start=self.random_start
                )(images, labels_for_library(labels, self.family))
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
        import torchattacks

        return torchattacks.TPGD(model, eps=eps, alpha=self.step_size, steps=self.steps)


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
        import torchattacks

        @torch.no_grad()
        def attack(images: Tensor, labels: Tensor) -> Tensor:
            classes = model(images[:1]).shape[-1]
            library = torchattacks.FAB(
                model, norm=LIBRARY_NORM[self.norm], eps=eps, steps=self.steps, multi_targeted=True
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
class Square(Attack):
    """The Square attack: random search by squares of pixels, without gradients (Andriushchenko et al., 2020).

    Args:
        queries: forward passes for each image and start.
    """

    norm: Ball
    queries: Count
    any_family: ClassVar[bool] = True

    def require(self, classes: int, shape: Sequence[int]) -> None:
        """Raise a UserError where the starting pattern does not fit into the image."""
        if self.norm == "l2" and min(shape[-2:]) < SQUARES:
            raise UserError(
                f"{self.name}: Square in ℓ2 tiles an image with {SQUARES} squares a side, and these have "
                f"{shape[-2]}×{shape[-1]} pixels; leave it out"
            )
        if self.norm == "l2" and shape[-2] != shape[-1]:
            raise UserError(
                f"{self.name}: the library's Square in ℓ2 takes images as high as wide, and these have "
                f"{shape[-2]}×{shape[-1]} pixels; leave it out"
            )

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        import torchattacks

        seed = seed_from_torch()
        library = torchattacks.Square(model, norm=LIBRARY_NORM[self.norm], eps=eps, n_queries=self.queries, seed=seed)
        if isinstance(self.family, Categorical):
            return library

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            def margin_and_loss(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
                margin = self.family.signed_distance_to_boundary(model(points), labels[rows])
                return margin, margin.clone()

            library.margin_and_loss = margin_and_loss  # the search asks for nothing else of the model
            library.init_hyperparam(images)
            torch.manual_seed(seed)
            _, found = library.attack_single_run(images, torch.arange(len(images), device=images.device))
            return found

        return attack


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
        import torchattacks

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
        import torchattacks

        library = getattr(torchattacks, self.attack)
        drawn = {"seed": seed_from_torch()} if "seed" in inspect.signature(library).parameters else {}
        made: Callable[[Tensor, Tensor], Tensor] = library(model, eps=eps, **drawn | self.arguments)
        return made

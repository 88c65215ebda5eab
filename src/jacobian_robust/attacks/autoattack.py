"""The reference AutoAttack, by its authors; pyautoattack, which packages it, is imported when it runs."""

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.attacks.base import LIBRARY_NORM, Attack, Ball, seed_from_torch
from jacobian_robust.errors import UserError
from jacobian_robust.options import STRICT, Listed

__all__ = ["AutoAttack"]

Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

TARGETS = 9
"""Likeliest other classes that the targeted parts try, one after the other; fewer where there are fewer."""


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
        """Raise a UserError where the DLR losses have no fourth logit, or Square in ℓ2 no square image."""
        if classes < 4 and (self.parts is None or not {"apgd-dlr", "apgd-t"}.isdisjoint(self.parts)):
            raise UserError(
                f"{self.name}: AutoAttack's DLR losses need 4 classes or more, and there are {classes}; leave it "
                f"out, or choose attack.{self.name}.parts=[apgd-ce]"
            )
        if self.norm == "l2" and shape[-2] != shape[-1] and (self.parts is None or "square" in self.parts):
            raise UserError(
                f"{self.name}: AutoAttack's Square in ℓ2 takes images as high as wide, and these have "
                f"{shape[-2]}×{shape[-1]} pixels; choose attack.{self.name}.parts=[apgd-ce,apgd-t,fab-t]"
            )

    def _library_attack(self, model: nn.Module, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        import pyautoattack

        def attack(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                classes = model(images[:1]).shape[-1]
            library = pyautoattack.AutoAttack(
                model,
                attacks=list(self.parts) if self.parts else None,
                device=images.device,
                eps=eps,
                norm=LIBRARY_NORM[self.norm],
                seed=seed_from_torch(),
                version="custom" if self.parts else "standard",
            )
            # the library's 9 targets index classes that are not there
            library.apgd_targeted.n_target_classes = library.fab.n_target_classes = min(TARGETS, classes - 1)
            adversarial, *_ = library.run_standard_evaluation(images, labels, batch_size=len(images))
            return adversarial

        return attack

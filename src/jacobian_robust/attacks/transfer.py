"""Examples that are made for other models and tried on the attacked one."""

from typing import Literal

from pydantic.dataclasses import dataclass

from jacobian_robust.attacks.torchattacks import PGD
from jacobian_robust.options import STRICT, NonEmpty

__all__ = ["Transfer"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Transfer(PGD):
    """PGD along the gradients of other models: what breaks them is tried on the attacked one (Papernot et al., 2017).

    Args:
        source: the checkpoint of the other model; ``None`` for the other models of the same evaluation.
    """

    source: NonEmpty | None = None
    early_stop: Literal[False] = False  # the other model's first mistake is too small a step for this one

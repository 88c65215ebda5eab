"""Attacks, from torchattacks and the reference AutoAttack."""

from jacobian_robust.attacks.base import *  # noqa: F403
from jacobian_robust.attacks.base import __all__ as __all__

"""Penalties that bound the Jacobian, or what a classifier does nearby."""

from jacobian_robust.penalties.base import *  # noqa: F403
from jacobian_robust.penalties.base import Bound as Bound
from jacobian_robust.penalties.base import __all__ as _base
from jacobian_robust.penalties.lagrangian import Lagrangian

__all__ = [*_base, "Lagrangian"]

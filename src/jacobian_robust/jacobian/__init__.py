"""Norms of the input–output Jacobian in the Fisher metric of the prediction."""

from jacobian_robust.jacobian.norms import *  # noqa: F403
from jacobian_robust.jacobian.norms import __all__ as __all__

"""Information geometry: the simplex of class probabilities, other families, and metrics pulled back to the input."""

from jacobian_robust.geometry.simplex import *  # noqa: F403
from jacobian_robust.geometry.simplex import __all__ as __all__

"""Families of distributions whose parameters a model gives: metric, distance, boundary and likelihood of each.

A model gives the parameters ``s(x)`` of the distribution of its target. The Fisher metric ``I(s)`` of the family,
pulled back to the inputs, is ``J_sᵀ I(s) J_s`` with the Jacobian ``J_s`` of the outputs. With a factor ``I = L Lᵀ`` its
norms are those of ``Lᵀ J_s``, and one vector–Jacobian product with ``v = L z``, ``z`` random signs, has the mean square
``‖Lᵀ J_s‖_F²``, however many outputs there are. A family is the factor, the Fisher–Rao distance, the distance to the
boundary of what counts as right, and the negative log-likelihood.

The outputs of a batch are ``(batch, *shape)``. Factors and directions act on one flat vector a sample, ``(batch, n)``.
"""

from jacobian_robust.geometry.families.base import CATEGORICAL, Categorical, Factor, Family, flat
from jacobian_robust.geometry.families.diagonal import BernoulliProduct, Gaussian, GaussianMeanScale, Poisson
from jacobian_robust.geometry.families.pixels import PixelCategorical

__all__ = [
    "CATEGORICAL",
    "BernoulliProduct",
    "Categorical",
    "Factor",
    "Family",
    "Gaussian",
    "GaussianMeanScale",
    "PixelCategorical",
    "Poisson",
    "flat",
]

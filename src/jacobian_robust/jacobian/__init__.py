"""Norms of the input–output Jacobian in the Fisher metric of the prediction."""

from jacobian_robust.geometry.factors import FisherFactor, random_signs, tangent_directions
from jacobian_robust.jacobian.norms import frobenius_norm, gram_matrix, jacobian_norms
from jacobian_robust.jacobian.spectral import spectral_norm, stretch, worst_direction

__all__ = [
    # norms
    "frobenius_norm",
    "gram_matrix",
    "jacobian_norms",
    "spectral_norm",
    # directions
    "stretch",
    "worst_direction",
    # the Fisher factor
    "FisherFactor",
    "random_signs",
    "tangent_directions",
]

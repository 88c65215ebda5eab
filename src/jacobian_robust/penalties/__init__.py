"""Penalties that bound the Jacobian, or what a classifier does nearby."""

from jacobian_robust.penalties.amortization import Amortization
from jacobian_robust.penalties.base import Bound, Condition, Magnitude, Model, Penalty, Reduce
from jacobian_robust.penalties.baselines import VAT, Curvature, InputGradient, LogitJacobian
from jacobian_robust.penalties.certified import CertifiedMargin, GloRo
from jacobian_robust.penalties.lagrangian import Lagrangian
from jacobian_robust.penalties.margins import LinearMargin, Margin
from jacobian_robust.penalties.note import (
    ExponentialPenalty,
    Frobenius,
    Isometry,
    RadiusPenalty,
    Spectral,
    capped_exp,
    note_condition,
    satisfies_condition,
)

__all__ = [
    "VAT",
    "Amortization",
    "Bound",
    "CertifiedMargin",
    "Condition",
    "Curvature",
    "ExponentialPenalty",
    "Frobenius",
    "GloRo",
    "InputGradient",
    "Isometry",
    "Lagrangian",
    "LinearMargin",
    "LogitJacobian",
    "Magnitude",
    "Margin",
    "Model",
    "Penalty",
    "RadiusPenalty",
    "Reduce",
    "Spectral",
    "capped_exp",
    "note_condition",
    "satisfies_condition",
]

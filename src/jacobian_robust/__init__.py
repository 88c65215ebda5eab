"""Jacobian-regularised training of classifiers and honest attacks on the result.

Names are imported when they are first used: ``import jacobian_robust`` alone loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from jacobian_robust.bounds import certified_margin as certified_margin
    from jacobian_robust.bounds import interval_bounds as interval_bounds
    from jacobian_robust.bounds import lipschitz_constant as lipschitz_constant
    from jacobian_robust.bounds import lipschitz_margin as lipschitz_margin
    from jacobian_robust.bounds import smoothed_radius as smoothed_radius
    from jacobian_robust.checkpoints import Checkpoint as Checkpoint
    from jacobian_robust.checkpoints import load_checkpoint as load_checkpoint
    from jacobian_robust.geometry import distance_to_boundary as distance_to_boundary
    from jacobian_robust.geometry import distance_to_center as distance_to_center
    from jacobian_robust.geometry import fisher_metric as fisher_metric
    from jacobian_robust.geometry import fisher_rao_distance as fisher_rao_distance
    from jacobian_robust.geometry import signed_distance_to_boundary as signed_distance_to_boundary
    from jacobian_robust.geometry.families import BernoulliProduct as BernoulliProduct
    from jacobian_robust.geometry.families import Categorical as Categorical
    from jacobian_robust.geometry.families import Family as Family
    from jacobian_robust.geometry.families import Gaussian as Gaussian
    from jacobian_robust.geometry.families import GaussianMeanScale as GaussianMeanScale
    from jacobian_robust.geometry.families import PixelCategorical as PixelCategorical
    from jacobian_robust.geometry.families import Poisson as Poisson
    from jacobian_robust.geometry.pullback import pullback_metric as pullback_metric
    from jacobian_robust.jacobian import frobenius_norm as frobenius_norm
    from jacobian_robust.jacobian import gram_matrix as gram_matrix
    from jacobian_robust.jacobian import jacobian_norms as jacobian_norms
    from jacobian_robust.jacobian import spectral_norm as spectral_norm
    from jacobian_robust.jacobian import worst_direction as worst_direction
    from jacobian_robust.penalties import VAT as VAT
    from jacobian_robust.penalties import CertifiedMargin as CertifiedMargin
    from jacobian_robust.penalties import Curvature as Curvature
    from jacobian_robust.penalties import Frobenius as Frobenius
    from jacobian_robust.penalties import GloRo as GloRo
    from jacobian_robust.penalties import InputGradient as InputGradient
    from jacobian_robust.penalties import Isometry as Isometry
    from jacobian_robust.penalties import Lagrangian as Lagrangian
    from jacobian_robust.penalties import LinearMargin as LinearMargin
    from jacobian_robust.penalties import LogitJacobian as LogitJacobian
    from jacobian_robust.penalties import Margin as Margin
    from jacobian_robust.penalties import Penalty as Penalty
    from jacobian_robust.penalties import Spectral as Spectral
    from jacobian_robust.robustness.evaluate import evaluate_robustness as evaluate_robustness

_PUBLIC = {
    # norms of the Jacobian
    "jacobian": ("frobenius_norm", "spectral_norm", "jacobian_norms", "gram_matrix", "worst_direction"),
    # distances between predictions
    "geometry": (
        *("fisher_metric", "fisher_rao_distance", "distance_to_center"),
        *("distance_to_boundary", "signed_distance_to_boundary"),
    ),
    # what the model's outputs are the parameters of
    "geometry.families": (
        *("Family", "Categorical", "BernoulliProduct", "PixelCategorical"),
        *("Gaussian", "GaussianMeanScale", "Poisson"),
    ),
    "geometry.pullback": ("pullback_metric",),
    # penalties
    "penalties": (
        *("Penalty", "Frobenius", "Spectral", "Isometry", "Margin", "LinearMargin", "Lagrangian"),
        *("Curvature", "InputGradient", "LogitJacobian", "VAT", "CertifiedMargin", "GloRo"),
    ),
    # what holds over a whole ball
    "bounds": ("interval_bounds", "certified_margin", "lipschitz_constant", "lipschitz_margin", "smoothed_radius"),
    # attacks, and whether the result is to be believed
    "robustness.evaluate": ("evaluate_robustness",),
    # trained models
    "checkpoints": ("Checkpoint", "load_checkpoint"),
}
"""The public names by the module that has them."""

_SUBMODULES = (
    "attacks",
    "bounds",
    "checkpoints",
    "geometry",
    "jacobian",
    "lightning",
    "models",
    "penalties",
    "robustness",
)

_HOME = {name: f"{__name__}.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES})

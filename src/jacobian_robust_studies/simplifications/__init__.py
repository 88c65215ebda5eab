"""The note's six simplifications (section 3.5), measured one by one, and which of them accounts for each fall.

The condition of eq. 14, ``‖J_μ‖ ≤ d/ε``, is looked at in four variants: the distance ``d`` is δ, to the simplex's
center (the note's), or d_B, to the decision boundary; the norm is Frobenius' (the note's penalty) or the spectral one.
An image that satisfies it at ``ε`` is promised to stand every perturbation up to that Euclidean length. A *fall* is a
correct image with a known adversarial perturbation that is not longer.

A *flat* metric is one that is constant over the ball, in the coordinates of the inputs: what the step from eq. 8 to
eq. 9 uses. The note asks for zero curvature there, which is less.
"""

from jacobian_robust_studies.simplifications.console import print_simplifications
from jacobian_robust_studies.simplifications.figures import six_simplifications
from jacobian_robust_studies.simplifications.measure import (
    PASSES,
    RADII,
    TOLERANCE,
    Displacements,
    Sample,
    Study,
    agreements,
    directions,
    displacements,
    distribution,
    falls,
    off_by,
    study,
)
from jacobian_robust_studies.simplifications.report import FALL_COLUMNS, fall_rows, image_rows, summary
from jacobian_robust_studies.simplifications.schema import (
    DISTANCES,
    FORMAT,
    JACOBIAN_NORMS,
    VARIANTS,
    Agreement,
    Distribution,
    Epoch,
    Falls,
    Flatness,
    FlatnessPoint,
    ModelSimplifications,
    OffBy,
    Satisfied,
    Simplifications,
    Split,
)

__all__ = [
    "DISTANCES",
    "FALL_COLUMNS",
    "FORMAT",
    "JACOBIAN_NORMS",
    "PASSES",
    "RADII",
    "TOLERANCE",
    "VARIANTS",
    "Agreement",
    "Displacements",
    "Distribution",
    "Epoch",
    "Falls",
    "Flatness",
    "FlatnessPoint",
    "ModelSimplifications",
    "OffBy",
    "Sample",
    "Satisfied",
    "Simplifications",
    "Split",
    "Study",
    "agreements",
    "directions",
    "displacements",
    "distribution",
    "fall_rows",
    "falls",
    "image_rows",
    "off_by",
    "print_simplifications",
    "six_simplifications",
    "study",
    "summary",
]

"""What holds over a whole ball around an input: bounds of the outputs and certificates of robustness."""

from jacobian_robust.bounds.crown import crown_margin_bounds
from jacobian_robust.bounds.interval import interval_bounds, margin_bounds
from jacobian_robust.bounds.lipschitz import lipschitz_constant, lipschitz_margin
from jacobian_robust.bounds.margin import certified_margin, fisher_rao_margin
from jacobian_robust.bounds.outputs import output_box, right_in_box
from jacobian_robust.bounds.smoothing import smoothed_radius

__all__ = [
    "certified_margin",
    "crown_margin_bounds",
    "fisher_rao_margin",
    "interval_bounds",
    "lipschitz_constant",
    "lipschitz_margin",
    "margin_bounds",
    "output_box",
    "right_in_box",
    "smoothed_radius",
]

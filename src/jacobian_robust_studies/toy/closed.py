"""Geodesic balls that are balls: the exponential map is one-to-one from the flat ball onto them.

A geodesic ball of radius ``r`` is, by ``μ``, a piece of the sphere's disc of radius ``r`` around ``μ(x)``. It is the
whole disc if the points that are mapped into the disc, and that hang together with ``x``, neither meet a fold of the
network nor leave the square.
"""

import torch
from jaxtyping import Float, Int
from scipy.ndimage import label
from torch import Tensor

from jacobian_robust.geometry import distance_to_boundary
from jacobian_robust.geometry.pullback import Logits, orientation
from jacobian_robust_studies.toy.schema import CLOSED

__all__ = ["closed_areas"]

LEAST_AREA = 0.002
"""Share of the square that a ball covers at least: a smaller one would be a few points of the grid."""


def closed_areas(
    logits: Logits, grid: Float[Tensor, "grid 2"], points: Float[Tensor, "points 2"]
) -> Float[Tensor, "shares points"]:
    """Return the area of the geodesic ball of each of the CLOSED shares of ``d_B`` around points.

    An area is a share of the square; 0 where the ball is not one.

    Args:
        logits: the classifier.
        grid: the points of a square grid of the unit square, row by row from below.
        points: inside the square.
    """
    side = round(len(grid) ** 0.5)
    with torch.no_grad():
        everywhere, here = (logits(place).softmax(-1) for place in (grid, points))
    sign = orientation(logits, grid).sign().view(side, side).numpy()
    radii = torch.tensor(CLOSED, dtype=here.dtype)[:, None] * distance_to_boundary(here)
    cells = (points * (side - 1)).round().long().clamp(0, side - 1)
    areas = torch.zeros_like(radii)
    for i, (column, row) in enumerate(cells.tolist()):
        near = (everywhere.sqrt() @ here[i].sqrt()).view(side, side)  # the cosine of half the distance
        for share in range(len(CLOSED)):
            pieces, _ = label((near > (radii[share, i] / 2).cos()).numpy())
            if not pieces[row, column]:
                break
            ball = pieces == pieces[row, column]
            at_the_edge = ball[[0, -1]].any() or ball[:, [0, -1]].any()
            if at_the_edge or len(set(sign[ball])) > 1:
                break  # a larger ball contains this one
            areas[share, i] = ball.mean() * bool(ball.mean() >= LEAST_AREA)
    return areas


def largest(areas: Float[Tensor, "shares points"], labels: Int[Tensor, "points"]) -> list[tuple[int, float]]:
    """Return, of each class, the point with the ball of the largest area, and that ball's share of ``d_B``."""
    found = []
    for k in labels.unique().tolist():
        of_class = torch.where(labels == k, areas, 0.0)
        share, point = divmod(int(of_class.argmax()), areas.shape[1])
        if of_class[share, point] > 0:
            found.append((point, CLOSED[share]))
    return found

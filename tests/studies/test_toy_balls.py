"""Which geodesic balls of the toy model are balls."""

import math

import torch

from jacobian_robust.geometry import distance_to_boundary
from jacobian_robust.geometry.pullback import pullback_metric
from jacobian_robust_studies.toy.closed import closed_areas, largest
from jacobian_robust_studies.toy.measure import _grid
from jacobian_robust_studies.toy.schema import CLOSED

GRID = _grid(81)
CENTRE = torch.tensor([[0.5, 0.5]], dtype=torch.float64)


def linear(points):
    """Logits whose map to the sphere is one-to-one."""
    x, y = (8 * (points - 0.55)).unbind(1)
    return torch.stack([x, y, torch.zeros_like(x)], dim=1)


def folded(points):
    """Logits that are the same at either side of ``x₁ = 0.52``."""
    x, y = (points - 0.52).unbind(1)
    return torch.stack([8 * x.abs() ** 2, 8 * y, torch.zeros_like(x)], dim=1)


def test_without_folds_a_ball_inside_the_square_is_a_ball():
    areas = closed_areas(linear, GRID, CENTRE)[:, 0]
    assert (areas[2:] > 0).all(), "the smaller ones are too small for the grid"
    assert areas.tolist() == sorted(areas.tolist())
    # Of a small radius it is the flat ball, whose area is π r² / √det G.
    radius = CLOSED[2] * float(distance_to_boundary(linear(CENTRE).softmax(-1))[0])
    flat = math.pi * radius**2 / float(torch.linalg.det(pullback_metric(linear, CENTRE)[0]).sqrt())
    assert abs(float(areas[2]) / flat - 1) < 0.3


def test_a_ball_with_a_fold_or_beyond_the_square_is_none():
    assert not closed_areas(folded, GRID, CENTRE).any()
    at_the_edge = torch.tensor([[0.01, 0.5]], dtype=torch.float64)
    assert not closed_areas(linear, GRID, at_the_edge).any()


def test_of_each_class_the_largest_ball_is_taken():
    areas = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert largest(areas, torch.tensor([0, 0, 1])) == [(0, CLOSED[1])]

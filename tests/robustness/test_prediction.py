"""The prediction against definitions computed another way, and the comparison against counts by hand."""

import math

import pytest
import torch
from torch import nn

from jacobian_robust.robustness.prediction import Radii, compare, radii, smallest_perturbations


def network(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, classes)).eval()


def test_radii_are_those_of_the_definitions():
    model = network()
    images = torch.rand(7, 1, 3, 3)
    found = radii(model, images)
    exact = model.double()
    for i, image in enumerate(images.double()):
        theta = exact(image[None]).softmax(-1)[0]
        jacobian = torch.autograd.functional.jacobian(lambda x: 2 * exact(x[None]).softmax(-1)[0].sqrt(), image)
        jacobian = jacobian.reshape(4, 9)
        first, second = theta.sort(descending=True).values[:2]
        assert found.boundary[i] == pytest.approx(2 * math.asin((first**0.5 - second**0.5) / 2**0.5), rel=1e-4)
        assert found.center[i] == pytest.approx(2 * math.acos(float((theta / 4).sqrt().sum())), rel=1e-4)
        assert found.frobenius[i] == pytest.approx(float(torch.linalg.matrix_norm(jacobian)), rel=1e-4)
        assert found.spectral[i] == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-4)
    torch.testing.assert_close(found.predicted, found.boundary / found.spectral)


def test_the_radius_of_nearly_undecided_images_is_their_distance_to_the_boundary():
    """To first order it is exact; close to the boundary there is no more to it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    normal = model[1].weight[0] - model[1].weight[1]
    images = torch.full((40, 1, 4, 4), 0.5) + 0.2 * (torch.rand(40, 1, 4, 4) - 0.5)
    with torch.no_grad():
        margin = model(images) @ torch.tensor([1.0, -1.0])
        # moved along the normal to where a fiftieth of it is left
        images = images - (0.98 * margin / normal.square().sum())[:, None, None, None] * normal.reshape(1, 1, 4, 4)
        logits = model(images)
    labels = logits.argmax(-1)
    predicted = radii(model, images)
    nearest = smallest_perturbations(model, images, labels, torch.ones(40, dtype=torch.bool))
    smallest = nearest.length
    exact = ((logits[:, 0] - logits[:, 1]).abs() / normal.norm()).detach()
    torch.testing.assert_close(predicted.predicted, exact, rtol=1e-2, atol=0)
    assert smallest.isfinite().all()
    assert (smallest >= 0.999 * exact).all()
    torch.testing.assert_close((nearest.examples - images).flatten(1).norm(dim=-1), smallest)
    with torch.no_grad():
        assert (model(nearest.examples).argmax(-1) != labels).all()
    result = compare(predicted, smallest, torch.ones(40, dtype=torch.bool), [float(exact.median())])
    assert result.rank_correlation is not None
    assert result.rank_correlation > 0.9


def test_the_comparison_counts():
    predicted = Radii(
        center=torch.tensor([2.0, 2.0, 2.0, 1.0]),
        boundary=torch.tensor([1.0, 1.0, 0.2, 1.0]),
        frobenius=torch.tensor([1.0, 1.0, 1.0, 1.0]),
        spectral=torch.tensor([0.5, 1.0, 0.5, 1.0]),
    )
    smallest = torch.tensor([1.5, 3.0, torch.inf, 0.1])
    result = compare(predicted, smallest, torch.tensor([True, True, True, False]), [1.5, 2.0])
    assert (result.images, result.found) == (3, 2)
    assert result.unsafe == 1  # predicted 2, found 1.5
    assert result.rank_correlation is None
    first, second = result.conditions
    assert (first.survived, first.fell) == (2, 1)
    assert (first.center_survived, first.center_fell) == (2, 1)
    assert (first.boundary_survived, first.boundary_fell) == (0, 1)  # 1.5 · 0.5 ≤ 1, 1.5 · 1 > 1, 1.5 · 0.5 > 0.2
    assert (second.center_survived, second.center_fell) == (2, 1)


def test_nothing_correct_and_nothing_found():
    predicted = Radii(*[torch.ones(2)] * 4)
    none = compare(predicted, torch.full((2,), torch.inf), torch.zeros(2, dtype=torch.bool), [1.0])
    assert (none.images, none.found, none.median_found, none.median_predicted) == (0, 0, None, None)

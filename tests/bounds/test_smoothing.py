import pytest
import torch
from torch import nn

from jacobian_robust.bounds import smoothed_radius


def linear():
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    return model


def test_of_a_linear_model_the_radius_is_below_the_distance_and_near_it():
    x = torch.tensor([[0.3, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    predictions, radii = smoothed_radius(linear(), x, 0.5, 20_000, 0.999, torch.Generator().manual_seed(0))
    assert predictions.tolist() == [0, 1]
    distance = x[:, 0].abs()
    assert (radii <= distance).all()
    assert (radii > 0.9 * distance).all()


def test_it_abstains_on_the_boundary_and_with_few_samples():
    x = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    predictions, radii = smoothed_radius(linear(), x, 0.5, 1000, 0.999, torch.Generator().manual_seed(0))
    assert (predictions.item(), radii.item()) == (-1, 0.0)
    predictions, _ = smoothed_radius(linear(), x + 9, 0.5, 5, 0.999, torch.Generator().manual_seed(0))
    assert predictions.item() == -1


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="confidence"):
        smoothed_radius(linear(), torch.zeros(1, 2).double(), 0.5, 10, 1.0, torch.Generator())

"""Small networks and checks that the tests of several penalties share."""

import pytest
import torch
from torch import nn


def smooth_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def check_gradient(penalty):
    """Compare the gradient of a penalty's mean with finite differences."""
    model = smooth_network()
    x, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4

    def value():
        inputs = x.clone().requires_grad_()
        return penalty(model(inputs), inputs, labels).mean()

    weight = model[0].weight
    (gradient,) = torch.autograd.grad(value(), weight)
    direction = torch.randn_like(weight)
    step = 1e-5
    with torch.no_grad():
        weight += step * direction
    after = value().item()
    with torch.no_grad():
        weight -= 2 * step * direction
    before = value().item()
    assert (after - before) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)

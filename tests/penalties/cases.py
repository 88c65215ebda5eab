"""Small networks and checks that the tests of several penalties share."""

import torch
from torch import nn
from torch.func import functional_call


def smooth_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def gradient_is_that_of_finite_differences(penalty) -> bool:
    """Return whether it is, for a penalty's mean and each weight of the first layer; an error says where not.

    Central differences at a step of 1e-6 in float64 are right to about 1e-9.
    """
    model = smooth_network()
    x, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4

    def value(weight):
        inputs = x.clone().requires_grad_()
        return penalty(functional_call(model, {"0.weight": weight}, inputs), inputs, labels).mean()

    weight = model[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.grad(value(weight), weight)[0].abs().max() > 1e-6, "else any gradient would do"
    return torch.autograd.gradcheck(value, weight, eps=1e-6, rtol=1e-5, atol=1e-8)

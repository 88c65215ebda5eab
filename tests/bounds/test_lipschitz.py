import pytest
import torch
from torch import nn

from jacobian_robust.bounds.lipschitz import lipschitz_constant, lipschitz_margin


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_no_convolution_is_longer_than_its_bound(stride, padding, dilation):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride, padding, dilation, bias=False).double()
    basis = torch.eye(2 * 7 * 7, dtype=torch.float64).view(-1, 2, 7, 7)
    exact = torch.linalg.matrix_norm(layer(basis).flatten(1), 2).item()
    assert exact <= lipschitz_constant(nn.Sequential(layer)) <= 3 * exact


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 1), nn.AvgPool2d(3, 2), nn.MaxPool2d(2)])
def test_no_pooling_stretches_more_than_its_bound(pool):
    x = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    x[..., 2, 2] = 1.0  # alone: every window that holds it sees it
    assert pool(x).norm() <= lipschitz_constant(nn.Sequential(pool)) + 1e-9


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3)).double()


def test_of_a_linear_model_the_radius_is_exact_and_one_five_percent_longer_is_broken():
    model, x = linear(), torch.randn(20, 6, dtype=torch.float64)
    labels = model(x).argmax(-1)
    radius = lipschitz_margin(model, x, labels)
    weight = model[0].weight

    def broken(scale):
        moved = []
        for j in range(3):
            step = weight[j] - weight[labels]
            step = step / step.norm(dim=-1, keepdim=True).clamp_min(1e-9)
            moved.append(model(x + scale * radius[:, None] * step).argmax(-1) != labels)
        return torch.stack(moved).any(0)

    assert not broken(0.999).any()
    assert broken(1.05).all()


def test_a_constant_by_power_iteration_is_below_the_exact_one_and_ours_is_not():
    weight = linear()[0].weight.detach()
    vector = torch.ones(6, dtype=torch.float64)
    for _ in range(2):
        vector = nn.functional.normalize(weight.T @ (weight @ vector), dim=0)
    exact = torch.linalg.svdvals(weight)[0].item()
    assert (weight @ vector).norm().item() < exact <= lipschitz_constant(linear())


def test_a_radius_by_plain_power_iteration_is_broken_and_ours_is_not():
    """The planted fault: two layers whose exact constant is attained, so a constant from below promises too much."""
    torch.manual_seed(0)
    first = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q @ torch.diag(torch.arange(1.0, 7.0).double())
    features, last = nn.Linear(6, 6, bias=False).double(), nn.Linear(6, 2).double()
    with torch.no_grad():
        features.weight.copy_(first)
        left, right = torch.linalg.svd(first)[0][:, 0], torch.linalg.svd(first)[2][0]
        last.weight.copy_(torch.stack([left, -left]))
        last.bias.zero_()
    model = nn.Sequential(features, last)
    x = right.repeat(3, 1) * torch.tensor([[0.5], [1.0], [2.0]]).double()
    labels = model(x).argmax(-1)
    distance = x.norm(dim=-1)  # the boundary is the plane through 0 with the normal `right`
    ours = lipschitz_margin(model, x, labels)
    vector = torch.ones(6, dtype=torch.float64)
    for _ in range(2):
        vector = nn.functional.normalize(first.T @ (first @ vector), dim=0)
    planted = ours * lipschitz_constant(nn.Sequential(features)) / (first @ vector).norm()

    def broken(radius):
        step = nn.functional.normalize(x, dim=-1)  # straight to the boundary
        return model(x - radius[:, None] * step).argmax(-1) != labels

    torch.testing.assert_close(ours, distance)
    assert not broken(ours).any()
    assert broken(planted).all()


def test_a_layer_without_a_rule_is_named():
    with pytest.raises(ValueError, match="Softmax"):
        lipschitz_constant(nn.Sequential(nn.Softmax(-1)))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2, 2, dilation=2), nn.AvgPool2d(2, divisor_override=1)])
def test_pooling_that_stretches_more_than_its_overlap_is_refused(pool):
    with pytest.raises(ValueError, match="no Lipschitz rule"):
        lipschitz_constant(nn.Sequential(pool))

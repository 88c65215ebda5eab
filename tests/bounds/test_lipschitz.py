import pytest
import torch
from torch import nn

from jacobian_robust.bounds import lipschitz
from jacobian_robust.bounds.lipschitz import PowerIteration, lipschitz_constant, lipschitz_margin, pairwise_constants


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, 0, 1, 1), (1, 1, 1, 2), (2, 2, 1, 1), (1, 2, 2, 1), (3, 1, 2, 1), ((2, 1), 0, 1, 1), (1, "same", 1, 1)],
)
def test_no_convolution_is_longer_than_its_bound(stride, padding, dilation, groups, coarse, monkeypatch):
    if coarse:
        monkeypatch.setattr(lipschitz, "_LARGEST_SPECTRUM", 0)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 3, stride, padding, dilation, groups, bias=False).double()
    basis = torch.eye(2 * 7 * 7, dtype=torch.float64).view(-1, 2, 7, 7)
    exact = torch.linalg.matrix_norm((layer(basis) - layer(0 * basis)).flatten(1), 2).item()
    assert exact <= lipschitz_constant(layer, basis) <= (3 if coarse else 1.4) * exact


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 1), nn.AvgPool2d(3, 2), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)]
)
def test_no_pooling_stretches_more_than_its_bound(pool):
    x = torch.rand(200, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:100] = 0
    x[0, ..., 2, 2] = 1.0  # alone: every window that holds it sees it
    x[1] = 1.0
    pairs = x.roll(1, 0)
    moved = (pool(x) - pool(pairs)).flatten(1).norm(dim=1)
    bound = lipschitz_constant(pool, x)
    assert (moved <= bound * (x - pairs).flatten(1).norm(dim=1) + 1e-9).all()
    assert bound <= {nn.MaxPool2d: 3, nn.AvgPool2d: 2, nn.AdaptiveAvgPool2d: 1 / 3 + 1e-9}[type(pool)]


class Residual(nn.Module):
    """A residual sum, an operation in place and what is no layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        hidden = self.first(2 * x - 1)
        hidden.mul_(3)
        out = self.norm(self.second(hidden.relu_()))
        out += x / 0.5
        return torch.nn.functional.leaky_relu(out, -3.0)


def test_a_residual_sum_is_bounded_by_the_sum_of_its_branches():
    torch.manual_seed(0)
    model = Residual().eval().double()
    model.norm.running_var.fill_(0.25)
    first, second = (torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (model.first, model.second))
    x = torch.randn(500, 6, dtype=torch.float64)
    bound = lipschitz_constant(model, x)
    scale = (0.25 + 1e-5) ** -0.5
    assert bound == pytest.approx(3 * (6 * first * second * scale + 2))
    slopes = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x).permute(1, 0, 2)
    assert torch.linalg.matrix_norm(slopes, 2).max() <= bound


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.Softplus(), nn.ELU(2.0), nn.Sigmoid(), nn.Tanh()])
def test_no_activation_is_steeper_than_its_bound(activation):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    assert slope.abs().max() <= lipschitz_constant(activation, x[None]) <= 1.01 * slope.abs().max()


def test_pairs_of_sorted_numbers_are_no_stretch_and_other_pairs_than_a_linear_layers_are_of_root_two():
    class Sorted(nn.Module):
        def forward(self, x):
            return x.unflatten(1, (2, -1)).sort(1, descending=True).values.flatten(1)

    x = torch.rand(4, 6, dtype=torch.float64)
    assert lipschitz_constant(Sorted(), x) == 1
    constants = pairwise_constants(Sorted(), x[:1])
    torch.testing.assert_close(constants, 2**0.5 * (1 - torch.eye(6, dtype=torch.float64)))


def test_power_iteration_converges_to_the_norms_from_below_and_has_their_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()
    image = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    norms = PowerIteration(3000, lambda shape: torch.ones(shape).double() + torch.rand(shape))
    early = PowerIteration(1, lambda shape: torch.ones(shape).double())
    constants = pairwise_constants(model, image, norms)
    basis = torch.eye(49, dtype=torch.float64).view(-1, 1, 7, 7)
    operator = nn.functional.conv2d(basis, model[0].weight, stride=2).flatten(1)
    weight = model[3].weight
    expected = torch.linalg.matrix_norm(operator, 2) * (weight[:, None] - weight).norm(dim=-1)
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(constants[off], expected[off], rtol=1e-5, atol=0)
    assert (pairwise_constants(model, image, early)[off] < constants[off]).all()
    assert (constants[off] <= pairwise_constants(model, image)[off]).all()
    ours, theirs = (torch.autograd.grad(k[off].sum(), model[0].weight)[0] for k in (constants, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert torch.autograd.grad(pairwise_constants(model, image, norms).sum(), weight)[0].isfinite().all()


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
    assert (weight @ vector).norm().item() < exact <= lipschitz_constant(linear(), vector[None])


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
    planted = ours * lipschitz_constant(features, x) / (first @ vector).norm()

    def broken(radius):
        step = nn.functional.normalize(x, dim=-1)  # straight to the boundary
        return model(x - radius[:, None] * step).argmax(-1) != labels

    torch.testing.assert_close(ours, distance)
    assert not broken(ours).any()
    assert broken(planted).all()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Softmax(-1), "the layer softmax has no Lipschitz rule"),
        (nn.MaxPool2d(2, 2, dilation=2), "no Lipschitz rule"),
        (nn.AvgPool2d(2, divisor_override=1), "no Lipschitz rule"),
        (nn.AdaptiveAvgPool2d(3), "adaptive_avg_pool2d has no Lipschitz rule"),
        (nn.Softplus(threshold=1), "falls there"),
        (nn.Dropout(), "training mode"),
        (nn.BatchNorm2d(1), "training mode"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "pad has no Lipschitz rule"),
        (lambda x: x * x, "mul of several tensors"),
        (lambda x: 1 / x, "__rdiv__ has no Lipschitz rule"),
        (lambda x: torch.div(torch.ones(1, 1, 4, 4), x), "division by a tensor"),
        (lambda x: torch.add(x, x, alpha=2), "add with such arguments"),
        (lambda x: torch.cat([x, x]), "of a list"),
        (lambda x: x + torch.ones(1, 3, 4, 4), "repeats numbers"),
        (lambda x: torch.ones(3), "returns no tensor that depends"),
    ],
)
def test_what_has_no_rule_is_named(model, said):
    with pytest.raises(ValueError, match=said):
        pairwise_constants(model, torch.rand(1, 1, 4, 4))

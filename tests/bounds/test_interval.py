import math

import pytest
import torch
from torch import nn

from jacobian_robust.bounds import (
    certified_margin,
    crown_margin_bounds,
    fisher_rao_margin,
    interval_bounds,
    margin_bounds,
)
from jacobian_robust.geometry import signed_distance_to_boundary
from jacobian_robust.models import MLP, LeNet, ResNet18


def conv(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(5)).double().eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x):
        x = x.view(x.size(0), -1)
        y = nn.functional.relu(self.inner(x), inplace=True)
        y += 0.5 - x
        return self.last(torch.flatten(y, 1))


MODELS = {
    "relu": lambda: conv(nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
    "leaky": lambda: conv(nn.LeakyReLU(), nn.AvgPool2d(2)),
    "softplus": lambda: conv(nn.Softplus(), nn.AdaptiveAvgPool2d(2)),
    "tanh": lambda: conv(nn.Tanh(), nn.Dropout(), nn.Identity()),
    "sigmoid": lambda: conv(nn.Sigmoid()),
    "gelu": lambda: conv(nn.GELU()),
    "gelu_tanh": lambda: conv(nn.GELU(approximate="tanh")),
    "silu": lambda: conv(nn.SiLU()),
    "batch_norm": lambda: conv(nn.BatchNorm2d(4), nn.ReLU()),
    "group_norm": lambda: conv(nn.GroupNorm(2, 4), nn.ReLU()),
    "residual": lambda: Residual().double(),
    "lenet": lambda: LeNet(5, image_size=8).double(),
    "orthogonal": lambda: LeNet(5, image_size=8, orthogonal=True, pooling="average").double(),
    "mlp": lambda: MLP(5, 64, activation="softplus").double(),
    "resnet": lambda: ResNet18(5, 1, width=8).double().eval(),
    "resnet_batch": lambda: ResNet18(5, 1, norm="batch", width=8).double().eval(),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model(torch.rand(2, 1, 8, 8, dtype=torch.float64))
    return model


def images(count=3):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def points(x, eps, count=60):
    """Random points and random corners of the clipped box."""
    generator = torch.Generator().manual_seed(2)
    steps = 2 * torch.rand(count, *x.shape, generator=generator, dtype=x.dtype) - 1
    steps[::2] = steps[::2].sign()
    return (x + eps * steps).clamp(0, 1)


def test_no_point_of_the_box_leaves_the_bounds_and_crown_is_never_looser(model):
    x, labels, eps = images(), torch.tensor([0, 3, 4]), 0.05
    with torch.no_grad():
        lower, upper = interval_bounds(model, (x - eps).clamp_min(0), (x + eps).clamp_max(1))
        u = margin_bounds(model, x, labels, eps)
        crown = crown_margin_bounds(model, x, labels, eps)
        margin = certified_margin(model, x, labels, eps, method="crown")
        assert (crown <= u + 1e-9).all()
        assert ((margin > 0) == ((crown < 0).sum(-1) == 4)).all()
        tried = points(x, eps)
        logits = model(tried.flatten(0, 1)).view(*tried.shape[:2], -1)
        assert (lower - 1e-9 <= logits).all()
        assert (logits <= upper + 1e-9).all()
        assert (logits - logits.gather(2, labels.expand(len(tried), -1)[..., None]) <= crown + 1e-9).all()
        for one in logits:
            assert (signed_distance_to_boundary(one.softmax(-1), labels) >= margin - 1e-9).all()


def test_of_a_box_of_one_point_the_bounds_are_the_outputs(model):
    x = images()
    for bound in interval_bounds(model, x, x):
        torch.testing.assert_close(bound, model(x))


def test_of_a_linear_model_the_margins_are_attained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    x, labels, eps = 0.25 + images() / 2, torch.tensor([0, 3, 4]), 0.1
    weight = model[1].weight
    for j in range(5):
        worst = x + eps * (weight[j] - weight[labels]).sign().view(x.shape)
        logits = model(worst)
        expected = logits[:, j] - logits.gather(1, labels[:, None]).squeeze(1)
        torch.testing.assert_close(margin_bounds(model, x, labels, eps)[:, j], expected)
        torch.testing.assert_close(crown_margin_bounds(model, x, labels, eps)[:, j], expected)


def test_crown_is_tighter_on_a_deep_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5))
    model, x, labels = model.double(), images(), torch.tensor([0, 3, 4])
    others = ~nn.functional.one_hot(labels, 5).bool()
    ratio = crown_margin_bounds(model, x, labels, 0.02)[others].mean()
    assert ratio < 0.9 * margin_bounds(model, x, labels, 0.02)[others].mean()


def test_the_bounds_have_the_gradient_of_finite_differences():
    model, x, labels = MODELS["relu"](), images(), torch.tensor([0, 3, 4])
    model(x)
    for bounds in (margin_bounds, crown_margin_bounds):
        model.zero_grad()
        bounds(model, x, labels, 0.05).sum().backward()
        weight, step = model[0].weight, 1e-6
        slope = weight.grad[0, 0, 1, 1].item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, 0, 1, 1] += sign * step
                values.append(bounds(model, x, labels, 0.05).sum().item())
                weight[0, 0, 1, 1] -= sign * step
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_the_margin_of_bounds_is_the_least_distance_and_attained_where_none_is_positive():
    generator = torch.Generator().manual_seed(0)
    u = 4 * torch.randn(300, 5, generator=generator, dtype=torch.float64) - 2
    labels = torch.arange(300) % 5
    u[::2] = -u[::2].abs()
    u[torch.arange(300), labels] = 0
    margin = fisher_rao_margin(u, labels)
    negative = (u <= 0).all(-1)
    torch.testing.assert_close(margin[negative], signed_distance_to_boundary(u.softmax(-1), labels)[negative])
    for scale in (0.1, 1.0, 10.0):
        z = u - scale * torch.rand(200, 300, 5, generator=generator, dtype=torch.float64).pow(4)
        z[:, torch.arange(300), labels] = 0
        for logits in z:
            assert (signed_distance_to_boundary(logits.softmax(-1), labels) >= margin - 1e-9).all()
    extreme = torch.tensor([[0.0, 1e4], [0.0, -1e4]], dtype=torch.float32, requires_grad=True)
    ends = fisher_rao_margin(extreme, torch.tensor([0, 0]))
    torch.testing.assert_close(ends, torch.tensor([-math.pi / 2, math.pi / 2]))
    ends.sum().backward()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Softmax(-1), "softmax"),
        (nn.LayerNorm(8), "layer_norm"),
        (nn.LeakyReLU(-0.1), "leaky_relu"),
        (nn.BatchNorm2d(4), "BatchNorm is in training mode"),
        (nn.Softplus(threshold=1.0), "softplus with a threshold"),
        (nn.Dropout(), "dropout is in training mode"),
    ],
)
def test_what_has_no_rule_is_named(layer, name):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layer).train().double()
    with pytest.raises(ValueError, match=name):
        interval_bounds(model, images(), images())


def test_boxes_that_are_none_are_refused():
    model = nn.Flatten()
    with pytest.raises(ValueError, match="lower exceeds upper"):
        interval_bounds(model, images() + 0.1, images())
    for x, eps, message in [(images(), -0.1, "eps"), (images() + 1, 0.1, "outside")]:
        with pytest.raises(ValueError, match=message):
            margin_bounds(model, x, torch.tensor([0, 0, 0]), eps)


def test_double_precision_leaves_the_model_alone():
    model = LeNet(5, image_size=8)
    x, labels = images().float(), torch.tensor([0, 3, 4])
    exact = margin_bounds(model, x, labels, 0.05, float64=True)
    assert exact.dtype == torch.float64
    assert next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(exact.float(), margin_bounds(model, x, labels, 0.05))

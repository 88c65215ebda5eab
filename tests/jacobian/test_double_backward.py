import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.jacobian.double_backward import _MANY, FastDoubleBackward
from jacobian_robust.models import LeNet


def derivatives(function, tensors, fast):
    """Return value, first and second derivatives of a scalar that is not linear in the function's output."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    if fast:
        with FastDoubleBackward():
            y = function(*tensors)
    else:
        y = function(*tensors)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    first = torch.autograd.grad((y.sin() * weights).sum(), tensors, create_graph=True)
    curved = sum((gradient.square() * (1 + gradient)).sum() for gradient in first)
    second = torch.autograd.grad(curved, tensors, create_graph=True)
    third = torch.autograd.grad(sum(g.square().sum() for g in second), tensors, allow_unused=True)
    return [y, *first, *second, *(g for g in third if g is not None)]


def assert_same(function, *tensors):
    for fast, own in zip(derivatives(function, tensors, True), derivatives(function, tensors, False), strict=True):
        torch.testing.assert_close(fast, own, rtol=1e-9, atol=1e-10)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 1000),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    size=st.integers(6, 9),
)
@settings(max_examples=15, deadline=None)
def test_convolutions_have_torchs_derivatives_to_third_order(seed, stride, padding, dilation, groups, size):
    def convolve(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    assert_same(convolve, random(seed, 2, 4, size, size), random(seed + 1, 6, 4 // groups, 3, 2), random(seed + 2, 6))


@pytest.mark.parametrize(("channels", "stride", "padding", "dilation"), [(1, 1, 0, 1), (1, 2, 1, 1), (2, 1, 2, 2)])
def test_convolutions_of_few_channels_have_torchs_derivatives_to_third_order(channels, stride, padding, dilation):
    def convolve(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    assert_same(convolve, random(0, 2, channels, 7, 8), random(1, 13, channels, 3, 2), random(2, 13))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x),
        lambda x: x.relu() * x,
        lambda x: torch.relu(x).square(),
        lambda x: F.max_pool2d(x, 2).square(),
        lambda x: F.max_pool2d(x[..., 1:, :], 2).square(),
        lambda x: F.max_pool2d(F.relu(x[..., 1:, :]), 2).square(),
        lambda x: F.max_pool2d(F.relu(x), 3).square(),
        lambda x: (y := F.relu(x)).square().mean() * F.max_pool2d(y, 2).square(),
        lambda x: F.max_pool2d(x, (3, 2), stride=2, padding=(1, 0), ceil_mode=True).square(),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0].square(),
        lambda x: F.relu(x.square() - 1, inplace=True).square(),
    ],
    ids=[
        "F.relu",
        "Tensor.relu",
        "torch.relu",
        "pool of odd size",
        "pool of even size",
        "ReLU and pool",
        "ReLU and larger pool",
        "ReLU used twice",
        "pool with all arguments",
        "pool with indices",
        "in place",
    ],
)
def test_piecewise_linear_layers_have_torchs_derivatives_to_third_order(function):
    assert_same(lambda x: function(x.square() + x), random(3, 2, 3, 7, 6))


@given(hnp.arrays(np.float32, (1, 2, 4, 6), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])))
@settings(deadline=None)
def test_of_equal_maxima_the_same_one_counts(values):
    """Gradients of whole numbers have no rounding: they are equal bit for bit."""

    def gradient(fast):
        x = torch.from_numpy(values).requires_grad_()
        with FastDoubleBackward() if fast else contextlib.nullcontext():
            y = torch.cat([F.max_pool2d(x, 2), F.max_pool2d(F.relu(x), 2)])
        return torch.autograd.grad(y, x, torch.arange(float(y.numel())).view_as(y))[0]

    assert torch.equal(gradient(True), gradient(False))


def test_same_padding_and_single_images_stay_torchs():
    weight = random(1, 2, 3, 3, 3)
    assert_same(lambda x: F.conv2d(x, weight, padding="same"), random(0, 2, 3, 6, 6))
    assert_same(lambda x: F.conv2d(x, weight), random(0, 3, 6, 6))


def test_the_gradient_of_the_norm_of_the_lenet_is_the_same():
    torch.manual_seed(0)
    model = LeNet()
    images = torch.rand(8, 1, 28, 28)

    def gradients(fast):
        inputs = images.clone().requires_grad_()
        if fast:
            with FastDoubleBackward():
                logits = model(inputs)
        else:
            logits = model(inputs)
        norm = frobenius_norm(logits, inputs, create_graph=True)
        loss = F.cross_entropy(logits, torch.arange(8)) + norm.square().sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for fast, own in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(fast, own, rtol=1e-4, atol=1e-6)


def test_the_pass_to_the_inputs_does_not_compute_the_gradients_of_the_weights(monkeypatch):
    from jacobian_robust.jacobian import double_backward

    calls = []
    of_the_weight = double_backward._weight_gradient
    monkeypatch.setattr(double_backward, "_weight_gradient", lambda *args: calls.append(1) or of_the_weight(*args))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    inputs = torch.rand(2, 1, 6, 6, requires_grad=True)
    with FastDoubleBackward():
        logits = model(inputs)
    norm = frobenius_norm(logits, inputs, probes=1, create_graph=True)
    assert not calls
    norm.sum().backward()
    assert calls


def test_autocast_and_functional_transforms_stay_torchs():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.rand(1, 1, 6, 6)
    with FastDoubleBackward():
        jacobian = torch.func.jacrev(model)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(jacobian, torch.func.jacrev(model)(x))


def test_linear_layers_have_torchs_derivatives_to_third_order():
    weight, bias = random(1, 64, _MANY // 64) / 30, random(2, 64)
    assert_same(lambda x, w, b: F.linear(x, w, b), random(0, 3, _MANY // 64), weight, bias)
    assert_same(lambda x, w: F.linear(F.linear(x, w).square() + 1, w.t()), random(0, 3, _MANY // 64), weight)


def collected(requires_grad=True):
    """Return a network with a large weight, and the graph of a loss with a gradient's norm in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(_MANY // 64, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    model[0].weight.requires_grad_(requires_grad)
    inputs = random(0, 4, _MANY // 64).requires_grad_()
    losses = []
    for context in FastDoubleBackward(), contextlib.nullcontext():
        with context:
            logits = model(inputs)
        norm = frobenius_norm(logits, inputs, create_graph=True)
        losses.append(norm.sum() + logits.square().sum() + model[0].weight.square().sum())
    return model, inputs, *losses


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    model, inputs, fast, own = collected()
    parameters = [*model.parameters(), inputs]
    for asked in parameters, parameters[2:], parameters[:1], parameters:
        found = torch.autograd.grad(fast, asked, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(own, asked, retain_graph=True))
    fast.backward(retain_graph=True)
    fast.backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * found[0])


def test_a_pass_that_fails_leaves_nothing_to_the_next():
    model, _, fast, own = collected()

    def fail(gradient):
        raise RuntimeError("planted")

    hook = model[0].bias.register_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="planted"):
            torch.autograd.grad(fast, list(model.parameters()), retain_graph=True)
    hook.remove()
    found = torch.autograd.grad(fast, list(model.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(own, list(model.parameters())))


def test_a_frozen_weight_gets_no_gradient():
    model, inputs, fast, own = collected(requires_grad=False)
    asked = [model[0].bias, inputs]
    torch.testing.assert_close(torch.autograd.grad(fast, asked), torch.autograd.grad(own, asked))
    assert model[0].weight.grad is None

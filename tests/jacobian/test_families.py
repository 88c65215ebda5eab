"""Norms of outputs that are parameters of other families than the categorical one."""

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

from jacobian_robust.geometry.families import (
    BernoulliProduct,
    Gaussian,
    GaussianMeanScale,
    PixelCategorical,
    Poisson,
    flat,
)
from jacobian_robust.jacobian import frobenius_norm, jacobian_norms, spectral_norm

from .cases import measure, random_inputs

FAMILIES = {
    "labels": (BernoulliProduct(), (4,)),
    "pixels": (PixelCategorical(), (3, 2, 2)),
    "number": (Gaussian(sigma=0.5, tolerance=1.0), ()),
    "numbers and scales": (GaussianMeanScale(tolerance=1.0), (4,)),
    "counts": (Poisson(), (3,)),
}
each_family = pytest.mark.parametrize(("family", "shape"), FAMILIES.values(), ids=FAMILIES)


def network(shape):
    torch.manual_seed(0)
    outputs = torch.Size(shape).numel()
    layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs)).double()
    return layers, lambda x: layers(x).view(len(x), *shape)


def pulled_back(family, model, inputs):
    """Return ``J_sᵀ I(s) J_s`` of each sample, by another way of differentiating, with ``I = L Lᵀ`` whole."""
    jacobian = vmap(jacrev(lambda x: flat(model(x[None]))[0]))(inputs)
    outputs = model(inputs)
    factor, size = family.factor(outputs), flat(outputs).shape[1]
    metric = torch.stack([factor @ factor.transposed(e.expand(len(inputs), -1)) for e in torch.eye(size).double()], 1)
    return jacobian.mT @ metric @ jacobian


@each_family
def test_exact_norms_are_those_of_the_pulled_back_metric(family, shape):
    _, model = network(shape)
    inputs = random_inputs(0)
    eigenvalues = torch.linalg.eigvalsh(pulled_back(family, model, inputs)).clamp_min(0)
    frobenius, spectral = eigenvalues.sum(-1).sqrt(), eigenvalues[:, -1].sqrt()
    torch.testing.assert_close(measure(frobenius_norm, model, inputs, family=family), frobenius)
    torch.testing.assert_close(measure(spectral_norm, model, inputs, family=family), spectral)
    iterated = measure(spectral_norm, model, inputs, family=family, columns=1, tolerance=1e-9)
    torch.testing.assert_close(iterated, spectral)
    for ours, theirs in zip(measure(jacobian_norms, model, inputs, family=family), (frobenius, spectral), strict=True):
        torch.testing.assert_close(ours, theirs)


@each_family
@pytest.mark.parametrize("probes", [1, 2])
def test_probed_squares_and_gradients_are_unbiased(family, shape, probes):
    layers, model = network(shape)
    draws, x = 4000, random_inputs(3, batch=1)
    inputs = x.repeat(draws, 1).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    squared = frobenius_norm(
        model(inputs), inputs, family=family, probes=probes, generator=generator, create_graph=True
    ).square()
    exact = measure(frobenius_norm, model, x, family=family, create_graph=True).square()[0]
    assert abs(squared.mean() - exact) < 4 * squared.std() / draws**0.5 + 1e-12
    (expected,) = torch.autograd.grad(exact, layers[0].weight)
    parts = [torch.autograd.grad(part.mean(), layers[0].weight, retain_graph=True)[0] for part in squared.chunk(20)]
    stacked = torch.stack(parts)
    standard_error = (stacked.var(0).sum() / len(parts)).sqrt()
    assert (stacked.mean(0) - expected).norm() < 4 * standard_error + 1e-9 * expected.norm()


@each_family
def test_gradients_flow_to_the_parameters(family, shape):
    layers, model = network(shape)
    for norm in (frobenius_norm, spectral_norm):
        x = random_inputs(2).requires_grad_()
        weight = layers[0].weight
        (gradient,) = torch.autograd.grad(norm(model(x), x, family=family, create_graph=True).sum(), weight)
        direction = torch.randn_like(weight)
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
            values.append(norm(model(x), x, family=family).sum().item())
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_a_probe_of_a_whole_segmentation_is_one_product():
    """28×28 pixels of 11 classes: 7,840 products exactly, one with a probe."""
    torch.manual_seed(0)
    model, products = nn.Conv2d(1, 11, 3, padding=1), []
    inputs = torch.rand(2, 1, 28, 28).requires_grad_()
    outputs = model(inputs)
    outputs.register_hook(lambda gradient: products.append(gradient.shape))
    family = PixelCategorical()
    assert family.rank(outputs) == 7840
    norm = frobenius_norm(outputs, inputs, family=family, probes=1, create_graph=True)
    assert products == [outputs.shape]
    (gradient,) = torch.autograd.grad(norm.sum(), model.weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("family", "outputs", "message"),
    [
        (PixelCategorical(), (2, 3), r"expected logits \(batch, classes ≥ 2, height, width\)"),
        (GaussianMeanScale(tolerance=1.0), (2, 3), "expected means and logarithms of standard deviations"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(family, outputs, message):
    inputs = torch.zeros(2, 6, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        frobenius_norm(torch.zeros(outputs, requires_grad=True), inputs, family=family)

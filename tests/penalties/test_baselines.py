import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

from jacobian_robust import geometry
from jacobian_robust.penalties import (
    VAT,
    Curvature,
    InputGradient,
    LogitJacobian,
)
from tests.penalties.cases import gradient_is_that_of_finite_differences, smooth_network


def test_the_logit_jacobians_penalty_is_its_formula_and_projections_are_unbiased():
    model = smooth_network()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    jacobian = vmap(jacrev(model))(x)
    expected = jacobian.square().sum((1, 2)) / 2
    exact = LogitJacobian(projections=None)(model(x), x)
    torch.testing.assert_close(exact, expected)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([LogitJacobian(projections=2)(model(x), x, generator=generator).detach() for _ in range(2000)])
    error = (draws.mean(0) - expected) / (draws.std(0) / 2000**0.5)
    assert error.abs().max() < 4


def test_the_input_gradients_penalty_is_its_formula():
    model = smooth_network()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) % 4
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels, reduction="sum"), x)
    torch.testing.assert_close(InputGradient()(model(x), x, labels), gradient.square().sum(1))
    torch.testing.assert_close(InputGradient(norm="l1")(model(x), x, labels), gradient.abs().sum(1))


def test_the_virtual_adversary_finds_the_fisher_metrics_top_direction():
    """At a small radius the divergence is ε²‖J_μ‖₂²/2, and no direction has more."""
    model = smooth_network()
    x = torch.randn(6, 5, dtype=torch.float64)
    jacobian = vmap(jacrev(lambda x: geometry.sphere_embedding(model(x).softmax(-1))))(x)
    expected = 1e-6 * torch.linalg.matrix_norm(jacobian, 2).square() / 2
    torch.manual_seed(0)
    value = VAT(eps=1e-3, xi=1e-3, iterations=50)(model(x), x, model=model)
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)


def test_cures_curvature_is_the_hessian_along_the_gradients_sign():
    model = smooth_network()
    x, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4

    def loss(x, own):
        return -model(x).log_softmax(-1) @ own

    own = nn.functional.one_hot(labels, 4).double()
    z = vmap(jacrev(loss))(x, own).sign() / 5**0.5
    hessian = vmap(jacrev(jacrev(loss)))(x, own)
    expected = 1e-6 * (hessian @ z[..., None]).squeeze(-1).square().sum(-1)
    inputs = x.clone().requires_grad_()
    value = Curvature(h=1e-3)(model(inputs), inputs, labels, model=model)
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("penalty", [LogitJacobian(projections=None), InputGradient(), InputGradient(norm="l1")])
def test_the_gradient_is_that_of_finite_differences(penalty):
    assert gradient_is_that_of_finite_differences(penalty)

"""The penalties of eq. 15 and of the margin, for outputs of every family."""

import math

import pytest
import torch
from torch import nn

from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import (
    BernoulliProduct,
    Gaussian,
    GaussianMeanScale,
    PixelCategorical,
    Poisson,
)
from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.penalties import VAT, Frobenius, Lagrangian, LinearMargin, Margin, Spectral

TARGETS = {
    "labels": (BernoulliProduct(), (3,), lambda n: torch.arange(3 * n).view(n, 3) % 2),
    "pixels": (PixelCategorical(share=0.5), (3, 2, 2), lambda n: torch.arange(4 * n).view(n, 2, 2) % 3),
    "numbers": (Gaussian(sigma=0.5, tolerance=1.0), (2,), lambda n: torch.linspace(-1, 1, 2 * n).view(n, 2).double()),
    "numbers and scales": (GaussianMeanScale(tolerance=1.0), (2,), lambda n: torch.linspace(-1, 1, n).double()),
    "counts": (Poisson(), (1,), lambda n: torch.arange(n) % 4),
}
each_family = pytest.mark.parametrize(("family", "shape", "targets"), TARGETS.values(), ids=TARGETS)

PENALTIES = [
    Frobenius(eps=1.0),
    Frobenius(delta_over_eps=0.5),
    Spectral(eps=1.0),
    Margin(eps=0.5),
    LinearMargin(eps=0.2),
    LinearMargin(eps=0.2, norm="l2", rivals=2),
]


def network(shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, math.prod(shape)), nn.Unflatten(1, shape)).double()


@each_family
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_the_gradient_is_that_of_finite_differences(penalty, family, shape, targets):
    if isinstance(family, GaussianMeanScale) and isinstance(penalty, Frobenius) and penalty.eps is None:
        pytest.skip("no largest distance: refused below")
    penalty, model = penalty.with_family(family), network(shape)
    x, y, weight = torch.randn(6, 5, dtype=torch.float64), targets(6), model[0].weight

    def value():
        inputs = x.clone().requires_grad_()
        return penalty(model(inputs), inputs, y).mean()

    (gradient,) = torch.autograd.grad(value(), weight)
    direction, values = torch.randn_like(weight), []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        values.append(value().item())
    seen = (values[0] - values[1]) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(seen, rel=1e-4, abs=1e-8)
    assert gradient.abs().max() > 0


@each_family
def test_eq_15_and_the_margin_are_their_formulas(family, shape, targets):
    model, x = network(shape), torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    outputs, y = model(x), targets(4)
    norm = frobenius_norm(outputs, x, family=family)
    exponent = norm - family.distance_to_boundary(outputs) / 0.7
    torch.testing.assert_close(Frobenius(eps=0.7, family=family)(outputs, x), exponent.exp())
    violation = 0.7 * norm - family.signed_distance_to_boundary(outputs, y)
    margin = Margin(eps=0.7, kappa=5, family=family)(outputs, x, y)
    torch.testing.assert_close(margin, (1 + (5 * violation).exp()).log() / 5)


def test_the_linear_margin_of_a_linear_regression_is_exact():
    """The ℓ∞ ball of radius ε moves a linear mean by ε‖w‖₁: the violation is what is left of τ."""
    model = nn.Linear(5, 1).double()
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    outputs = model(x)
    targets = outputs.detach() + 0.3
    value = LinearMargin(eps=0.2, kappa=1e3, family=Gaussian(sigma=0.5, tolerance=0.4))(outputs, x, targets)
    expected = (0.2 * model.weight.abs().sum() - (0.4 - 0.3)) / 0.5
    assert expected > 0.05
    torch.testing.assert_close(value, expected.expand(4).detach(), check_dtype=False)


def test_what_is_of_classes_alone_is_refused():
    for penalty in (VAT(eps=1.0, xi=0.1), Lagrangian(penalty=Margin(eps=1.0), rate=0.1, damping=1.0)):
        with pytest.raises(UserError, match="is for classification alone; choose frobenius"):
            penalty.with_family(Poisson())
    with pytest.raises(ValueError, match="distance=logits is the lead of a class"):
        LinearMargin(eps=0.1, distance="logits").with_family(Poisson())
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="no largest distance where a model gives σ; give eps"):
        Frobenius(delta_over_eps=1e-3, family=GaussianMeanScale(tolerance=1.0))(x[:, :2] + 0, x)

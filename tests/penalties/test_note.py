import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.func import jacrev, vmap

from jacobian_robust import geometry
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.models import LeNet
from jacobian_robust.penalties import (
    Frobenius,
    Isometry,
    Spectral,
    capped_exp,
    satisfies_condition,
)
from tests.penalties.cases import gradient_is_that_of_finite_differences, smooth_network


@given(st.floats(-100, 100), st.floats(0.1, 30))
def test_capped_exp_is_the_exponential_below_the_cap_and_its_tangent_above(x, cap):
    value = capped_exp(torch.tensor(x, dtype=torch.float64), cap).item()
    expected = math.exp(x) if x <= cap else math.exp(cap) * (1 + x - cap)
    assert value == pytest.approx(expected, rel=1e-12)


def test_capped_exp_has_a_continuous_slope():
    x = torch.tensor([4.999999, 5.000001, 80.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(capped_exp(x, 5.0).sum(), x)
    torch.testing.assert_close(slope, torch.full((3,), math.exp(5), dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("cls", "order"), [(Frobenius, "fro"), (Spectral, 2)])
@pytest.mark.parametrize("bound", ["center", "boundary"])
@pytest.mark.parametrize("chart", ["stereographic", "sphere"])
def test_penalty_is_equation_15(cls, order, bound, chart):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    eps = 0.7

    embedding = geometry.stereographic if chart == "stereographic" else geometry.sphere_embedding
    norm = torch.linalg.matrix_norm(vmap(jacrev(lambda z: embedding(model(z).softmax(-1))))(x), order)
    p = model(x).softmax(-1)
    distance = geometry.distance_to_center(p) if bound == "center" else geometry.distance_to_boundary(p)
    rho = geometry.conformal_factor(p) if chart == "stereographic" else 1
    expected = torch.exp(norm - distance / (rho * eps))

    x = x.clone().requires_grad_()
    penalty = cls(eps=eps, chart=chart, bound=bound, cap=40)(model(x), x)
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cls", [Frobenius, Spectral, Isometry])
def test_a_network_that_ends_in_a_softmax_is_penalised_as_without_it(cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    expected = cls(eps=0.7)(model(x), x)
    penalty = cls(eps=0.7, outputs="probabilities")(model(x).softmax(-1), x)
    torch.testing.assert_close(penalty, expected)
    gradients = [torch.autograd.grad(value.sum(), list(model.parameters())) for value in (penalty, expected)]
    torch.testing.assert_close(*gradients)
    certain = torch.eye(4, dtype=torch.float64)[[0] * 6] + 0 * x[:, :4]  # classes of no probability
    assert cls(eps=0.7, outputs="probabilities")(certain, x).isfinite().all()


def test_the_notes_ratio_gives_its_radius():
    assert Frobenius(delta_over_eps=1e-3).radius(10) == pytest.approx(2498, abs=0.5)
    assert Frobenius(eps=1.5).radius(10) == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither is set"),
        ({"eps": 1, "delta_over_eps": 1e-3}, "both are set"),
        ({"eps": 0}, "greater than or equal to 0.000001"),
        ({"eps": -1}, "greater than or equal to 0.000001"),
        ({"eps": math.inf}, "finite"),
        ({"delta_over_eps": 0}, "greater than or equal to 0.000001"),
        ({"eps": 1, "cap": 0}, "greater than 0"),
        ({"eps": 1, "cap": 100}, "less than or equal to 40"),
        ({"eps": 1, "chart": "mercator"}, "'stereographic' or 'sphere'"),
        ({"eps": 1, "bound": "edge"}, "'center' or 'boundary'"),
        ({"eps": 1, "probes": 0}, "greater than 0"),
        ({"eps": 1, "radius": 2}, "[Uu]nexpected"),
        ({"eps": "wide"}, "valid number"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Frobenius(**options)


@pytest.mark.parametrize("penalty", [Frobenius, Spectral])
@pytest.mark.parametrize("chart", ["stereographic", "sphere"])
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), st.floats(1e-6, 1e6))
def test_penalty_and_its_gradient_are_finite_for_any_logits_in_float32(penalty, chart, values, eps):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = torch.zeros(1, 4, requires_grad=True)
    value = penalty(eps=eps, chart=chart)(inputs @ weight.T + torch.tensor([values]), inputs).sum()
    (gradient,) = torch.autograd.grad(value, weight)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_condition_compares_the_norm_with_the_distance_over_eps():
    logits = torch.tensor([[3.0, 0.0, 0.0]])
    p = logits.softmax(-1)
    for bound, distance in (("center", geometry.distance_to_center(p)), ("boundary", geometry.distance_to_boundary(p))):
        assert satisfies_condition(distance / 2 - 1e-4, logits, bound=bound, eps=2.0).all()
        assert not satisfies_condition(distance / 2 + 1e-4, logits, bound=bound, eps=2.0).any()


@pytest.mark.slow
def test_values_and_gradients_stay_finite_while_a_network_becomes_confident():
    """2,000 steps of plain training on real images, with a learning rate that leads to one-hot predictions."""
    datamodule = MNISTDataModule()
    datamodule.setup("fit")
    torch.manual_seed(0)
    model = LeNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = itertools.chain.from_iterable(datamodule.train_dataloader() for _ in range(2))
    penalties = [Frobenius(delta_over_eps=1e-3, probes=1), Spectral(delta_over_eps=1e-3, columns=2, tolerance=0.02)]
    confidence = torch.zeros(())
    for step, (images, labels) in enumerate(itertools.islice(batches, 2000)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step % 10 == 9:
            inputs = images.requires_grad_()
            logits = model(inputs)
            confidence = logits.softmax(-1).max(-1).values.median()
            for penalty in penalties:
                alpha = penalty(logits, inputs)
                gradients = torch.autograd.grad(alpha.mean(), list(model.parameters()), retain_graph=True)
                assert alpha.isfinite().all()
                assert all(gradient.isfinite().all() for gradient in gradients)
    assert confidence > 0.999


@pytest.mark.parametrize("bound", ["center", "boundary"])
@pytest.mark.parametrize("chart", ["stereographic", "sphere"])
def test_the_isometry_penalty_is_its_formula(bound, chart):
    model = smooth_network()
    x = torch.randn(6, 5, dtype=torch.float64)
    eps, m = 0.7, 3
    p = model(x).softmax(-1)
    distance = geometry.distance_to_center(p) if bound == "center" else geometry.distance_to_boundary(p)
    if chart == "stereographic":
        jacobian = vmap(jacrev(lambda z: geometry.stereographic(model(z).softmax(-1))))(x)
        wanted = (distance / (geometry.conformal_factor(p) * eps)).square()[:, None, None] * torch.eye(m)
    else:  # μ has m + 1 coordinates and no component along itself
        jacobian = vmap(jacrev(lambda z: geometry.sphere_embedding(model(z).softmax(-1))))(x)
        unit = geometry.sphere_embedding(p) / 2
        tangent = torch.eye(m + 1) - unit[:, :, None] * unit[:, None]
        wanted = (distance / eps).square()[:, None, None] * tangent
    expected = eps**2 * torch.linalg.matrix_norm(jacobian @ jacobian.mT - wanted)

    x = x.clone().requires_grad_()
    penalty = Isometry(eps=eps, chart=chart, bound=bound, rho_min=1e-9)(model(x), x)
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_the_isometry_penalty_and_its_gradient_are_finite_however_confident_the_model(scale):
    torch.manual_seed(0)
    model = nn.Linear(5, 10)
    x = torch.randn(8, 5, requires_grad=True)
    penalty = Isometry(eps=5.6)(scale * model(x), x).mean()
    gradients = torch.autograd.grad(penalty, list(model.parameters()))
    assert penalty.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("penalty", [Isometry(eps=0.5)])
def test_the_gradient_is_that_of_finite_differences(penalty):
    assert gradient_is_that_of_finite_differences(penalty)


def test_a_tolerance_without_a_subspace_is_refused():
    with pytest.raises(ValidationError, match="tolerance: the norm is exact without columns; give columns=2"):
        Spectral(eps=1.0, tolerance=0.02)

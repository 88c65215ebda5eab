import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

from jacobian_robust import geometry
from jacobian_robust.penalties import (
    LinearMargin,
    Margin,
)
from tests.penalties.cases import gradient_is_that_of_finite_differences, smooth_network


def test_the_margin_penalty_is_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (6,))
    theta = model(x).softmax(-1)
    jacobian = vmap(jacrev(lambda x: geometry.sphere_embedding(model(x).softmax(-1))))(x)
    norm = torch.linalg.matrix_norm(jacobian)
    own = theta.gather(1, labels[:, None]).squeeze(1).sqrt()
    other = theta.scatter(1, labels[:, None], 0).amax(1).sqrt()
    violation = 0.7 * norm - 2 * torch.asin((own - other) / 2**0.5)
    expected = (1 + (5 * violation).exp()).log() / 5
    torch.testing.assert_close(Margin(eps=0.7, kappa=5)(model(x), x, labels), expected)


def test_the_margin_penalty_is_zero_where_the_ball_is_inside_and_the_violation_far_outside():
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    logits = logits + x.sum(1, keepdim=True) * torch.tensor([1, -1])
    inside, outside = Margin(eps=1e-6, kappa=200)(logits, x, torch.tensor([0, 0]))
    assert inside < 1e-6
    d = float(geometry.distance_to_boundary(logits[:1].softmax(-1)))
    assert float(outside) == pytest.approx(d, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_the_margin_penalty_and_its_gradient_are_finite_however_confident_the_model(scale):
    torch.manual_seed(0)
    model = nn.Linear(5, 10)
    x = torch.randn(8, 5, requires_grad=True)
    logits = scale * model(x)
    penalty = Margin(eps=4.0, probes=1)(logits, x, torch.arange(8)).mean()
    gradients = torch.autograd.grad(penalty, list(model.parameters()))
    assert penalty.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("distance", ["fisher_rao", "logits"])
@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("rivals", [1, 2, None])
def test_the_linear_margin_penalty_is_its_formula(distance, norm, dual, rivals):
    model = smooth_network()
    x, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4

    def distances(x, own):
        value = model(x) if distance == "logits" else model(x).softmax(-1).sqrt()
        lead = value @ own - value
        return lead if distance == "logits" else 2 * torch.asin(lead / 2**0.5)

    own = nn.functional.one_hot(labels, 4).double()
    fall = 0.7 * torch.linalg.vector_norm(vmap(jacrev(distances))(x, own), ord=dual, dim=-1)
    violation = fall - vmap(distances)(x, own)
    likeliest = model(x).scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)[:, : rivals or 3]
    expected = (1 + (5 * violation.gather(1, likeliest).amax(1)).exp()).log() / 5
    x = x.clone().requires_grad_()
    penalty = LinearMargin(eps=0.7, norm=norm, distance=distance, kappa=5, rivals=rivals)(model(x), x, labels)
    torch.testing.assert_close(penalty, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_linear_margin_of_a_linear_model_is_the_radius_at_which_it_breaks(norm):
    """The penalty is zero below the distance to the boundary of the logits' lead, and positive above it."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    labels = model(x).argmax(-1)
    lead = model(x).gather(1, labels[:, None]) - model(x)
    slopes = torch.linalg.vector_norm(
        model.weight[labels][:, None] - model.weight, ord=1 if norm == "linf" else 2, dim=-1
    )
    breaks = (lead / slopes).nan_to_num(torch.inf, torch.inf).amin(1)
    for sample, radius in enumerate(breaks.tolist()):
        for share, inside in ((0.99, True), (1.01, False)):
            options = {"eps": share * radius, "norm": norm, "distance": "logits", "kappa": 1e6, "rivals": None}
            value = LinearMargin(**options)(model(x), x, labels)[sample]
            assert (value < 1e-9) == inside


def test_the_euclidean_linear_margin_is_at_most_the_margin_penalty():
    """Its gradient is no longer than the Frobenius norm, which counts all classes."""
    model = smooth_network()
    x, labels = torch.randn(200, 5, dtype=torch.float64).requires_grad_(), torch.arange(200) % 4
    linear = LinearMargin(eps=0.7, norm="l2")(model(x), x, labels)
    bound = Margin(eps=0.7)(model(x), x, labels)
    assert (linear <= bound + 1e-12).all()
    assert (linear < 0.99 * bound).any()


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("distance", ["fisher_rao", "logits"])
def test_the_linear_margin_and_its_gradient_are_finite_however_confident_the_model(scale, distance):
    torch.manual_seed(0)
    model = nn.Linear(5, 10)
    x = torch.randn(8, 5, requires_grad=True)
    penalty = LinearMargin(eps=0.1, distance=distance, rivals=None)(scale * model(x), x, torch.arange(8)).mean()
    gradients = torch.autograd.grad(penalty, list(model.parameters()))
    assert penalty.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "penalty",
    [Margin(eps=0.5), LinearMargin(eps=0.5), LinearMargin(eps=0.5, norm="l2", distance="logits", rivals=None)],
)
def test_the_gradient_is_that_of_finite_differences(penalty):
    assert gradient_is_that_of_finite_differences(penalty)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev

from jacobian_robust import geometry

classes = st.integers(2, 12)
seeds = st.integers(0, 2**20)


def simplex(classes: int, seed: int, *, batch: int = 4, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)).softmax(-1)


def free_coordinates(p: torch.Tensor) -> torch.Tensor:
    """The chart of eq. 3: all probabilities but the last."""
    return torch.cat([p, 1 - p.sum(-1, keepdim=True)], dim=-1)


@given(classes, seeds)
def test_fisher_metric_is_the_pullback_through_the_sphere_and_the_stereographic_chart(c, seed):
    p = simplex(c, seed, batch=1)[0]
    metric = geometry.fisher_metric(p)
    sphere = jacrev(lambda q: geometry.sphere_embedding(free_coordinates(q)))(p[:-1])
    chart = jacrev(lambda q: geometry.stereographic(free_coordinates(q)))(p[:-1])
    rho = geometry.conformal_factor(p)
    torch.testing.assert_close(metric, sphere.T @ sphere, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metric, rho**2 * chart.T @ chart, rtol=1e-8, atol=1e-8)


@given(classes, seeds)
def test_fisher_metric_is_the_fisher_information(c, seed):
    p = simplex(c, seed, batch=1)[0]
    score = jacrev(lambda q: free_coordinates(q).log())(p[:-1])  # one row an outcome
    torch.testing.assert_close(geometry.fisher_metric(p), score.T @ torch.diag(p) @ score, rtol=1e-9, atol=1e-9)


@given(classes, seeds)
def test_sphere_embedding_has_radius_two(c, seed):
    norms = geometry.sphere_embedding(simplex(c, seed)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 2.0))


@given(classes, seeds)
def test_stereographic_chart_has_an_inverse(c, seed):
    p = simplex(c, seed)
    torch.testing.assert_close(geometry.from_stereographic(geometry.stereographic(p)), p, rtol=1e-9, atol=1e-12)


@given(classes, seeds)
def test_conformal_factor_equals_both_forms_of_the_note(c, seed):
    p = simplex(c, seed)
    rho = geometry.conformal_factor(p)
    t = geometry.stereographic(p)
    root = p[..., -1].sqrt()
    torch.testing.assert_close(rho, 2 / ((t / 2).square().sum(-1) + 1))
    torch.testing.assert_close(rho, (2 * (1 - root) - p[..., :-1].sum(-1)) / (1 - root))
    torch.testing.assert_close(rho, 1 - root)


@given(classes, seeds, st.floats(0.1, 15))
def test_log_conformal_factor_agrees_with_the_factor(c, seed, spread):
    logits = spread * torch.randn(3, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(
        geometry.log_conformal_factor(logits), geometry.conformal_factor(logits.softmax(-1)).log(), rtol=1e-9, atol=1e-9
    )


@given(classes, seeds)
def test_fisher_rao_distance_is_the_arccosine_formula(c, seed):
    p, q = simplex(c, seed), simplex(c, seed + 1)
    expected = 2 * torch.arccos((p * q).sqrt().sum(-1).clamp_max(1))
    torch.testing.assert_close(geometry.fisher_rao_distance(p, q), expected, rtol=1e-6, atol=1e-7)


@given(classes, seeds)
def test_fisher_rao_distance_is_a_metric(c, seed):
    p, q, r = simplex(c, seed), simplex(c, seed + 1), simplex(c, seed + 2)
    d = geometry.fisher_rao_distance
    assert torch.equal(d(p, p), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(d(p, q), d(q, p))
    assert (d(p, r) <= d(p, q) + d(q, r) + 1e-12).all()
    assert (d(p, q) <= math.pi + 1e-12).all()


@given(classes, seeds)
def test_fisher_rao_distance_is_the_length_of_the_great_circle(c, seed):
    p, q = simplex(c, seed, batch=1), simplex(c, seed + 1, batch=1)
    mu, nu = geometry.sphere_embedding(p), geometry.sphere_embedding(q)
    chord = mu + torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None] * (nu - mu)
    arc = 2 * chord / chord.norm(dim=-1, keepdim=True)
    length = arc.diff(dim=0).norm(dim=-1).sum()
    torch.testing.assert_close(geometry.fisher_rao_distance(p, q)[0], length, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 2**20), st.integers(3, 8))
def test_merging_outcomes_shortens_and_splitting_them_at_random_keeps_distances(seed, c):
    """Chentsov: the Fisher metric is invariant under sufficient statistics, and shrinks under others."""
    p, q = simplex(c, seed), simplex(c, seed + 1)
    d = geometry.fisher_rao_distance

    def merged(x):
        return torch.cat([x[:, :1] + x[:, 1:2], x[:, 2:]], dim=-1)

    def split(x):
        return torch.cat([0.3 * x[:, :1], 0.7 * x[:, :1], x[:, 1:]], dim=-1)

    assert (d(merged(p), merged(q)) <= d(p, q) + 1e-12).all()
    torch.testing.assert_close(d(split(p), split(q)), d(p, q))


@given(classes, seeds)
def test_distance_to_center_lies_between_zero_and_its_maximum(c, seed):
    p = simplex(c, seed, spread=20)
    delta = geometry.distance_to_center(p)
    largest = geometry.max_distance_to_center(c)
    assert (delta >= 0).all()
    assert (delta <= largest + 1e-9).all()
    expected = 2 * torch.arccos((p / c).sqrt().sum(-1).clamp_max(1))
    torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-6)


def test_distance_to_center_of_a_vertex_and_of_the_center():
    vertex = torch.eye(10, dtype=torch.float64)[3]
    assert geometry.distance_to_center(vertex).item() == pytest.approx(geometry.max_distance_to_center(10), abs=1e-12)
    assert geometry.max_distance_to_center(10) == pytest.approx(2.498, abs=5e-4)
    assert geometry.distance_to_center(torch.full((10,), 0.1)).item() == 0


def test_one_class_has_no_boundary():
    with pytest.raises(ValueError, match="at least 2 classes"):
        geometry.max_distance_to_center(1)


@given(classes, seeds)
def test_distance_to_boundary_is_reached_at_the_foot_and_nowhere_undercut(c, seed):
    p = simplex(c, seed, batch=1)
    d_b = geometry.distance_to_boundary(p)[0]
    mu = geometry.sphere_embedding(p)[0]
    i, j = mu.topk(2).indices.tolist()
    foot = mu.clone()
    foot[i] = foot[j] = (mu[i] + mu[j]) / 2
    foot = (foot / foot.norm()).square()
    torch.testing.assert_close(geometry.fisher_rao_distance(p[0], foot), d_b, rtol=1e-9, atol=1e-9)

    tied = simplex(c, seed + 1, batch=500)
    top = tied.topk(2, dim=-1)
    tied.scatter_(1, top.indices, top.values.mean(-1, keepdim=True).expand(-1, 2))
    assert (geometry.fisher_rao_distance(p, tied) >= d_b - 1e-12).all()


@given(classes, seeds)
def test_distance_to_boundary_is_at_most_the_distance_to_the_center(c, seed):
    p = simplex(c, seed)
    assert (geometry.distance_to_boundary(p) <= geometry.distance_to_center(p) + 1e-12).all()


@pytest.mark.parametrize("function", [geometry.distance_to_boundary, geometry.distance_to_center])
def test_distances_are_invariant_under_relabelling(function):
    p = simplex(6, 0)
    torch.testing.assert_close(function(p.flip(-1)), function(p))


def boundary_points(c: int, dtype: torch.dtype) -> torch.Tensor:
    """Vertices, edge midpoints, the center, and predictions beyond float32's smallest number."""
    eye = torch.eye(c, dtype=dtype)
    logits = torch.zeros(3, c, dtype=dtype)
    logits[0, 0], logits[1, -1], logits[2, 0] = 90.0, 90.0, 1e4
    return torch.cat([eye, (eye + eye.roll(1, 0)) / 2, torch.full((1, c), 1 / c, dtype=dtype), logits.softmax(-1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [2, 3, 10, 100])
@pytest.mark.parametrize(
    "function",
    [
        geometry.sphere_embedding,
        geometry.conformal_factor,
        geometry.stereographic,
        geometry.fisher_metric,
        geometry.distance_to_center,
        geometry.distance_to_boundary,
        lambda p: geometry.fisher_rao_distance(p, p.roll(1, 0)),
        lambda p: geometry.from_stereographic(geometry.stereographic(p)),
    ],
    ids=["sphere", "rho", "chart", "metric", "delta", "d_B", "distance", "roundtrip"],
)
def test_values_and_gradients_are_finite_on_the_boundary(function, c, dtype):
    p = boundary_points(c, dtype).requires_grad_()
    value = function(p)
    assert value.dtype == dtype
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), p)
    assert gradient.isfinite().all()


@settings(max_examples=200)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12))
def test_gradients_with_respect_to_logits_are_finite_for_any_logits_in_float32(values):
    logits = torch.tensor([values], requires_grad=True)
    p = logits.softmax(-1)
    total = (
        geometry.distance_to_center(p)
        + geometry.distance_to_boundary(p)
        + geometry.log_conformal_factor(logits)
        + geometry.conformal_factor(p)
    ).sum()
    total.backward()
    assert total.isfinite()
    assert logits.grad.isfinite().all()


@given(classes, seeds)
def test_the_signed_distance_is_that_to_the_boundary_of_the_true_class(c, seed):
    p = simplex(c, seed, batch=1)
    best = int(p.argmax())
    for label in range(c):
        signed = geometry.signed_distance_to_boundary(p, torch.tensor([label]))[0]
        if label == best:
            torch.testing.assert_close(signed, geometry.distance_to_boundary(p)[0])
            continue
        mu = geometry.sphere_embedding(p)[0]
        foot = mu.clone()
        foot[label] = foot[best] = (mu[label] + mu[best]) / 2
        to_the_foot = geometry.fisher_rao_distance(p[0], (foot / foot.norm()).square())
        torch.testing.assert_close(-signed, to_the_foot, rtol=1e-9, atol=1e-9)

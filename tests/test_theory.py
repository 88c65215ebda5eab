"""The note's chain of reasoning, eqs. 1 to 14, on random distributions, metrics and networks, in float64.

What concerns one formula alone (eqs. 5 and 6, both forms of ρ, distances under merged and split outcomes) is tested in
``test_geometry.py``; the norms against the chart's Jacobian in ``test_jacobian.py``.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacrev

from jacobian_robust import geometry
from jacobian_robust.jacobian import spectral_norm
from jacobian_robust.penalties import satisfies_condition

from .geometry.test_simplex import free_coordinates, simplex
from .jacobian.test_norms import network, random_inputs

classes = st.integers(2, 8)
seeds = st.integers(0, 2**20)

SHAPES = {
    "ln": torch.log,
    "identity": lambda u: u - 1,
    "square": lambda u: (u.square() - 1) / 2,
    "sine": lambda u: torch.sin(u - 1),
    "exponential": lambda u: torch.exp(u - 1) - 1,
}
"""Functions with f(1) = 0 and f'(1) = 1."""


def divergence(p, q, r, f):
    """The note's H_{r,f}(p‖q), section 2.2.2."""
    return f((p**r * q ** (1 - r)).sum(-1)) / (r - 1)


def kullback_leibler(p, q):
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("f", SHAPES)
@pytest.mark.parametrize("r", [0.5, 0.999, 1.001, 2, 3])
@given(classes, seeds)
@settings(max_examples=10)
def test_every_divergence_of_the_family_has_the_fisher_metric_for_its_hessian(r, f, c, seed):
    """Eq. 2: r/2 times the squared length, whatever f; here the Hessian, in the coordinates of eq. 3, is r times g."""
    p = simplex(c, seed, batch=1, spread=1.0)[0]
    second = hessian(lambda q: divergence(p, free_coordinates(q), r, SHAPES[f]))(p[:-1])
    torch.testing.assert_close(second, r * geometry.fisher_metric(p), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("f", SHAPES)
@pytest.mark.parametrize("r", [0.5, 0.9, 1.1, 2, 3])
@given(st.integers(3, 8), seeds)
@settings(max_examples=10)
def test_the_expansions_error_is_of_third_order(r, f, c, seed):
    """Eq. 2: half the step, an eighth of the error. The largest of 200 directions, as in some the cubic term is 0."""
    generator = torch.Generator().manual_seed(seed)
    p = simplex(c, seed, batch=1, spread=0.5)
    step = torch.randn(200, c, generator=generator, dtype=torch.float64)
    step = step - step.mean(-1, keepdim=True)
    step = step / step.abs().amax() * p.min()

    def error(scale):
        change = scale * step
        return (divergence(p, p + change, r, SHAPES[f]) - r / 2 * (change.square() / p).sum(-1)).abs().max()

    ratio = error(2e-3) / error(1e-3)
    assert 7.5 < ratio < 8.5


@given(classes, seeds)
def test_the_renyi_divergence_tends_to_the_relative_entropy(c, seed):
    """As r → 1, by first order in r - 1."""
    p, q = simplex(c, seed, spread=1.0), simplex(c, seed + 1, spread=1.0)
    far, near = ((divergence(p, q, 1 + h, torch.log) - kullback_leibler(p, q)).abs() for h in (1e-4, 5e-5))
    assert (far <= 1e-2).all()
    torch.testing.assert_close(far, 2 * near, rtol=1e-2, atol=1e-9)


@given(classes, seeds, st.integers(2, 4))
@settings(max_examples=50)
def test_the_metric_does_not_change_when_outcomes_are_split_at_random(c, seed, parts):
    """Chentsov: a congruent embedding, each outcome split by fixed conditional probabilities, keeps all lengths."""
    p = simplex(c, seed, batch=1)[0]
    conditional = simplex(parts, seed + 1, batch=c, spread=1.0)

    def split(q):
        return (free_coordinates(q)[:, None] * conditional).flatten()

    jacobian = jacrev(split)(p[:-1])[:-1]
    pulled_back = jacobian.T @ geometry.fisher_metric(split(p[:-1])) @ jacobian
    torch.testing.assert_close(pulled_back, geometry.fisher_metric(p), rtol=1e-8, atol=1e-8)


@given(st.integers(3, 8), seeds, st.integers(2, 8))
@settings(max_examples=50)
def test_the_metric_shrinks_under_any_other_map_of_outcomes(c, seed, outcomes):
    """Chentsov's other half: what a noisy observation of the outcome keeps is less, in every direction."""
    p = simplex(c, seed, batch=1)[0]
    channel = simplex(outcomes, seed + 1, batch=c, spread=1.0)

    def observed(q):
        return free_coordinates(q) @ channel

    jacobian = jacrev(observed)(p[:-1])[:-1]
    pulled_back = jacobian.T @ geometry.fisher_metric(observed(p[:-1])) @ jacobian
    lost = torch.linalg.eigvalsh(geometry.fisher_metric(p) - pulled_back)
    assert (lost >= -1e-8 * geometry.fisher_metric(p).abs().max()).all()


@given(classes, seeds)
@settings(max_examples=30)
def test_the_pulled_back_metric_is_the_same_in_three_charts(c, seed):
    """Eqs. 3, 4, 5 and 13: by the probabilities, by m coordinates of the sphere, and by the stereographic chart."""
    model, x = network(c, seed), random_inputs(seed, 1)[0]

    def theta(x):
        return model(x).softmax(-1)

    p = theta(x).detach()
    by_probabilities = jacrev(lambda x: theta(x)[:-1])(x)
    first = by_probabilities.T @ geometry.fisher_metric(p) @ by_probabilities
    mu = geometry.sphere_embedding(p)
    on_the_sphere = jacrev(lambda x: geometry.sphere_embedding(theta(x))[:-1])(x)
    metric = torch.eye(c - 1, dtype=torch.float64) + torch.outer(mu[:-1], mu[:-1]) / mu[-1] ** 2
    second = on_the_sphere.T @ metric @ on_the_sphere
    by_chart = jacrev(lambda x: geometry.stereographic(theta(x)))(x)
    third = geometry.conformal_factor(p) ** 2 * by_chart.T @ by_chart
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(first, third, rtol=1e-8, atol=1e-11)


@given(classes, seeds, st.floats(0.2, 5))
@settings(max_examples=50)
def test_the_condition_is_the_same_as_a_metric_a_matrix_and_a_norm(c, seed, factor):
    """Eqs. 10, 11, 12, 13 and 14, at a radius that is ``factor`` times the largest for which they hold."""
    assume(abs(factor - 1) > 1e-6)
    model, x = network(c, seed), random_inputs(seed, 1)
    p = model(x).softmax(-1)[0].detach()
    delta, rho = geometry.distance_to_center(p), geometry.conformal_factor(p)
    jacobian = jacrev(lambda x: model(x).softmax(-1)[:-1])(x[0]).detach()
    pulled_back = jacobian.T @ geometry.fisher_metric(p) @ jacobian
    eps = float(factor * delta / torch.linalg.eigvalsh(pulled_back)[-1].sqrt())

    directions = torch.cat([random_inputs(seed + 1, 500), torch.linalg.eigh(pulled_back).eigenvectors.T])
    lengths = torch.einsum("ki,ij,kj->k", directions, pulled_back, directions)
    by_metric = bool((lengths <= (delta / eps) ** 2 * directions.square().sum(-1)).all())
    smallest = torch.linalg.eigvalsh((delta / eps) ** 2 * torch.eye(6, dtype=torch.float64) - pulled_back)[0]
    chart = jacrev(lambda x: geometry.stereographic(model(x).softmax(-1)))(x[0])
    by_norm = bool(torch.linalg.matrix_norm(chart, 2) <= delta / (rho * eps))
    inputs = x.clone().requires_grad_()
    logits = model(inputs)
    by_code = bool(satisfies_condition(spectral_norm(logits, inputs), logits, bound="center", eps=eps))
    assert by_metric == bool(smallest >= 0) == by_norm == by_code == (factor < 1)


@given(seeds, st.integers(1, 6), st.integers(0, 5), st.floats(0.1, 3), st.floats(0.1, 3))
def test_equations_9_and_10_say_the_same(seed, n, null, delta, eps):
    """Simplification 3 is none: where 10 fails, a shorter multiple of the same direction breaks 9.

    Both sides of 10 are homogeneous of degree 2, so that it holds for all X if it does for those of one length. For
    δ > 0; at the center of the simplex the ball of 9 is empty.
    """
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(max(1, n - null), n, generator=generator, dtype=torch.float64)
    metric = root.T @ root  # degenerate, like a pull-back to more dimensions than classes
    eigenvalues, eigenvectors = torch.linalg.eigh(metric)
    assume(abs(float(eigenvalues[-1]) * (eps / delta) ** 2 - 1) > 1e-9)
    if eigenvalues[-1] <= (delta / eps) ** 2:
        inside = torch.randn(300, n, generator=generator, dtype=torch.float64)
        inside = eps * inside / inside.norm(dim=-1, keepdim=True) * torch.rand(300, 1, generator=generator)
        assert (torch.einsum("ki,ij,kj->k", inside, metric, inside) < delta**2).all()
    else:
        escaping = eigenvectors[:, -1] * delta / eigenvalues[-1].sqrt()
        assert escaping.norm() < eps
        assert escaping @ metric @ escaping == pytest.approx(delta**2)


@given(classes, seeds)
def test_a_change_of_the_class_takes_at_least_the_distance_to_the_boundary(c, seed):
    """Why a fall inside a ball that the first order keeps within d_B is the curvature's."""
    p, q = simplex(c, seed, batch=1), simplex(c, seed + 1, batch=300)
    moved = geometry.fisher_rao_distance(p, q)[q.argmax(-1) != p.argmax(-1)]
    assert (moved >= geometry.distance_to_boundary(p) - 1e-12).all()


@given(st.integers(2, 1000), st.data())
def test_delta_of_a_tie(c, data):
    """Eq. 6 where it is an angle known by heart: between a tie of k of C classes and the center, 2 arccos √(k/C)."""
    k = data.draw(st.integers(1, c))
    tie = torch.zeros(c, dtype=torch.float64)
    tie[:k] = 1 / k
    assert geometry.distance_to_center(tie).item() == pytest.approx(2 * math.acos(min(1, (k / c) ** 0.5)), abs=1e-7)


@given(st.floats(2, 12), st.floats(0.5, 2))
def test_zero_curvature_is_not_enough_for_equation_9(slope, place):
    """Simplification 2 needs a metric that is constant over the ball; on a line every metric has zero curvature.

    A logistic regression of one input: eq. 14 holds, even with d_B, at a radius three times the distance to its
    boundary, and the model errs inside it.
    """
    model = torch.nn.Linear(1, 2, bias=False).double()
    model.weight.data = torch.tensor([[slope], [-slope]], dtype=torch.float64)
    x = torch.tensor([[place]], dtype=torch.float64, requires_grad=True)
    logits = model(x)
    norm = spectral_norm(logits, x)
    closed_form = 2 * slope * logits.softmax(-1).prod(-1).sqrt()
    torch.testing.assert_close(norm, closed_form)
    assume(float(slope * place) > 3)
    eps = 3 * place
    assert satisfies_condition(norm, logits, bound="boundary", eps=eps).all()
    assert model(x - 0.9 * eps).argmax() != logits.argmax()

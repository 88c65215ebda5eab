"""The pulled-back metric against other formulas of it, and its geodesics against great circles and a closed form."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import jacrev, vmap

from jacobian_robust import geometry
from jacobian_robust.geometry import pullback
from jacobian_robust.jacobian import jacobian_norms

seeds = st.integers(0, 2**20)


def smooth(seed: int, *, inputs: int = 2, classes: int = 3, scale: float = 1.0) -> torch.nn.Module:
    """A random smooth network in float64."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(inputs, 8), torch.nn.Tanh(), torch.nn.Linear(8, classes)).double()
    for parameter in layers.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layers.requires_grad_(False)


def linear(seed: int, *, inputs: int = 2, classes: int = 3) -> torch.nn.Module:
    """Random linear logits in float64: with as many inputs as classes less one, nowhere degenerate."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(inputs, classes).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer.requires_grad_(False)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def circle(rays: int) -> torch.Tensor:
    angles = torch.arange(rays, dtype=torch.float64) * (2 * math.pi / rays)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@settings(max_examples=30)
@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_the_metric_is_the_fisher_metric_in_the_notes_coordinates_pulled_back(seed, n, classes):
    model, points = smooth(seed, inputs=n, classes=classes), draw(seed, 3, n)
    jacobian = vmap(jacrev(lambda x: model(x).softmax(-1)[:-1]))(points)
    expected = jacobian.mT @ geometry.fisher_metric(model(points).softmax(-1)) @ jacobian
    torch.testing.assert_close(pullback.pullback_metric(model, points), expected, rtol=1e-7, atol=1e-10)


@given(seeds)
def test_its_trace_and_largest_eigenvalue_are_the_jacobians_norms(seed):
    model, points = smooth(seed), draw(seed, 4, 2).requires_grad_()
    frobenius, spectral = jacobian_norms(model(points), points)
    metric = pullback.pullback_metric(model, points.detach())
    torch.testing.assert_close(metric.diagonal(dim1=1, dim2=2).sum(-1).sqrt(), frobenius, rtol=1e-9, atol=1e-9)
    lengths, axes = pullback.semi_axes(metric, torch.full((4,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(lengths[:, 0], 0.7 / spectral, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(axes.mT @ axes, torch.eye(2, dtype=torch.float64).expand(4, 2, 2))


@given(seeds, st.floats(0.1, 3.0))
def test_the_border_of_an_information_ball_has_its_radius(seed, radius):
    metric = pullback.pullback_metric(linear(seed), draw(seed + 1, 1, 2))[0]
    border = pullback.information_ball(metric, radius, circle(12))
    lengths = torch.einsum("ri,ij,rj->r", border, metric, border).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, radius), rtol=1e-7, atol=0)
    shortest, longest = pullback.semi_axes(metric, torch.tensor(radius, dtype=torch.float64))[0]
    assert (border.norm(dim=1) >= shortest * (1 - 1e-9)).all()
    assert (border.norm(dim=1) <= longest * (1 + 1e-9)).all()


@given(seeds, st.integers(1, 3))
def test_the_acceleration_is_that_of_the_christoffel_symbols(seed, n):
    """Γ^k_ij = ½ g^kl (∂_i g_jl + ∂_j g_il - ∂_l g_ij), from derivatives of the metric."""
    model, points, velocities = linear(seed, inputs=n, classes=n + 1), 0.5 * draw(seed + 1, 3, n), draw(seed + 2, 3, n)

    def metric_at(x):
        jacobian = jacrev(lambda x: model(x).softmax(-1)[:-1])(x)
        return jacobian.T @ geometry.fisher_metric(model(x).softmax(-1)) @ jacobian

    metric, derivative = vmap(metric_at)(points), vmap(jacrev(metric_at))(points)  # [i, j, l] = ∂_l g_ij
    lowered = (derivative.permute(0, 3, 1, 2) + derivative.permute(0, 1, 3, 2) - derivative) / 2  # [i, j, l]
    bent = torch.einsum("bijl,bi,bj->bl", lowered, velocities, velocities)
    acceleration = pullback.geodesic_acceleration(model, points, velocities)
    torch.testing.assert_close((metric @ acceleration[..., None])[..., 0], -bent, rtol=1e-8, atol=1e-10)


@settings(max_examples=1)  # four rays, of another network in each run
@given(seeds, st.floats(0.1, 0.8))
def test_in_the_plane_geodesics_go_to_great_circles_and_balls_to_balls(seed, radius):
    """For n = m the map to the sphere is a local isometry (eq. 4, 5)."""
    model, point = smooth(seed), 0.3 * draw(seed + 1, 2)
    jacobian, start = (f(model, point[None])[0] for f in (pullback.sphere_jacobian, pullback.sphere_point))
    singular = torch.linalg.svdvals(jacobian)
    assume(singular[1] > 1e-2 * singular[0])
    directions = circle(4)
    rays = pullback.geodesics(model, point, radius, directions, low=-4.0, high=4.0)
    velocities = pullback.information_ball(jacobian.T @ jacobian, 1.0, directions) @ jacobian.T
    prediction = model(point).softmax(-1)
    for ray in range(4):
        known = rays.lengths[ray].isfinite()
        assert known[0]
        x, t = torch.cat([rays.positions[ray, known], rays.ends[[ray]]]), rays.lengths[ray, known]
        t = torch.cat([t, rays.radius[[ray]]])
        expected = pullback.great_circle(start, velocities[ray], t)
        # Digits go where a ray runs up to a fold, at which the equation is singular.
        torch.testing.assert_close(pullback.sphere_point(model, x), expected, rtol=0, atol=1e-5)
        distance = geometry.fisher_rao_distance(model(x).softmax(-1), prediction)
        torch.testing.assert_close(distance, t, rtol=0, atol=1e-5)
        assert (t.diff() >= 0).all()
    at_the_border = torch.tensor([kind == "radius" for kind in rays.why])
    torch.testing.assert_close(rays.radius[at_the_border], torch.full((int(at_the_border.sum()),), radius).double())
    assert (rays.radius[~at_the_border] < radius).all()


@settings(max_examples=4)
@given(seeds, st.floats(0.05, 0.6))
def test_with_one_input_and_two_classes_the_exponential_map_has_a_closed_form(seed, radius):
    """θ_1 = sin²(φ) with φ = φ_0 ± t/2: arc length on a circle of radius 2; the logit is log tan²(φ)."""
    slope = 0.5 + torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def logits(x):
        return torch.cat([slope * x, torch.zeros_like(x)], dim=1)

    point = 0.5 * draw(seed, 1)
    both = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    rays = pullback.geodesics(logits, point, radius, both, low=-30.0, high=30.0)
    angle = (slope * point).sigmoid().sqrt().asin() + both[:, 0] * radius / 2
    torch.testing.assert_close(rays.ends[:, 0], 2 * angle.tan().log() / slope, rtol=1e-6, atol=1e-7)
    assert rays.why == ("radius", "radius")


def test_a_geodesic_ball_up_to_the_boundary_has_one_class_and_touches_the_boundary():
    """d_B is the distance on the sphere, which no path in the plane can undercut (eq. 7)."""
    model, point = linear(3), 0.2 * draw(4, 2)
    prediction = model(point).softmax(-1)
    radius = geometry.distance_to_boundary(prediction).item()
    rays = pullback.geodesics(model, point, radius, circle(12), low=-9.0, high=9.0, samples=21)
    top = model(rays.ends).softmax(-1).topk(2, dim=-1).values
    lead = top[:, 0] - top[:, 1]
    assert lead.min() < 1e-2  # some ray comes close to the foot
    assert lead.max() > 0.1
    known = rays.lengths < radius * (1 - 1e-9)
    assert (model(rays.positions[known]).argmax(-1) == prediction.argmax()).all()
    straight = rays.positions[:, 0] + pullback.information_ball(
        pullback.pullback_metric(model, point[None])[0], radius, circle(12)
    )
    assert (model(straight).argmax(-1) != prediction.argmax()).any()  # the flat ball does cross it here


def test_rays_end_at_the_window_and_at_a_fold_and_the_others_go_on():
    def folded(x):  # x_0 and -x_0 are the same to it
        return torch.stack([x[:, 0] ** 2, x[:, 1], torch.zeros_like(x[:, 0])], dim=1)

    point = torch.tensor([0.6, 0.0], dtype=torch.float64)
    rays = pullback.geodesics(folded, point, 0.4, circle(6), low=-0.8, high=0.8)
    assert set(rays.why) == {"radius", "window", "fold"}
    for end, kind, radius in zip(rays.ends, rays.why, rays.radius, strict=True):
        assert (kind == "radius") == (abs(radius - 0.4) < 1e-9)
        assert (kind == "window") == (abs(end.abs().max() - 0.8) < 1e-6)
        assert (kind == "fold") == (abs(end[0]) < 1e-6)
    with pytest.raises(ValueError, match="no geodesic can start"):
        pullback.geodesics(folded, torch.zeros(2, dtype=torch.float64), 1.0, circle(4), low=-1.0, high=1.0)
    with pytest.raises(ValueError, match="no geodesic can start"):
        pullback.geodesics(folded, point, 1.0, circle(4), low=-0.5, high=0.5)
    with pytest.raises(ValueError, match="not one class more"):
        pullback.geodesics(linear(0, classes=4), point, 1.0, circle(4), low=-1.0, high=1.0)

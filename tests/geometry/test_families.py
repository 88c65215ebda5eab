"""Each family against independent formulas: autograd's Hessian, geodesics found numerically, sampled boundaries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacobian_robust.geometry.families import (
    BernoulliProduct,
    Categorical,
    Gaussian,
    GaussianMeanScale,
    PixelCategorical,
    Poisson,
    flat,
)

FAMILIES = {
    "categorical": (Categorical(), (4,)),
    "labels on a grid": (BernoulliProduct(), (2, 2)),
    "pixels": (PixelCategorical(), (3, 2, 1)),
    "a share of the pixels": (PixelCategorical(share=0.6), (3, 2, 2)),
    "a number": (Gaussian(sigma=0.7, tolerance=0.4), ()),
    "numbers and scales": (GaussianMeanScale(tolerance=0.6), (4,)),
    "counts": (Poisson(tolerance=0.8), (2,)),
}
each_family = pytest.mark.parametrize(("family", "shape"), FAMILIES.values(), ids=FAMILIES)


def random_outputs(shape, seed, batch=3, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def random_targets(family, outputs, seed=0):
    """Return targets drawn from the distributions of the outputs."""
    torch.manual_seed(seed)
    match family:
        case Categorical() | PixelCategorical():
            return torch.distributions.Categorical(logits=outputs.movedim(1, -1)).sample()
        case BernoulliProduct():
            return torch.distributions.Bernoulli(logits=outputs).sample()
        case Gaussian():
            return outputs + family.sigma * torch.randn_like(outputs)
        case GaussianMeanScale():
            mean, log_sigma = outputs.chunk(2, dim=1)
            return mean + log_sigma.exp() * torch.randn_like(mean)
        case Poisson():
            return torch.poisson(outputs.exp())


def dense_metric(family, outputs):
    """Return ``L Lᵀ`` of each sample from a basis of directions."""
    factor = family.factor(outputs)
    columns = torch.stack([factor @ w for w in family.directions(outputs, family.rank(outputs))], dim=-1)
    return columns @ columns.mT


@each_family
@given(seed=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_the_factor_is_one_of_the_expected_hessian_of_the_loss(family, shape, seed):
    """I(s) = E_y[∇² -log p(y)]: exact for these families, whose Hessian is linear in the sufficient statistics."""
    outputs = random_outputs(shape, seed, batch=1)
    metric = dense_metric(family, outputs)[0]
    expected = torch.zeros_like(metric)
    for target, probability in expected_targets(family, outputs):

        def loss(s, target=target):
            return family.negative_log_likelihood(s.view_as(outputs), target).sum()

        expected += probability * torch.autograd.functional.hessian(loss, outputs.flatten())
    torch.testing.assert_close(metric, expected, rtol=1e-9, atol=1e-11)


def expected_targets(family, outputs):
    """Yield targets and weights with which a mean of Hessians is the expected one."""
    if isinstance(family, GaussianMeanScale):  # the Hessian is quadratic in y: two points of the right variance
        mean, log_sigma = outputs.chunk(2, dim=1)
        return [(mean + sign * log_sigma.exp(), 0.5) for sign in (-1, 1)]
    if isinstance(family, PixelCategorical):
        return [(torch.zeros_like(outputs[:, 0], dtype=torch.long), 1.0)]
    if isinstance(family, Categorical):
        return [(torch.zeros(1, dtype=torch.long), 1.0)]
    return [(torch.zeros_like(outputs), 1.0)]  # the Hessian does not depend on y


@each_family
@given(seed=st.integers(0, 2**20), number=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_probes_are_unbiased_over_all_signs(family, shape, seed, number):
    """The mean of Σ v vᵀ over all signs is exactly L Lᵀ, whatever the number of probes."""
    outputs = random_outputs(shape, seed, batch=1)
    size = flat(outputs).shape[1]
    metric = dense_metric(family, outputs)[0]
    if size > 12:  # too many: pairwise independent signs have the same second moments (rows of a Hadamard matrix)
        hadamard = torch.tensor([[1.0]])
        while len(hadamard) < size:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
        signs = hadamard[:, :size]
    else:
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * size).view(-1, size)
    repeated = outputs.expand(len(signs), *shape)
    factor = family.factor(repeated)
    number = min(number, family.rank(outputs))
    vectors = [factor @ w for w in family.probes(repeated, number, signs.double())]
    assert len(vectors) == number
    mean = sum((v[:, :, None] * v[:, None, :]).mean(0) for v in vectors)
    torch.testing.assert_close(mean, metric, rtol=1e-9, atol=1e-12)


@each_family
def test_directions_are_orthonormal_and_the_transpose_is_the_transpose(family, shape):
    outputs = random_outputs(shape, 0)
    basis = torch.stack(list(family.directions(outputs, family.rank(outputs))), dim=1)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(basis.shape[1]).double().expand(3, -1, -1))
    factor, size = family.factor(outputs), flat(outputs).shape[1]
    dense = torch.stack([factor @ e.expand(3, -1) for e in torch.eye(size).double()], dim=-1)
    v = random_outputs((size,), 1)
    torch.testing.assert_close(factor.transposed(v), (dense.mT @ v[:, :, None])[:, :, 0])


def shortest_length(family, first, second, points=33, steps=400):
    """Return the length of the shortest path between two outputs: straight pieces, measured at their middles."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)[1:-1].view(-1, *[1] * first.ndim)
    inner = (first + t * (second - first)).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([inner], max_iter=steps, tolerance_grad=1e-13, tolerance_change=1e-16)

    def pieces():
        path = torch.cat([first[None], inner, second[None]])
        middle, step = (path[1:] + path[:-1]) / 2, flat(path[1:] - path[:-1])
        return torch.linalg.vector_norm(family.factor(middle).transposed(step), dim=-1)

    def closure():
        optimizer.zero_grad()
        energy = pieces().square().sum()
        energy.backward()
        return energy

    optimizer.step(closure)
    return pieces().sum().item()


@each_family
def test_the_distance_is_the_length_of_a_numerical_geodesic(family, shape):
    first, second = random_outputs(shape, 0, batch=2, spread=0.8)
    distance = family.distance(first[None], second[None]).item()
    coarse, fine = (shortest_length(family, first, second, points) for points in (17, 33))
    assert abs(fine + (fine - coarse) / 3 - distance) < 2e-4 * distance  # Richardson: pieces of half the length
    assert family.distance(first[None], first[None]).item() == 0


@each_family
@given(seed=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_nearby_distances_are_those_of_the_metric(family, shape, seed):
    outputs, step = random_outputs(shape, seed), 1e-6 * random_outputs(shape, seed + 1)
    expected = torch.linalg.vector_norm(family.factor(outputs).transposed(flat(step)), dim=-1)
    torch.testing.assert_close(family.distance(outputs, outputs + step), expected, rtol=1e-4, atol=1e-12)


@each_family
@given(seed=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_the_signed_distance_is_positive_where_the_prediction_is_right(family, shape, seed):
    outputs = random_outputs(shape, seed, batch=20)
    targets = random_targets(family, random_outputs(shape, seed, batch=20), seed)
    signed = family.signed_distance_to_boundary(outputs, targets)
    assert torch.equal(signed > 0, family.right(outputs, targets))


@each_family
@given(seed=st.integers(0, 2**20))
@settings(max_examples=10, deadline=None)
def test_no_output_nearer_than_the_boundary_is_wrong_and_one_at_the_boundary_is(family, shape, seed):
    """Where the prediction is right, the distance is attained (by descending along its gradient) and never undercut."""
    outputs = random_outputs(shape, seed, batch=1)
    targets = family.predict(outputs)
    boundary = family.distance_to_boundary(outputs).item()
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.linspace(-2, 1, 400, dtype=torch.float64).view(-1, *[1] * len(shape))
    others = outputs + scale * torch.randn(400, *shape, generator=generator, dtype=torch.float64)
    distances = family.distance(outputs.expand_as(others), others)
    wrong = ~family.right(others, targets.expand(400, *targets.shape[1:]))
    assert (distances[wrong] >= boundary - 1e-9).all()


@each_family
def test_the_distance_to_the_boundary_falls_with_slope_one(family, shape):
    """|∇d| in the dual metric is 1, as of any distance to a set: with the bound above, it is attained."""
    outputs = random_outputs(shape, 3, batch=6, spread=0.7).requires_grad_()
    targets = family.predict(outputs.detach())
    for distance, slope in family.nearest_boundaries(outputs, targets, 1):
        metric = dense_metric(family, outputs)
        dual = torch.linalg.lstsq(metric, flat(slope)[..., None], driver="gelsd").solution[..., 0]
        length = (dual * flat(slope)).sum(-1).sqrt()
        # A tie of several boundaries, as at μ = y exactly, has any subgradient: only families of numbers start there.
        ties = isinstance(family, Gaussian | GaussianMeanScale)
        assert ties or torch.allclose(length, torch.ones_like(length), atol=1e-6)
        torch.testing.assert_close(distance, family.distance_to_boundary(outputs))
    off = targets + 0.1 if targets.is_floating_point() else targets
    for _, slope in family.nearest_boundaries(outputs, off, 1):
        dual = torch.linalg.lstsq(dense_metric(family, outputs), flat(slope)[..., None], driver="gelsd").solution
        assert torch.allclose((dual[..., 0] * flat(slope)).sum(-1), torch.ones(6).double(), atol=1e-6)


def test_the_distances_are_the_closed_forms():
    """The table of the families' formulas, in their textbook form."""
    p, q = torch.tensor([[[0.2, 0.9]], [[0.5, 0.4]]], dtype=torch.float64)
    expected = (2 * p.sqrt().asin() - 2 * q.sqrt().asin()).square().sum().sqrt()
    torch.testing.assert_close(BernoulliProduct().distance(p.logit(), q.logit())[0], expected)
    first, second = torch.tensor([[[0.3, math.log(0.5)]], [[1.7, math.log(2.0)]]], dtype=torch.float64)
    a, b = (math.sqrt(1.4**2 + 2 * (0.5 + sign * 2.0) ** 2) for sign in (-1, 1))
    expected = math.sqrt(2) * math.log((b + a) / (b - a))
    assert GaussianMeanScale(tolerance=1).distance(first, second).item() == pytest.approx(expected, rel=1e-12)
    counts = Poisson().distance(torch.tensor([[4.0]]).log(), torch.tensor([[9.0]]).log())
    assert counts.item() == pytest.approx(2)


def test_losses_are_those_of_torch():
    outputs = random_outputs((4,), 0)
    labels, yes = torch.tensor([0, 3, 1]), (random_outputs((4,), 1) > 0).double()
    torch_losses = torch.nn.functional
    pairs = [
        (Categorical().loss(outputs, labels), torch_losses.cross_entropy(outputs, labels)),
        (BernoulliProduct().loss(outputs, yes), torch_losses.binary_cross_entropy_with_logits(outputs, yes)),
        (
            GaussianMeanScale(tolerance=1).loss(outputs, yes[:, :2]),
            torch_losses.gaussian_nll_loss(outputs[:, :2], yes[:, :2], (2 * outputs[:, 2:]).exp(), full=True),
        ),
        (
            Poisson().loss(outputs, yes),
            -torch.distributions.Poisson(outputs.exp()).log_prob(yes).mean(),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_nan_is_right_nowhere():
    for family, shape in FAMILIES.values():
        outputs = random_outputs(shape, 0)
        targets = family.predict(outputs)
        assert family.right(outputs, targets).all()
        assert not family.right(torch.full_like(outputs, math.nan), targets).any()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_confident_outputs_have_finite_factors_and_distances_in_float32(scale):
    for family, shape in FAMILIES.values():
        if isinstance(family, GaussianMeanScale | Poisson) and scale > 1:
            continue  # e^s itself overflows
        outputs = (scale * random_outputs(shape, 0)).float().requires_grad_()
        signs = torch.ones_like(flat(outputs)).detach()
        vectors = [family.factor(outputs) @ w for w in family.probes(outputs, 1, signs)]
        values = [*vectors, family.distance_to_boundary(outputs)]
        gradients = torch.autograd.grad(sum(v.sum() for v in values), outputs, allow_unused=True)
        assert all(tensor is None or tensor.isfinite().all() for tensor in [*values, *gradients])


def test_a_share_of_the_pixels_is_changed_at_the_least_price():
    """Against every choice of pixels to change, by the distances of each."""
    family, outputs = PixelCategorical(share=0.5), random_outputs((3, 2, 2), 4, batch=5)
    targets = random_targets(family, outputs, 1)
    one = PixelCategorical()
    by_pixel = one.signed_distances(outputs, targets)
    for signed, image in zip(family.signed_distance_to_boundary(outputs, targets).tolist(), by_pixel, strict=True):
        right = [d for d in sorted(image.tolist()) if d > 0]
        wrong = sorted(-d for d in image.tolist() if d <= 0)
        change, repair = right[: len(right) - 1], wrong[: 2 - len(right)]  # fewer than 2 of 4 are right then
        expected = math.hypot(*change) if len(right) >= 2 else -math.hypot(*repair)
        assert signed == pytest.approx(expected, rel=1e-9)


def test_targets_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected targets \(3, 2\), got \(3,\)"):
        Gaussian(tolerance=1.0).loss(torch.zeros(3, 2), torch.zeros(3))

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacobian_robust.jacobian import FisherFactor, random_signs, tangent_directions


def random_logits(classes, seed, spread=3.0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, classes, generator=generator, dtype=torch.float64)


def covariance(logits):
    theta = logits.softmax(-1)
    return torch.diag_embed(theta) - theta[:, :, None] * theta[:, None, :]


@given(classes=st.integers(2, 40), seed=st.integers(0, 2**20), spread=st.floats(0.1, 8))
@settings(max_examples=50)
def test_a_tangent_basis_through_the_factor_gives_the_covariance(classes, seed, spread):
    logits = random_logits(classes, seed, spread)
    factor, basis = FisherFactor(logits), torch.stack(tangent_directions(logits, classes - 1), dim=-1)
    eye = torch.eye(classes - 1, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=1e-10, atol=1e-10)
    normal = (basis.mT @ factor.root[:, :, None])[:, :, 0]
    torch.testing.assert_close(normal, torch.zeros_like(normal), rtol=0, atol=1e-12)
    columns = (factor @ basis.movedim(-1, 0)).movedim(0, -1)
    torch.testing.assert_close(columns @ columns.mT, covariance(logits), rtol=1e-10, atol=1e-13)


def test_the_columns_are_those_of_the_closed_form_cholesky_factor():
    """Of the sorted covariance (Tanabe & Sagae, 1992)."""
    logits = random_logits(6, 0).sort(dim=-1, descending=True).values
    columns = torch.stack([FisherFactor(logits) @ w for w in tangent_directions(logits, 5)], dim=-1)
    expected = torch.linalg.cholesky(covariance(logits)[:, :5, :5])
    torch.testing.assert_close(columns[:, :5], expected)


@given(classes=st.integers(2, 9), seed=st.integers(0, 2**20), size=st.integers(0, 3))
@settings(max_examples=30)
def test_random_directions_are_unbiased_over_all_signs(classes, seed, size):
    """The mean of v vᵀ over all 2^C signs is exactly Σ."""
    size = min(size, classes - 1)
    logits = random_logits(classes, seed, batch=1)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * classes)
    repeated = logits.expand(len(signs), -1)
    factor = FisherFactor(repeated)
    vectors = [factor @ w for w in tangent_directions(repeated, size, signs)]
    assert len(vectors) == size + 1
    mean = sum((v[:, :, None] * v[:, None, :]).mean(0) for v in vectors)
    torch.testing.assert_close(mean, covariance(logits)[0], rtol=1e-10, atol=1e-13)


def test_the_transpose_is_the_transpose():
    factor = FisherFactor(random_logits(7, 0, batch=4))
    dense = torch.stack([factor @ e.expand(4, -1) for e in torch.eye(7, dtype=torch.float64)], dim=-1)
    v = random_logits(7, 1, batch=4)
    torch.testing.assert_close(factor.transposed(v), (dense.mT @ v[:, :, None])[:, :, 0])


def test_a_thousand_classes_take_memory_in_proportion():
    """Nothing of the size of a C×C matrix is kept for the backward pass of a probe."""
    classes, batch, kept = 1000, 3, []
    logits = random_logits(classes, 0, 4.0).requires_grad_()
    signs = random_signs(batch, classes, torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        (direction,) = tangent_directions(logits, 0, signs)
        FisherFactor(logits) @ direction
    assert max(kept) <= batch * classes
    assert sum(kept) <= 12 * batch * classes


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_confident_predictions_have_finite_directions_in_float32(scale):
    logits = scale * torch.tensor([[1.0, 0.5, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, -torch.inf, 0.0, -torch.inf]])
    for signs in (None, torch.ones(3, 4)):
        for direction in tangent_directions(logits, 3, signs):
            assert direction.isfinite().all()


def test_random_signs_are_signs():
    signs = random_signs(1000, 9, torch.Generator().manual_seed(0))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 0.05

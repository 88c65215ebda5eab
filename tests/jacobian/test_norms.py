import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, vmap

from jacobian_robust import geometry
from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.jacobian import FisherFactor, frobenius_norm, jacobian_norms, spectral_norm, tangent_directions
from jacobian_robust.models import LeNet

from .cases import NORMS, ORDER, SPECTRAL, measure, network, random_inputs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NORMS)
@given(classes=st.integers(2, 12), seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_norms_are_those_of_the_note_in_stereographic_coordinates(name, classes, seed):
    """The chain of eqs. 3-14: ρ times the norm of the Jacobian of the chart's coordinates, by autograd alone."""
    model, inputs = network(classes, seed), random_inputs(seed)
    chart = vmap(jacrev(lambda x: geometry.stereographic(model(x).softmax(-1))))(inputs)
    rho = geometry.conformal_factor(model(inputs).softmax(-1))
    expected = rho * torch.linalg.matrix_norm(chart, ORDER[name])
    torch.testing.assert_close(measure(NORMS[name], model, inputs), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_a_linear_model_have_a_closed_form(name):
    model = nn.Linear(6, 4).double()
    inputs = random_inputs(0)
    theta = model(inputs).softmax(-1)
    sigma = torch.diag_embed(theta) - theta[:, :, None] * theta[:, None, :]
    pulled_back = model.weight.T @ sigma @ model.weight
    eigenvalues = torch.linalg.eigvalsh(pulled_back)
    expected = (eigenvalues.sum(-1) if ORDER[name] == "fro" else eigenvalues[:, -1]).sqrt()
    torch.testing.assert_close(measure(NORMS[name], model, inputs), expected)


def test_squared_frobenius_norm_is_the_expected_squared_score():
    """‖J_μ‖_F² = E_{y~θ} ‖∇_x log θ_y‖²."""
    model, inputs = network(5), random_inputs(1)
    score = vmap(jacrev(lambda x: model(x).log_softmax(-1)))(inputs)
    theta = model(inputs).softmax(-1)
    expected = (theta * score.square().sum(-1)).sum(-1)
    torch.testing.assert_close(measure(frobenius_norm, model, inputs).square(), expected)


@pytest.mark.parametrize("norm", [frobenius_norm, *SPECTRAL])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_gradients_flow_through_the_jacobian_to_the_parameters(norm, classes):
    model, inputs = network(classes), random_inputs(2)
    names = [name for name, _ in model.named_parameters()]

    def norm_of(*parameters):
        x = inputs.clone().requires_grad_()
        return norm(functional_call(model, dict(zip(names, parameters, strict=True)), x), x, create_graph=True)

    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    # All of the Jacobian in one case of each norm, which takes seconds; a random projection of it in the others.
    whole = classes == 3 and norm in (frobenius_norm, spectral_norm)
    assert torch.autograd.gradcheck(norm_of, parameters, fast_mode=not whole)
    gradients = torch.autograd.grad(norm_of(*parameters).sum(), parameters)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[:1])


@pytest.mark.parametrize("norm", [frobenius_norm, spectral_norm, functools.partial(spectral_norm, columns=3)])
def test_under_autocast_the_norm_is_float32_and_near(norm):
    model, inputs = network(6).float(), random_inputs(0).float()
    exact = measure(norm, model, inputs, create_graph=True)
    (gradient,) = torch.autograd.grad(exact.sum(), model[0].weight)
    with torch.autocast("cpu", torch.bfloat16):
        x = inputs.clone().requires_grad_()
        logits = model(x)
        assert logits.dtype == torch.bfloat16
        value = norm(logits, x, create_graph=True)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.03, atol=0)
    (near,) = torch.autograd.grad(value.sum(), model[0].weight)
    # Eight binary digits a product, and half a dozen products one after another.
    assert (near - gradient).norm() < 6 * 2**-8 * gradient.norm()


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_probed_square_and_its_gradient_are_unbiased(probes):
    """Averages over independent draws, one a row of a repeated batch, agree with the exact norm."""
    model, draws = network(6), 20_000
    x = random_inputs(3, batch=1)
    generator = torch.Generator().manual_seed(0)

    inputs = x.repeat(draws, 1).requires_grad_()
    squared = frobenius_norm(model(inputs), inputs, probes=probes, generator=generator, create_graph=True).square()
    exact = measure(frobenius_norm, model, x, create_graph=True).square()
    assert squared.std() > 0
    assert abs(squared.mean() - exact[0]) < 4 * squared.std() / draws**0.5

    weight = model[0].weight
    (expected,) = torch.autograd.grad(exact.sum(), weight)
    halves = [torch.autograd.grad(half.mean(), weight, retain_graph=True)[0] for half in squared.chunk(20)]
    stacked = torch.stack(halves)
    error = (stacked.mean(0) - expected).norm() / expected.norm()
    standard_error = (stacked.var(0).sum() / len(halves)).sqrt() / expected.norm()
    assert error < 4 * standard_error
    assert error < 0.05


@pytest.mark.parametrize("draws", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_few_probes_suffice_for_a_trained_network(draws):
    """The relative variance of the squared norm on the note's regularised network, over 200 test images."""
    model = load_checkpoint(ROOT / "docs" / "results" / "checkpoints" / "note_regularized.safetensors").model()
    data = MNISTDataModule(root=str(ROOT / "data"), validation_size=0)
    data.setup("test")
    inputs = data.split("test").first(200)[0].requires_grad_()
    logits, generator = model(inputs), torch.Generator().manual_seed(0)
    exact = frobenius_norm(logits, inputs).square()
    for probes, most in ((1, 0.10), (2, 0.035), (3, 0.007)):
        drawn = [frobenius_norm(logits, inputs, probes=probes, generator=generator).square() for _ in range(draws)]
        variance = torch.stack([((draw - exact) / exact).square().mean() for draw in drawn]).mean()
        assert most / 10 < variance < most, probes


@pytest.mark.parametrize("probes", [5, 6, 100])
def test_as_many_probes_as_columns_are_exact(probes):
    model, inputs = network(6), random_inputs(4)
    torch.testing.assert_close(
        measure(frobenius_norm, model, inputs, probes=probes), measure(frobenius_norm, model, inputs)
    )


class NoBatchRule(torch.autograd.Function):
    """The identity, as a layer that ``torch.vmap`` knows nothing about."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone() if gradient.numpy(force=True).size else gradient


@pytest.mark.parametrize("probes", [None, 2])
def test_one_batched_pass_gives_the_norm_and_gradient_of_many(probes):
    torch.manual_seed(0)
    model, images = LeNet(), torch.rand(6, 1, 28, 28)

    def gradients(batched):
        inputs = images.clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        options = {"probes": probes, "generator": generator, "create_graph": True}
        norm = frobenius_norm(model(inputs), inputs, batched=batched, **options)
        return [norm, *torch.autograd.grad(norm.exp().sum(), list(model.parameters())[:-1])]

    for one, many in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


def test_layers_without_a_rule_for_batches_fall_back_to_single_products_unless_batches_are_asked_for(monkeypatch):
    model, inputs = network(4), random_inputs(5).requires_grad_()
    logits = NoBatchRule.apply(model(inputs))
    with pytest.raises(RuntimeError):
        frobenius_norm(logits, inputs, batched=True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # as on a GPU, where batches are tried first
    torch.testing.assert_close(frobenius_norm(logits, inputs), measure(frobenius_norm, model, inputs, batched=False))


def test_probes_follow_the_generator_and_draw_fresh_signs():
    model, inputs = network(6), random_inputs(5)

    def probe(generator):
        return measure(frobenius_norm, model, inputs, probes=1, generator=generator)

    generator = torch.Generator().manual_seed(7)
    first, second = probe(generator), probe(generator)
    assert torch.equal(first, probe(torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("norm", [frobenius_norm, functools.partial(frobenius_norm, probes=1), *SPECTRAL])
@pytest.mark.parametrize(
    "logits",
    [
        [[1e4, -1e4, 0.0, 3.0]],
        [[-1e4, 0.0, 0.0, 1e4]],
        [[0.0, 0.0, 0.0, 0.0]],
        [[5.0, 5.0, -5.0, -5.0]],
        [[90.0, 0.0, -90.0, 45.0]],
    ],
    ids=["huge", "last class", "uniform", "ties", "beyond float32"],
)
def test_values_and_gradients_are_finite_in_float32_for_any_prediction(norm, logits):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = torch.zeros(1, 6, requires_grad=True)
    value = norm(inputs @ weight.T + torch.tensor(logits), inputs, create_graph=True)
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("norm", [frobenius_norm, functools.partial(frobenius_norm, probes=2), *SPECTRAL])
def test_a_class_whose_logit_is_minus_infinity_is_left_out(norm):
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for classes in (4, 5):
        rows = weight[:classes].clone().requires_grad_()
        inputs = random_inputs(0).requires_grad_()
        mask = torch.tensor([0.0] * 4 + [-torch.inf])[:classes].double()
        sign = {"generator": torch.Generator().manual_seed(0)} if norm not in SPECTRAL else {}
        if "generator" in sign and norm is not frobenius_norm:  # the same signs for the classes that both have
            signs = torch.ones(5, classes, dtype=torch.float64)
            directions = tangent_directions((inputs @ rows.T + mask), 1, signs)
            vectors = [FisherFactor(inputs @ rows.T + mask) @ direction for direction in directions]
            value = torch.stack([v.square().sum() for v in vectors]).sum()
        else:
            value = norm(inputs @ rows.T + mask, inputs, create_graph=True, **sign).sum()
        (gradient,) = torch.autograd.grad(value, rows)
        results.append((value.detach(), gradient[:4]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("norm", [frobenius_norm, functools.partial(frobenius_norm, probes=1), *SPECTRAL])
def test_a_zero_jacobian_has_norm_zero_and_a_finite_gradient(norm):
    weight = torch.zeros(4, 6, requires_grad=True)
    inputs = torch.ones(2, 6, requires_grad=True)
    value = norm(inputs @ weight.T, inputs, create_graph=True)
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert torch.equal(value, torch.zeros(2))
    assert gradient.isfinite().all()


def test_a_sample_that_is_not_finite_does_not_spoil_the_batch():
    model, inputs = network(4), random_inputs(0)
    spoilt = inputs.clone()
    spoilt[0] = torch.nan
    for norm in NORMS.values():
        values = measure(norm, model, spoilt)
        assert values[0].isnan()
        torch.testing.assert_close(values[1:], measure(norm, model, inputs)[1:])


def test_the_graph_is_kept_for_the_loss_and_no_graph_is_made_unasked():
    model, inputs = network(3), random_inputs(0).requires_grad_()
    logits = model(inputs)
    assert not frobenius_norm(logits, inputs).requires_grad
    assert not spectral_norm(logits, inputs).requires_grad
    logits.sum().backward()
    assert inputs.grad is not None


def test_mistakes_are_named():
    model, inputs = network(3), random_inputs(0)
    with pytest.raises(ValueError, match="requires_grad_"):
        frobenius_norm(model(inputs), inputs)
    inputs.requires_grad_()
    with pytest.raises(ValueError, match="do not depend"):
        frobenius_norm(model(inputs.detach()), inputs)
    with pytest.raises(ValueError, match="probes must be at least 1"):
        frobenius_norm(model(inputs), inputs, probes=0)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        spectral_norm(model(inputs), inputs, columns=0)
    with pytest.raises(ValueError, match="tolerance must be above 0"):
        spectral_norm(model(inputs), inputs, columns=1, tolerance=0.0)
    with pytest.raises(ValueError, match="classes ≥ 2"):
        frobenius_norm(model(inputs)[:, :1], inputs)


def test_a_class_that_is_masked_by_minus_infinity_is_a_class_left_out():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    inputs = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    logits = net(inputs)
    masked = torch.cat([logits, logits[:, :1]], dim=1).masked_fill(torch.arange(5) == 4, -torch.inf)
    norms, gradients = [], []
    for outputs in (logits, masked):
        norm = frobenius_norm(outputs, inputs, create_graph=True)
        norms.append(norm)
        gradients.append(torch.autograd.grad(norm.sum(), net[0].weight, retain_graph=True)[0])
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(*gradients)
    for mine, others in zip(jacobian_norms(logits, inputs), jacobian_norms(masked, inputs), strict=True):
        torch.testing.assert_close(mine, others)

"""Penalties on a bound over the whole ball."""

import math
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module as parametrized

from jacobian_robust.adversaries import FGSM
from jacobian_robust.bounds import certified_margin, lipschitz_margin
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import Categorical
from jacobian_robust.penalties import CertifiedMargin, GloRo, Lagrangian, Margin
from jacobian_robust.training.checks import check_penalty
from jacobian_robust.training.module import RobustClassifier


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 5, dtype=torch.float64, generator=generator), torch.arange(6) % 4


def value(penalty, model):
    inputs, labels = batch()
    return penalty(model(inputs), inputs, labels, model=model)


@pytest.mark.parametrize("form", ["cross_entropy", "margin"])
def test_gradients_are_those_of_finite_differences(form):
    model, penalty = network(), CertifiedMargin(eps=0.05, form=form)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}

    def of(*values):
        with parametrized(model, dict(zip(weights, values, strict=True))):
            return value(penalty, model)

    assert torch.autograd.gradcheck(of, tuple(weights.values()))


def test_the_cross_entropy_exceeds_that_at_any_point_of_the_ball():
    model, (inputs, labels) = network(), batch()
    bound = value(CertifiedMargin(eps=0.1), model)
    for _ in range(100):
        point = (inputs + 0.1 * (2 * torch.rand_like(inputs) - 1)).clamp(0, 1)
        loss = nn.functional.cross_entropy(model(point), labels, reduction="none")
        assert (loss <= bound + 1e-12).all()
    at_the_image = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
    torch.testing.assert_close(value(CertifiedMargin(eps=1e-6), model), at_the_image, atol=1e-4, rtol=0)


def test_the_margin_form_is_small_where_the_image_is_certified():
    model, (inputs, labels) = network(), batch()
    margin = certified_margin(model, inputs, labels, 0.02)
    expected = (1 + (-3.0 * margin).exp()).log() / 3.0
    torch.testing.assert_close(value(CertifiedMargin(eps=0.02, form="margin", kappa=3.0), model), expected)


def test_a_rising_radius_leaves_the_target():
    model, (inputs, labels) = network(), batch()
    penalty = CertifiedMargin(eps=0.2)
    risen = penalty.with_radius(0.1)
    assert risen.eps == pytest.approx(0.02)
    for each in (penalty, risen, CertifiedMargin(eps=0.3, target=0.2).with_radius(0.5)):
        certified = each.certified(model, inputs, labels)
        assert torch.equal(certified, certified_margin(model, inputs, labels, 0.2) > 0)
    easy = CertifiedMargin(eps=0.3, target=1e-6).certified(model, inputs, labels)
    assert torch.equal(easy, model(inputs).argmax(-1) == labels)
    assert easy.any()


def test_a_constraint_certifies_what_its_penalty_does_and_one_at_a_point_nothing():
    model, (inputs, labels) = network(), batch()
    penalty = CertifiedMargin(eps=0.01)
    constraint = Lagrangian(penalty=penalty, rate=1.0, damping=1.0)
    assert torch.equal(constraint.certified(model, inputs, labels), penalty.certified(model, inputs, labels))
    assert Margin(eps=1.0).certified(model, inputs, labels) is None


def test_a_missing_model_is_named():
    inputs, labels = batch()
    with pytest.raises(TypeError, match=r"pass it as model="):
        CertifiedMargin(eps=0.1)(network()(inputs), inputs, labels)


def test_no_gradient_is_kept_for_a_value_alone():
    inputs, labels = batch()
    model = network()
    alpha = CertifiedMargin(eps=0.1)(model(inputs), inputs, labels, model=model, create_graph=False)
    assert not alpha.requires_grad
    assert math.isfinite(alpha.mean().item())


def test_with_an_adversary_the_loss_is_the_mixture_of_the_bound_and_the_attacked_point():
    model, (inputs, labels) = network().float(), batch()
    inputs = inputs.float()
    adversary = FGSM(eps=0.1)
    penalty = CertifiedMargin(eps=0.1)
    module = RobustClassifier(model, torch.optim.SGD, penalty, adversary=adversary)
    module.eta = 0.25
    torch.manual_seed(1)
    loss = module.loss_terms((inputs, labels), attacked=True).loss
    torch.manual_seed(1)
    attacked = nn.functional.cross_entropy(model(adversary.perturb(model, inputs, labels)), labels)
    bound = penalty(model(inputs), inputs, labels, model=model).mean()
    torch.testing.assert_close(loss, 0.75 * attacked + 0.25 * bound)


def test_a_model_that_has_no_bounds_in_training_is_refused_before_it_begins():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    images = Mock(spec=ImageDataModule, image_shape=(1, 28, 28), family=Categorical())
    with pytest.raises(UserError, match="regularizer: cannot be computed of this model in training: bounds: BatchNorm"):
        check_penalty(CertifiedMargin(eps=0.1), model, images)
    check_penalty(CertifiedMargin(eps=0.1), nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), images)


def constants_of(model):
    """Return the exact ``‖W_i − W_j‖ ‖W_1‖₂`` of the network of two layers."""
    first, last = model[0].weight, model[2].weight
    return torch.linalg.matrix_norm(first, 2) * (last[:, None] - last + 1e-300).norm(dim=-1)


@pytest.mark.parametrize("form", ["bottom", "margin"])
def test_gloro_is_its_formula_at_the_exact_constants_and_so_is_its_gradient(form):
    model, (inputs, labels) = network(), batch()
    penalty = GloRo(eps=0.3, form=form, temperature=2.0, iterations=300)
    lifted = model(inputs) + 0.3 * constants_of(model)[labels]
    own = nn.functional.one_hot(labels, 4).bool()
    if form == "bottom":
        bottom = lifted.masked_fill(own, -torch.inf).max(-1, keepdim=True).values
        lifted = torch.cat([model(inputs), bottom], -1)
    expected = nn.functional.cross_entropy(2 * lifted, labels, reduction="none") / 2
    found = penalty(model(inputs), inputs, labels, model=model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    theirs, ours = (torch.autograd.grad(loss.mean(), list(model.parameters())) for loss in (expected, found))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_gloro_certifies_by_the_sound_bound_at_its_target_alone_and_under_a_constraint():
    model, (inputs, labels) = network(), batch()
    labels = model(inputs).argmax(-1)
    radius = lipschitz_margin(model, inputs, labels)
    target = radius.median().item()
    penalty = GloRo(eps=5.0, target=target).with_radius(0.1)
    assert torch.equal(penalty.certified(model, inputs, labels), radius >= target)
    assert (radius >= target).sum() in (3, 4)
    constraint = Lagrangian(penalty=penalty, rate=1.0, damping=1.0)
    assert torch.equal(constraint.certified(model, inputs, labels), penalty.certified(model, inputs, labels))
    assert constraint(model(inputs), inputs, labels, model=model).mean() > 0


def test_gloro_draws_from_the_generator_and_keeps_no_gradient_for_a_value_alone():
    model, (inputs, labels) = network(), batch()

    def value_of(seed):
        generator = torch.Generator().manual_seed(seed)
        penalty = GloRo(eps=1.0, iterations=1)
        return penalty(model(inputs), inputs, labels, model=model, generator=generator, create_graph=False)

    assert torch.equal(value_of(0), value_of(0))
    assert not torch.equal(value_of(0), value_of(1))
    assert not value_of(0).requires_grad

"""Attacks of models whose outputs are parameters of other families: the code of classification."""

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import FAB, FGSM, PGD, GaussianNoise, UniformNoise
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import BernoulliProduct, Gaussian, PixelCategorical, Poisson
from jacobian_robust.robustness.budgets import sweep

FAMILIES = {
    "labels": (BernoulliProduct(), (3,)),
    "pixels": (PixelCategorical(share=0.7), (3, 2, 2)),
    "number": (Gaussian(sigma=0.5, tolerance=0.5), (1,)),
    "counts": (Poisson(), (1,)),
}
each_family = pytest.mark.parametrize(("family", "shape"), FAMILIES.values(), ids=FAMILIES)


def attacked_network(family, shape, images=12):
    torch.manual_seed(0)
    outputs = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs), nn.Unflatten(1, shape))
    x = 0.2 + 0.6 * torch.rand(images, 1, 4, 4)
    with torch.no_grad():
        targets = family.predict(model(x))
    return model.eval(), x, targets.round() if isinstance(family, Poisson) else targets


@each_family
@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_pgd_stays_in_its_ball_and_undoes_what_is_right(family, shape, loss):
    model, images, targets = attacked_network(family, shape)
    pgd = PGD(name="pgd", eps=(0.3, 1.0), norm="linf", steps=30, step_size=0.1, loss=loss).with_family(family)
    adversarial = pgd.perturb(model, images, targets, 0.3)
    assert (adversarial - images).abs().max() <= 0.3 + 1e-6
    swept = sweep(model, images, targets, [pgd], examples=0)
    right = family.right(model(images), targets)
    assert swept.clean_correct == right.sum() > 0
    small, whole = swept.budgets
    assert small.discarded == whole.discarded == 0
    assert whole.correct < whole.attacked
    # What counts as broken is what the family calls wrong, of the same examples.
    noise = UniformNoise(name="noise", eps=(0.3,)).with_family(family)
    (noisy,) = sweep(model, images, targets, [noise], examples=0).budgets
    assert small.correct <= noisy.correct


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_of_a_linear_regression_finds_the_exact_worst_case(norm):
    """The ball moves a linear mean by ε times the dual norm of its weight: right until that is more than τ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).eval()
    images = torch.full((2, 1, 4, 4), 0.5)
    targets = model(images).detach() + torch.tensor([[0.0], [0.2]])
    weight = model[1].weight.detach()
    reach = float(weight.abs().sum() if norm == "linf" else weight.norm())
    family = Gaussian(sigma=0.5, tolerance=0.3)
    budgets = (0.1 / reach * 0.97, 0.1 / reach * 1.05, 0.3 / reach * 0.97, 0.3 / reach * 1.05)
    pgd = PGD(name="pgd", eps=budgets, norm=norm, steps=40, step_size=0.1, loss="margin").with_family(family)
    # At the mean itself the violation has no slope: a start elsewhere finds either side.
    assert [budget.correct for budget in sweep(model, images, targets, [pgd], examples=0).budgets] == [2, 1, 1, 0]


@each_family
def test_fgsm_is_one_step_along_the_gradient_of_the_loss(family, shape):
    model, images, targets = attacked_network(family, shape)
    if targets.is_floating_point():
        targets = targets + 0.1
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(family.loss(model(x), targets), x)
    adversarial = FGSM(name="fgsm", eps=(0.05,)).with_family(family).perturb(model, images, targets, 0.05)
    torch.testing.assert_close(adversarial, images + 0.05 * gradient.sign(), rtol=0, atol=1e-5)


def test_attacks_of_classes_alone_are_refused():
    fab = FAB(name="fab_l2", eps=(0.5,), norm="l2", steps=3)
    with pytest.raises(UserError, match="fab_l2: this attack is for classification alone; choose attack=pgd_linf"):
        fab.with_family(Poisson())
    dlr = PGD(name="pgd", eps=(0.5,), norm="l2", steps=3, step_size=0.1, loss="dlr").with_family(Poisson())
    with pytest.raises(UserError, match="loss=dlr is of class logits: choose loss=margin"):
        dlr.require(1, (1, 4, 4))
    assert GaussianNoise(name="noise", eps=(0.1,)).with_family(Poisson()).family == Poisson()

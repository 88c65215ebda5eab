import itertools
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from jacobian_robust.attacks import PGD
from jacobian_robust.errors import UserError
from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.penalties import CertifiedMargin, Frobenius, LinearMargin, LogitJacobian, Margin
from jacobian_robust.penalties.lagrangian import Lagrangian
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.training.callbacks import (
    AttackMonitor,
    CertificateMonitor,
    JacobianMonitor,
    ScheduledEps,
    ScheduledEta,
)
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.schedules import ConstantEta, GeometricEps, GeometricEta, LinearEps, LinearEta


@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(2, 100))
def test_geometric_eta_goes_from_min_to_max_by_equal_ratios(a, b, epochs):
    low, high = sorted((a, b))
    schedule = GeometricEta(min=low, max=high)
    etas = [schedule.eta(epoch, epochs) for epoch in range(epochs)]
    assert etas[0] == pytest.approx(low)
    assert etas[-1] == pytest.approx(high)
    ratios = [later / earlier for earlier, later in itertools.pairwise(etas)]
    assert ratios == pytest.approx([(high / low) ** (1 / (epochs - 1))] * len(ratios))


def test_geometric_eta_is_the_notes():
    schedule = GeometricEta(min=0.002, max=0.006)
    assert schedule.eta(0, 30) == pytest.approx(0.002)
    assert schedule.eta(14, 30) == pytest.approx(0.002 * 3 ** (14 / 29))
    assert schedule.eta(29, 30) == pytest.approx(0.006)


def test_one_epoch_divides_by_nothing():
    assert GeometricEta(min=0.002, max=0.006).eta(0, 1) == 0.002


def test_constant_eta_is_constant():
    assert {ConstantEta(value=0.005).eta(epoch, 30) for epoch in range(30)} == {0.005}
    assert ConstantEta(value=0).eta(0, 1) == 0


@pytest.mark.parametrize("options", [{"min": 0.01, "max": 0.001}, {"min": 0, "max": 0.1}, {"min": 0.1, "max": 1.5}])
def test_impossible_schedules_are_refused(options):
    with pytest.raises(ValidationError):
        GeometricEta(**options)
    with pytest.raises(ValidationError):
        ConstantEta(value=-0.1)


@given(st.floats(1e-3, 1), st.floats(0, 1))
def test_a_radius_rises_from_its_start_to_the_whole_and_linearly_or_by_ratios(start, progress):
    linear, geometric = (schedule(start=start, fraction=0.5) for schedule in (LinearEps, GeometricEps))
    for schedule in (linear, geometric):
        assert schedule.share(0.0) == pytest.approx(start)
        assert schedule.share(1.0) == 1
    assert linear.share(progress) == pytest.approx((1 - progress) * start + progress)
    assert geometric.share(0.5) == pytest.approx(start**0.5)
    assert geometric.share(progress) <= linear.share(progress) + 1e-12


@pytest.mark.parametrize("penalty", [Frobenius(delta_over_eps=1e-3), Frobenius(eps=2.0)])
def test_a_share_of_a_radius_is_that_in_either_notation(penalty):
    assert penalty.with_radius(0.25).radius(10) == pytest.approx(penalty.radius(10) / 4)
    assert penalty.with_radius(1.0) == penalty


def test_the_radius_of_a_constrained_penalty_rises_and_the_multipliers_stay():
    constraint = Lagrangian(penalty=Margin(eps=4.0), rate=1.0, damping=1.0)
    module = RobustClassifier(nn.Linear(2, 2), torch.optim.SGD, constraint)
    schedule = ScheduledEps(LinearEps(start=0.25, fraction=0.5))
    trainer = Mock(spec=pl.Trainer, estimated_stepping_batches=20, global_step=0)
    schedule.on_train_start(trainer, module)
    for step, eps in ((0, 1.0), (5, 2.5), (10, 4.0), (15, 4.0)):
        trainer.global_step = step
        schedule.on_train_batch_start(trainer, module, None, step)
        assert module.penalty.penalty == Margin(eps=eps)
    constraint.load_state_dict({"multipliers": torch.tensor([0.0, 3.0])})
    assert module.penalty.multiplier == 1.5


def test_a_share_of_a_radius_leaves_the_rest_of_a_penalty_as_it_is():
    assert Margin(eps=4.0, kappa=3.0, probes=2).with_radius(0.5) == Margin(eps=2.0, kappa=3.0, probes=2)
    assert LinearMargin(eps=0.2, norm="l2").with_radius(0.5) == LinearMargin(eps=0.1, norm="l2")
    with pytest.raises(UserError, match="LogitJacobian has no radius"):
        LogitJacobian().with_radius(0.5)


def test_monitor_measures_the_exact_mean_norm_and_the_condition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    images = torch.rand(60, 1, 3, 3)
    inputs = images.clone().requires_grad_()
    expected = frobenius_norm(model(inputs), inputs).mean().item()
    labels = torch.zeros(60, dtype=torch.long)
    with torch.no_grad():
        wide = JacobianMonitor(60, eps=1e6, bound="center").measure(model, images, labels)
        narrow = JacobianMonitor(60, eps=1e-6, bound="center").measure(model, images, labels)
    assert wide["jacobian_norm"] == pytest.approx(expected, rel=1e-5)
    assert (wide["condition_satisfied"], narrow["condition_satisfied"]) == (0, 1)


def test_attack_monitor_measures_the_first_budget_and_draws_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).eval()
    images = torch.rand(60, 1, 3, 3)
    labels = model(images).argmax(-1)
    attack = PGD(name="pgd", norm="linf", eps=[0.05, 0.3], steps=5, step_size=0.02)
    expected = [budget.robust_accuracy for budget in sweep(model, images, labels, [attack]).budgets]
    assert expected[1] < expected[0] < 1
    state = torch.get_rng_state()
    with torch.no_grad():
        assert AttackMonitor(60, attack).measure(model, images, labels) == {"robust_accuracy": expected[0]}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_linear_eta_rises_by_step_to_its_fraction():
    schedule = LinearEta(min=0.1, max=0.5, fraction=0.5)
    assert [schedule.eta(epoch, 4) for epoch in (0, 0.5, 1, 2, 4)] == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.5])
    module = RobustClassifier(nn.Linear(2, 2), torch.optim.SGD, None)
    for step, eta in ((0, 0.1), (25, 0.3), (99, 0.5)):
        trainer = Mock(spec=pl.Trainer, max_epochs=4, global_step=step, estimated_stepping_batches=100)
        ScheduledEta(schedule).on_train_batch_start(trainer, module, None, 0)
        assert module.eta == pytest.approx(eta)


def test_the_certified_accuracy_of_an_epoch_is_that_at_the_target():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    images, labels = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]), torch.tensor([0, 0, 0])
    monitor = CertificateMonitor(3, CertifiedMargin(eps=0.15, target=0.2))  # the margin is 0.8, 0.2, −0.2, less 2 ε
    assert monitor.measure(model, images, labels) == {"certified_accuracy": pytest.approx(1 / 3)}
    assert CertificateMonitor(3, Margin(eps=1.0)).measure(model, images, labels) == {}

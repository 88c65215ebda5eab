"""The augmented Lagrangian against its formula, and what its multipliers settle at."""

import copy

import pytest
import torch
from torch import nn

from jacobian_robust.penalties import VAT, InputGradient, Lagrangian, Margin, Penalty

OPTIONS = {"tolerance": 0.3, "rate": 0.5, "damping": 2.0}


def a_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    return model, x, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])  # nothing of the last class


def test_it_is_its_formula_and_the_multipliers_climb_by_the_violation():
    model, x, labels = a_batch()
    lagrangian = Lagrangian(penalty=Margin(eps=1.0), **OPTIONS)
    multipliers = torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        alpha = Margin(eps=1.0)(model(x), x, labels)
        expected = 0.0
        climbed = multipliers.clone()
        for c in range(3):
            g, share = alpha[labels == c].mean() - 0.3, (labels == c).double().mean()
            expected += share * ((multipliers[c] + 2 * g).clamp_min(0) ** 2 - multipliers[c] ** 2) / 4
            climbed[c] = (multipliers[c] + 0.5 * share * g.detach()).clamp_min(0)
        value = lagrangian(model(x), x, labels).mean()
        torch.testing.assert_close(value, expected)
        ours, theirs = (torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0] for loss in (value, expected))
        torch.testing.assert_close(ours, theirs)
        lagrangian.step()
        multipliers = climbed
        torch.testing.assert_close(lagrangian.multipliers, multipliers)
    assert (multipliers[:3] > 0).any()
    assert multipliers[3] == 0


def test_a_constraint_that_holds_costs_nothing_and_has_no_multiplier():
    model, x, labels = a_batch()
    lagrangian = Lagrangian(penalty=InputGradient(), **OPTIONS | {"tolerance": 1e3})
    for _ in range(2):
        assert lagrangian(model(x), x, labels).abs().max() == 0
        lagrangian.step()
    assert lagrangian.multipliers.abs().max() == 0


class Square(Penalty):
    """``w²`` of every sample."""

    def __init__(self, w):
        self.w = w

    def __call__(self, logits, inputs, labels=None, *, model=None, generator=None, create_graph=True):
        return self.w.square().expand(len(logits))


@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_it_finds_the_constrained_optimum_and_its_multiplier(damping):
    """Of ``(w - 2)²/2`` under ``w² ≤ 1``: ``w = 1`` and ``λ = 1/2``, whatever the damping."""
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    lagrangian = Lagrangian(penalty=Square(w), tolerance=1.0, rate=0.05, damping=damping)
    x, labels = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for _ in range(3000):
        loss = (w - 2).square() / 2 + lagrangian(x, x, labels).mean()
        (slope,) = torch.autograd.grad(loss, w)
        lagrangian.step()
        with torch.no_grad():
            w -= 0.05 * slope
    assert w.item() == pytest.approx(1, abs=1e-4)
    assert lagrangian.multipliers[0].item() == pytest.approx(0.5, abs=1e-3)


def test_validation_teaches_nothing_and_the_state_goes_on():
    model, x, labels = a_batch()
    first = Lagrangian(penalty=Margin(eps=1.0), **OPTIONS)
    first(model(x), x, labels)
    first(model(x), x, labels.flip(0), create_graph=False)
    first.step()
    second = Lagrangian(penalty=Margin(eps=1.0), **OPTIONS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(second(model(x), x, labels), first(model(x), x, labels))
    other = Lagrangian(penalty=Margin(eps=1.0), **OPTIONS)
    other(model(x), x, labels)
    other.step()
    torch.testing.assert_close(first.multipliers, other.multipliers)


def test_batches_of_a_step_that_is_not_taken_teach_nothing_and_those_of_one_that_is_all_do():
    model, x, labels = a_batch()
    lagrangian = Lagrangian(penalty=Margin(eps=1.0), **OPTIONS | {"tolerance": 0.0})
    lagrangian(model(x), x, labels)
    lagrangian.discard()
    lagrangian.step()
    assert lagrangian.multipliers.abs().max() == 0
    lagrangian(model(x), x, labels)
    lagrangian.step()
    once = lagrangian.multipliers
    lagrangian.load_state_dict({"multipliers": torch.zeros_like(once)})
    for _ in range(2):
        lagrangian(model(x), x, labels)
    lagrangian.step()
    torch.testing.assert_close(lagrangian.multipliers, 2 * once)
    assert once.max() > 0


def test_a_penalty_that_asks_for_the_model_is_given_it():
    model, x, labels = a_batch()
    lagrangian = Lagrangian(penalty=VAT(eps=1.0), **OPTIONS)
    assert not lagrangian.needs_graph
    assert lagrangian(model(x), x, labels, model=model).shape == labels.shape


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_the_multipliers_of_several_processes_are_those_of_one(cut):
    model, x, labels = a_batch()
    whole, first, second = (Lagrangian(penalty=Margin(eps=1.0), **OPTIONS) for _ in range(3))
    for _ in range(2):  # two batches in a step
        whole(model(x), x, labels)
        for part, at in ((first, slice(cut)), (second, slice(cut, None))):
            inputs = x[at].detach().requires_grad_()
            part(model(inputs), inputs, labels[at])
    sent = []
    second.step(lambda tensor: sent.append(tensor) or tensor)  # what the other process has to add
    whole.step()
    first.step(lambda tensor: tensor + sent[0])
    torch.testing.assert_close(first.multipliers, whole.multipliers)
    assert whole.multipliers.max() > 0


def test_a_copy_with_another_radius_goes_on_with_the_same_multipliers():
    model, x, labels = a_batch()
    whole = Lagrangian(penalty=Margin(eps=1.0), **OPTIONS)
    half = whole.with_radius(0.5)
    half(model(x), x, labels)
    half.step()
    assert half.penalty == Margin(eps=0.5)
    assert whole.penalty == Margin(eps=1.0)
    assert torch.equal(whole.multipliers, half.multipliers)
    assert half.multiplier == pytest.approx(half.multipliers.mean().item()) != 0

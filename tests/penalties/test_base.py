"""The protocol: a penalty is one class with ``__call__``."""

import pytest
import torch
from torch import nn

from jacobian_robust.errors import UserError
from jacobian_robust.penalties import VAT, Curvature, Frobenius, InputGradient, Lagrangian, Margin, Penalty


class Length(Penalty):
    """``‖s‖²``."""

    def __call__(self, logits, inputs, labels=None, *, model=None, generator=None, create_graph=True):
        return logits.square().sum(-1)


def test_a_new_penalty_needs_no_more_than_its_call():
    penalty = Length()
    assert penalty.needs_graph
    assert not any([penalty.needs_model, penalty.takes_probabilities, penalty.stateful])
    assert (penalty.condition(10), penalty.multiplier, penalty.state_dict()) == (None, None, {})
    penalty.step()
    penalty.discard()
    with pytest.raises(UserError, match="eps_schedule: Length has no radius ε; give eps_schedule=none"):
        penalty.with_radius(0.5)


@pytest.mark.parametrize("penalty", [VAT(eps=1.0), Curvature(h=1.0)])
def test_a_penalty_at_other_points_asks_for_the_model(penalty):
    assert penalty.needs_model
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"pass it as model="):
        penalty(nn.Linear(3, 4)(x), x, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "penalty", [Margin(eps=0.5), InputGradient(), VAT(eps=1.0), Frobenius(eps=2.0, outputs="probabilities")]
)
def test_a_constraint_answers_as_the_penalty_it_is_made_of(penalty):
    constraint = Lagrangian(penalty=penalty, rate=1.0, damping=1.0)
    for name in ("needs_graph", "needs_model", "takes_probabilities"):
        assert getattr(constraint, name) == getattr(penalty, name)
    assert constraint.condition(10) == penalty.condition(10)


def test_the_condition_is_that_of_the_penalty():
    assert Frobenius(delta_over_eps=1e-3).condition(10) == (pytest.approx(2498, abs=0.5), "center")
    assert Margin(eps=0.5).condition(10) == (0.5, "boundary")

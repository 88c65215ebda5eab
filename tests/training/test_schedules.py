import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from jacobian_robust.training.schedules import Cosine, MultiStep, OneCycle


def rates(make, steps):
    """The rates that one of torch's schedulers sets for its steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(schedule, steps):
    return [0.3 * schedule.factor(step / steps) for step in range(steps)]


@given(steps=st.integers(2, 40), final=st.sampled_from([0.0, 0.1]))
def test_the_cosine_is_torchs(steps, final):
    theirs = rates(lambda o: CosineAnnealingLR(o, steps, eta_min=0.3 * final), steps)
    assert ours(Cosine(final=final), steps) == pytest.approx(theirs, abs=1e-12)


@given(quarters=st.integers(1, 20), gamma=st.sampled_from([0.1, 0.5]))
def test_milestones_are_torchs(quarters, gamma):
    steps = 4 * quarters
    theirs = rates(lambda o: MultiStepLR(o, [2 * quarters, 3 * quarters], gamma), steps)
    assert ours(MultiStep(milestones=[0.5, 0.75], gamma=gamma), steps) == pytest.approx(theirs)


def test_the_one_cycle_is_torchs():
    """Whose last step is at the end of the cycle, where ours is a step before it; and which rises a step less."""
    steps, rise = 101, 0.3
    theirs = rates(lambda o: OneCycleLR(o, 0.3, total_steps=steps, pct_start=31 / 101, cycle_momentum=False), steps)
    schedule = OneCycle(rise=rise)
    assert [0.3 * schedule.factor(step / 100) for step in range(steps)] == pytest.approx(theirs, abs=1e-12)


@given(warmup=st.floats(0.05, 0.9), initial=st.floats(0, 0.9))
def test_the_warm_up_rises_in_equal_steps_to_the_optimizers_rate(warmup, initial):
    schedule = Cosine(warmup=warmup, initial=initial)
    rising = [schedule.factor(warmup * i / 8) for i in range(9)]
    differences = [after - before for before, after in itertools.pairwise(rising)]
    assert rising[0] == pytest.approx(initial)
    assert rising[-1] == pytest.approx(1)
    assert differences == pytest.approx([(1 - initial) / 8] * 8, abs=1e-9)
    assert schedule.factor(warmup + (1 - warmup) / 2) == pytest.approx(0.5)

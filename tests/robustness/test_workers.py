"""Several processes attack as one does, bit for bit."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import FAB, PGD, Square
from jacobian_robust.errors import UserError
from jacobian_robust.models import LeNet
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.sanity.balls import Rescaled
from jacobian_robust.robustness.workers import full_precision, several

ATTACKS = [
    PGD(name="pgd", norm="l2", eps=(0.05, 0.1), steps=5, step_size=0.02, restarts=2, batch_size=7),
    FAB(name="fab", norm="l2", eps=(0.1,), steps=3, targets=2, batch_size=7),
    Square(name="square", norm="l2", eps=(0.1,), queries=10, batch_size=7),
]


def a_case():
    torch.manual_seed(0)
    model = LeNet(image_size=8).eval()
    images = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        model.layers[-1].bias -= model(images).mean(0)  # near the boundaries
    return model, images, model(images).argmax(-1)


class Exact(nn.Linear):
    """Answers only where a GPU would convolve in full float32."""

    def forward(self, images):
        if torch.backends.cudnn.allow_tf32:
            raise RuntimeError("TF32")
        return super().forward(images.flatten(1))


def test_the_results_are_those_of_one_process_in_full_precision_here_and_there():
    model, images, labels = a_case()
    exact, before_exact = Exact(64, 3), torch.backends.cudnn.allow_tf32
    alone = sweep(model, images, labels, ATTACKS, seed=3)
    before = torch.get_rng_state()
    with full_precision(), several(2, [nn.Identity(), model, exact]) as attackers:
        exact_labels = exact(images).argmax(-1)
        exactly = sweep(exact, images, exact_labels, ATTACKS[:1], attackers=attackers)
        assert exactly.budgets == sweep(exact, images, exact_labels, ATTACKS[:1]).budgets
        together = sweep(model, images, labels, ATTACKS, seed=3, attackers=attackers)
        rescaled = Rescaled(model, 2.0)  # which they do not know
        followed = {"pgd": [rescaled]}
        (budget, _) = sweep(model, images, labels, ATTACKS[:1], surrogates=followed, attackers=attackers).budgets
    (here, _) = sweep(model, images, labels, ATTACKS[:1], surrogates=followed).budgets
    assert budget == here
    assert alone.budgets == together.budgets
    assert [0 < budget.correct < 60 for budget in alone.budgets] == [True, True]
    assert [attack.broken > 0 for attack in alone.budgets[1].attacks][:2] == [True, True]
    assert torch.equal(alone.smallest, together.smallest)
    for ours, theirs in zip(together.examples, alone.examples, strict=True):
        assert torch.equal(ours.adversarial, theirs.adversarial)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.backends.cudnn.allow_tf32 == before_exact


@pytest.fixture
def forking(monkeypatch):
    """Fork the processes, but beside a GPU: they need not import torch anew."""
    if not torch.cuda.is_available():
        forked = multiprocessing.get_context("fork")
        monkeypatch.setattr(multiprocessing, "get_context", lambda *_: forked)


@pytest.mark.usefixtures("forking")
def test_a_mistake_there_is_one_here_and_a_model_that_cannot_travel_is_refused():
    model, images, _ = a_case()
    with several(2, [model]) as attackers, pytest.raises(UserError, match=r"needs \[0, 1\]"):
        sweep(model, images + 1, model(images + 1).argmax(-1), ATTACKS, attackers=attackers)
    closed = nn.Sequential(nn.Flatten())
    closed.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="processes=2: the model cannot be given"), several(2, [closed]):
        pass


class Fatal(nn.Linear):
    """Kills the process that asks it, unless that is the one that made it."""

    def __init__(self):
        super().__init__(4, 3)
        self.maker = os.getpid()

    def forward(self, images):
        if os.getpid() != self.maker:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images.flatten(1))


@pytest.mark.usefixtures("forking")
def test_a_process_that_dies_is_told_in_one_line():
    torch.manual_seed(0)
    model, images = Fatal().eval(), torch.rand(20, 1, 2, 2)
    labels = model(images).argmax(-1)
    with several(2, [model]) as attackers, pytest.raises(UserError, match="one of 2 processes died"):
        sweep(model, images, labels, ATTACKS[:1], attackers=attackers)

"""What a training does with numbers that are none, and that it does the same numbers every time."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.models import LeNet
from jacobian_robust.penalties import Frobenius, InputGradient, Isometry, LogitJacobian, Margin, Spectral
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.train import train

from .conftest import SHORT, TOY, composed

TRACE = Path(__file__).parent / "loss_trace.json"
OPTIONS = [
    *("regularizer.probes=1", "trainer.max_epochs=1", "trainer.limit_train_batches=6", "logger=csv"),
    *("trainer.limit_val_batches=1", "monitor_images=0"),
]


STEPS = 6


@pytest.fixture
def spoilt(monkeypatch):
    """Spoil the loss or a gradient of some training steps, counted from 0; return the weights before each step."""

    def spoil(what, steps):
        weights = []
        original = RobustClassifier.loss_terms

        def loss_terms(self, batch, **options):
            terms = original(self, batch, **options)
            if self.training and len(weights) < STEPS:  # what follows measures the cost
                number = len(weights)
                weights.append(torch.cat([parameter.detach().flatten() for parameter in self.parameters()]))
                if number in steps and what == "loss":
                    return terms._replace(loss=terms.loss * torch.nan)
                if number in steps:  # a finite value with an infinite slope
                    weight = next(self.parameters()).flatten()[0]
                    return terms._replace(loss=terms.loss + (weight - weight.detach()).abs().sqrt())
            return terms

        monkeypatch.setattr(RobustClassifier, "loss_terms", loss_terms)
        return weights

    return spoil


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, spoilt, capsys, what):
    weights = spoilt(what, {1, 2, 4})
    train(composed("train", *SHORT, *TOY, *OPTIONS, "optimizer.momentum=0.9", f"output_dir={tmp_path}/run"))
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert moved == [True, False, False, True, False]
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint.rows[0]["skipped_steps"] == 3
    assert all(weight.isfinite().all() for weight in checkpoint.state_dict.values())
    assert f"is skipped: its {what} is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_of_the_batches_of_a_step_spoils_it(tmp_path, spoilt, what):
    """Of three steps of two batches each the second, by its first batch."""
    weights = spoilt(what, {2})
    train(composed("train", *SHORT, *TOY, *OPTIONS, "trainer.accumulate_grad_batches=2", f"output_dir={tmp_path}/run"))
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert moved == [False, True, False, False, False]
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint.rows[0]["skipped_steps"] == 1
    ended = torch.cat([weight.flatten() for weight in checkpoint.state_dict.values()])
    assert ended.isfinite().all()
    assert not torch.equal(ended, weights[-1])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_three_in_a_row_end_the_run_and_keep_the_batch(tmp_path, spoilt, what):
    weights = spoilt(what, {2, 3, 4})
    with pytest.raises(UserError, match=f"the {what} of 3 steps in a row was not finite.*nonfinite_batch.pt"):
        train(composed("train", *SHORT, *OPTIONS, f"output_dir={tmp_path}/run"))
    kept = torch.load(tmp_path / "run" / "nonfinite_batch.pt", weights_only=True)
    assert kept["inputs"].shape == (32, 1, 28, 28)
    assert torch.equal(torch.cat([weight.flatten() for weight in kept["model"].values()]), weights[2])


def images(kind):
    if kind == "random":
        return torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return torch.full((4, 1, 28, 28), {"black": 0.0, "white": 1.0}[kind])


PENALTIES = [
    Frobenius(delta_over_eps=1e-3, probes=1),
    Frobenius(eps=1e-3, bound="boundary"),
    Spectral(delta_over_eps=1e-3, columns=2),
    Margin(eps=4.0, probes=1),
    Isometry(eps=5.6),
    LogitJacobian(),
    InputGradient(),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: type(penalty).__name__)
@given(
    kind=st.sampled_from(["random", "black", "white"]),
    bias=st.lists(st.floats(-1e4, 1e4, width=32), min_size=10, max_size=10),
    scale=st.sampled_from([0.0, 1.0, 1e2, 1e4]),
    half=st.booleans(),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.differing_executors], deadline=None)
def test_no_penalty_overflows(penalty, kind, bias, scale, half):
    """One-hot and uniform outputs, logits to ±1e4, images that are all equal, black or white, half precision."""
    torch.manual_seed(0)
    model = LeNet()
    with torch.no_grad():
        model.layers[-1].weight *= scale
        model.layers[-1].bias.copy_(torch.tensor(bias))
    inputs = images(kind).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        logits = model(inputs)
    value = penalty(logits.float(), inputs, torch.arange(4), generator=torch.Generator().manual_seed(0)).mean()
    gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def losses(directory, seed, network=()):
    """The loss of each of twelve steps in float64, in which machines agree."""
    found = []
    original = RobustClassifier.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        found.append(loss.item())
        return loss

    options = ["trainer.precision=64-true", "trainer.limit_train_batches=12", f"seed={seed}", f"output_dir={directory}"]
    options += network
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RobustClassifier, "training_step", training_step)
        train(composed("train", *SHORT, *OPTIONS, *options))
    return found


def test_the_losses_are_those_on_record(tmp_path):
    """A change that is not meant to alter numbers does not; one that is writes the file anew, and says so."""
    assert losses(tmp_path / "run", 0) == pytest.approx(json.loads(TRACE.read_text()), rel=1e-9)


def test_the_same_seed_gives_the_same_losses_bit_for_bit(tmp_path):
    first, second, other = (losses(tmp_path / name, seed, TOY) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first == second
    assert first != other

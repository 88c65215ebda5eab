"""The callbacks for other people's LightningModules."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from jacobian_robust import attacks
from jacobian_robust.errors import UserError
from jacobian_robust.lightning import JacobianPenalty, RobustnessMonitor
from jacobian_robust.penalties import VAT, Frobenius, Lagrangian, Margin

ROOT = Path(__file__).parents[1]
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
CPU = {"accelerator": "cpu", "max_epochs": 1, **QUIET}


class Classifier(pl.LightningModule):
    """Somebody's module, which keeps its weights and gradients of each optimizer step."""

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *layers, nn.Tanh(), nn.Linear(8, 3))
        self.taken = []

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return {"loss": nn.functional.cross_entropy(self(images), labels)}

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def on_before_optimizer_step(self, optimizer):
        weights = copy.deepcopy(self.model.state_dict())
        self.taken.append((weights, [parameter.grad.clone() for parameter in self.model.parameters()]))


def the_data(samples=32):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(samples, 1, 4, 4, generator=generator), torch.arange(samples) % 3)


def gradients(module, weights, penalty, weight, batch, number=0):
    """Return the gradient of ``CE + weight·mean(α)`` at the weights."""
    model = copy.deepcopy(module.model)
    model.load_state_dict(weights)
    inputs, labels = batch[0].clone().requires_grad_(), batch[1]
    logits = model(inputs)
    more = {"model": model, "generator": torch.Generator().manual_seed(number)} if penalty.needs_model else {}
    loss = nn.functional.cross_entropy(logits, labels) + weight * penalty(logits, inputs, labels, **more).mean()
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("penalty", [Margin(eps=1.0), Frobenius(eps=2.0), VAT(eps=1.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_gradient_is_that_of_the_loss_and_the_weighted_penalty(penalty, accumulated):
    module, data = Classifier(), the_data()
    callback = JacobianPenalty(penalty, weight=0.7)
    trainer = pl.Trainer(**CPU, accumulate_grad_batches=accumulated, callbacks=[callback])
    trainer.fit(module, DataLoader(data, batch_size=8))
    weights, taken = module.taken[0]
    batches = [data[8 * i : 8 * (i + 1)] for i in range(accumulated)]
    parts = [gradients(module, weights, penalty, 0.7, batch, i) for i, batch in enumerate(batches)]
    plain = [gradients(module, weights, penalty, 0.0, batch) for batch in batches]
    for ours, *expected in zip(taken, *parts, strict=True):
        torch.testing.assert_close(ours, torch.stack(expected).mean(0))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(parts[0], plain[0], strict=True))
    assert len(module.taken) == 4 // accumulated
    assert trainer.callback_metrics["jacobian_penalty"] > 0


def test_a_scaled_loss_has_a_scaled_penalty():
    """Half precision multiplies the loss, and divides the gradient before the step."""
    module, data = Classifier(), the_data(8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = pl.Trainer(**CPU, plugins=[plugin], callbacks=[JacobianPenalty(Margin(eps=1.0), weight=5.0)])
    trainer.fit(module, DataLoader(data, batch_size=8))
    weights, taken = module.taken[0]
    for ours, expected in zip(taken, gradients(module, weights, Margin(eps=1.0), 5.0, data[:]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=2e-3)


def test_the_statistics_of_batch_normalisation_are_those_of_training_without_the_penalty():
    states = []
    for callbacks in ([], [JacobianPenalty(Margin(eps=1.0), weight=0.0)]):
        module = Classifier(nn.BatchNorm1d(8))
        pl.Trainer(**CPU, callbacks=callbacks).fit(module, DataLoader(the_data(), batch_size=8))
        states.append(module.model.state_dict())
    torch.testing.assert_close(*states)


def test_multipliers_climb_with_the_steps_and_go_on_from_a_checkpoint():
    constraint, module = Lagrangian(penalty=Margin(eps=1.0), rate=0.5, damping=1.0), Classifier()
    callback = JacobianPenalty(constraint, weight=1.0)
    trainer = pl.Trainer(**CPU, callbacks=[callback])
    trainer.fit(module, DataLoader(the_data(), batch_size=8))
    assert constraint.multiplier > 0
    again = Lagrangian(penalty=Margin(eps=1.0), rate=0.5, damping=1.0)
    JacobianPenalty(again, weight=1.0).load_state_dict(callback.state_dict())
    assert again.multiplier == constraint.multiplier


def test_the_random_numbers_go_on_from_a_checkpoint(tmp_path):
    def fitted(epochs, **options):
        module = Classifier()
        callback = JacobianPenalty(Frobenius(eps=2.0, probes=1), weight=1.0)
        trainer = pl.Trainer(**CPU | {"max_epochs": epochs}, callbacks=[callback])
        trainer.fit(module, DataLoader(the_data(), batch_size=8), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.model.state_dict()

    whole = fitted(2)
    fitted(1)
    resumed = fitted(2, ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Features(Classifier):
    def forward(self, images):
        return self.model(images), images

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("module", "message"),
    [(Manual(), "with manual optimization add penalty"), (Features(), "Features.forward: it has to return logits")],
)
def test_what_cannot_work_is_refused_in_one_line(module, message):
    trainer = pl.Trainer(**CPU, callbacks=[JacobianPenalty(Margin(eps=1.0), weight=1.0)])
    with pytest.raises(UserError, match=message):
        trainer.fit(module, DataLoader(the_data(), batch_size=8))


def test_sharded_parameters_and_senseless_options_are_refused():
    callback = JacobianPenalty(Margin(eps=1.0), weight=1.0)
    trainer = pl.Trainer(**CPU)
    trainer.strategy.__class__, was = FSDPStrategy, trainer.strategy.__class__
    try:
        with pytest.raises(UserError, match="FSDPStrategy shards the parameters; give strategy=ddp"):
            callback.setup(trainer, Classifier(), "fit")
    finally:
        trainer.strategy.__class__ = was
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="weight: give a finite number"):
            JacobianPenalty(Margin(eps=1.0), weight=weight)
    with pytest.raises(UserError, match="images: give a number of at least 1"):
        RobustnessMonitor(eps=0.1, images=0)


@pytest.mark.parametrize("split", [None, lambda batch: (batch["pixels"], batch["class"])])
def test_a_batch_of_another_kind_needs_a_split(split):
    samples = [{"pixels": images, "class": labels} for images, labels in the_data()]
    batches = DataLoader(samples, batch_size=8)

    class OfMappings(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["pixels"]), batch["class"])

    callback = JacobianPenalty(Margin(eps=1.0), weight=1.0, **({"split": split} if split else {}))
    trainer = pl.Trainer(**CPU, callbacks=[callback])
    if split is None:
        with pytest.raises(UserError, match="pass split=FUNCTION"):
            trainer.fit(OfMappings(), batches)
    else:
        trainer.fit(OfMappings(), batches)
        assert trainer.global_step == 4


@pytest.mark.parametrize("inference_mode", [True, False])
def test_robust_accuracy_is_that_of_the_attack_on_the_first_validation_images(inference_mode):
    module, data = Classifier(), the_data(40)
    monitor = RobustnessMonitor(eps=0.05, images=20)
    trainer = pl.Trainer(**CPU, inference_mode=inference_mode, callbacks=[monitor])
    trainer.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=16))
    images, labels = data[:20]
    model = module.model.eval()
    attack = attacks.PGD(name="pgd", eps=(0.05,), norm="linf", steps=20, step_size=0.05 / 8)
    torch.manual_seed(0)
    parts = zip(images.split(16), labels.split(16), strict=True)
    adversarial = torch.cat([attack.perturb(model, *part, 0.05) for part in parts])
    expected = (model(adversarial).argmax(-1) == labels).float().mean().item()
    assert trainer.callback_metrics["robust_accuracy"].item() == pytest.approx(expected)
    assert trainer.callback_metrics["robust_accuracy"] < trainer.callback_metrics["accuracy"]


def test_the_monitor_leaves_the_training_as_it_was_and_can_be_waited_for(tmp_path):
    weights = []
    for monitors in ([], [RobustnessMonitor(eps=0.05, images=10)]):
        module = Classifier(nn.Dropout(0.5))
        torch.manual_seed(5)
        stopping = [pl.callbacks.EarlyStopping("robust_accuracy", mode="max", patience=5)] if monitors else []
        trainer = pl.Trainer(**CPU | {"max_epochs": 2}, callbacks=[*monitors, *stopping])
        trainer.fit(module, DataLoader(the_data(), batch_size=8, shuffle=True), DataLoader(the_data(), batch_size=16))
        assert module.training or not monitors
        weights.append(module.model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes_have_the_gradient_and_the_multipliers_of_one(accumulated, tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(ROOT / "tests" / "several_processes.py"), str(tmp_path), str(accumulated)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    data = the_data(16)[:]
    expected = gradients(Classifier(), first["weights"], Margin(eps=1.0), 0.7, data)
    for ours, others, one in zip(first["gradients"], second["gradients"], expected, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours, others)
    assert torch.equal(first["multipliers"], second["multipliers"])
    assert first["robust_accuracy"] == second["robust_accuracy"]
    if accumulated == 1:  # one batch, and one step of the ascent
        model = Classifier()
        model.model.load_state_dict(first["weights"])
        constraint, inputs = Lagrangian(penalty=Margin(eps=1.0), rate=0.5, damping=1.0), data[0].requires_grad_()
        constraint(model(inputs), inputs, data[1])
        constraint.step()
        torch.testing.assert_close(first["multipliers"], constraint.multipliers)

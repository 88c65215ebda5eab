import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from jacobian_robust.training.averaging import MovingAverage

STEPS, DECAY = 6, 0.7


class Network(nn.Module):
    """A weight that learns, one that does not, and buffers of both kinds that must stay what they are."""

    def __init__(self):
        super().__init__()
        self.learns = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((3,), 0.1), requires_grad=False)
        self.register_buffer("mean", torch.full((3,), 0.1307))
        self.register_buffer("index", torch.tensor([3, 5, 7]))

    def forward(self, inputs):
        return (inputs[:, self.index] - self.mean) @ self.learns


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Network()

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


class Weights(pl.Callback):
    """What the training went on with after each step, and the average's kind at the end of each epoch."""

    def __init__(self, average=None):
        self.average = average
        self.passed = []
        self.kinds = set()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.passed.append(pl_module.model.learns.detach().clone())

    def on_train_epoch_end(self, trainer, pl_module):
        if self.average is not None:
            for ours, theirs in zip(self.average.model.parameters(), pl_module.parameters(), strict=True):
                self.kinds.add((ours.device == theirs.device, ours.dtype == theirs.dtype))


def trained(directory, average=None, **options):
    """Two epochs of three steps, with a validation after each."""
    torch.manual_seed(0)
    module, weights = Module(), Weights(average)
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    batches = DataLoader(torch.rand(12, 10, dtype=dtype), batch_size=4)
    callbacks = [average, weights] if average is not None else [weights]
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, default_root_dir=directory, **{"accelerator": "cpu", "devices": 1} | options,
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    assert len(weights.passed) == STEPS
    return module.model.cpu(), weights


def test_the_average_is_a_sum_whose_weights_fall_by_the_decay(tmp_path):
    network, weights = trained(tmp_path, MovingAverage(decay=DECAY), precision="64-true")
    shares = [DECAY ** (STEPS - 1), *((1 - DECAY) * DECAY ** (STEPS - 1 - step) for step in range(1, STEPS))]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, weights.passed, strict=True))
    torch.testing.assert_close(network.learns.detach(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_what_does_not_change_is_its_own_average_to_the_last_digit(tmp_path, decay):
    network, _ = trained(tmp_path, MovingAverage(decay=decay))
    for (name, ours), theirs in zip(network.state_dict().items(), Network().state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) == (name != "learns")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_the_training_goes_on_as_without_an_average(tmp_path, precision):
    """Bit for bit, though the two change places for each validation."""
    _, beside = trained(tmp_path, MovingAverage(decay=DECAY), precision=precision)
    _, alone = trained(tmp_path, precision=precision)
    for ours, theirs in zip(beside.passed, alone.passed, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "accelerator",
    ["cpu", pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))],
)
def test_the_average_is_where_the_weights_are_and_as_precise(tmp_path, accelerator):
    _, weights = trained(tmp_path, MovingAverage(decay=DECAY), precision="64-true", accelerator=accelerator)
    assert weights.kinds == {(True, True)}

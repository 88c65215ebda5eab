"""train.py on two processes: started by torchrun or by Lightning, the loss with the exact norm is one process's."""

import csv
import subprocess
import sys

import pytest
import torch

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.training.train import train

from .conftest import ROOT, composed

OPTIONS = [
    *("data=toy", "model=mlp", "model.inputs=2", "model.classes=3", "data.batch_size=16", "data.training_size=136"),
    *("data.validation_size=40", "trainer.max_epochs=2", "regularizer=frobenius", "eta=constant", "eta.value=0.3"),
    *("optimizer.momentum=0.9", "monitor_images=40", "logger=csv", "trainer.enable_progress_bar=false"),
]
TWO = ["trainer=ddp", "trainer.accelerator=cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def on_two(directory, *overrides, launcher=(), check=True):
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *OPTIONS, *TWO, f"hydra.run.dir={directory}"]
    return subprocess.run([*command, *overrides], check=check, capture_output=True, text=True, timeout=300)


def rows(directory):
    with (directory / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if value and name != "seconds"}
            for row in csv.DictReader(file)
        ]


def weights(directory):
    state_dict = load_checkpoint(directory / "checkpoints" / "last.ckpt").state_dict
    return torch.cat([weight.flatten() for weight in state_dict.values()])


def test_two_processes_of_torchrun_train_what_one_does(tmp_path):
    """Float32: the order of sums differs, and momentum carries it on."""
    done = on_two(tmp_path / "two", launcher=TORCHRUN)
    assert done.stdout.count("2 epochs →") == 1  # one of them speaks
    assert "Traceback" not in done.stderr
    train(composed("train", *OPTIONS, f"output_dir={tmp_path}/one"))
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_lightning_starts_the_second_process_with_an_adversary_a_twin_and_resumes(tmp_path):
    options = ["twin=true", "adversary=pgd", "regularizer.probes=1", "data.batch_size=16"]
    on_two(tmp_path / "pair", *options)
    again = on_two(tmp_path / "pair", *options, "resume=true")
    assert again.stdout.count("trained already") >= 2
    assert (tmp_path / "pair" / "vanilla" / "summary.json").is_file()


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused_in_one_line(tmp_path):
    done = on_two(tmp_path / "run", "data.batch_size=15", launcher=TORCHRUN, check=False)
    assert "error: data.batch_size=15 cannot be split evenly over 2 processes" in done.stderr

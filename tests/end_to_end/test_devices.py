"""train.py on two processes: started by torchrun or by Lightning, the loss with the exact norm is one process's."""

import csv
import signal
import socket
import subprocess
import sys
import time

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


def torchrun(directory, program):
    """Return what torchrun's processes print."""
    done = on_two(directory, launcher=TORCHRUN)
    assert "Traceback" not in done.stderr
    return done.stdout


def begun(directory, program, *overrides):
    """Start two processes that find what torchrun would tell them, and need not import all anew; return their log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
    log = directory.with_suffix(".log")
    options = [*OPTIONS, *TWO, f"hydra.run.dir={directory}", *overrides]
    return [program("train", *options, log=log, RANK=rank, LOCAL_RANK=rank, **told) for rank in ("0", "1")], log


def forked(directory, program, *overrides, status=0):
    """Return what two such processes print until they end."""
    both, log = begun(directory, program, *overrides)
    assert [process.wait(300) for process in both] == [status] * 2, log.read_text()
    return log.read_text()


def rows(directory):
    with (directory / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if value and name != "seconds"}
            for row in csv.DictReader(file)
        ]


def weights(directory):
    state_dict = load_checkpoint(directory / "checkpoints" / "last.ckpt").state_dict
    return torch.cat([weight.flatten() for weight in state_dict.values()])


@pytest.mark.parametrize("launched", [forked, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_of_torchrun_train_what_one_does(tmp_path, program, launched):
    """Float32: the order of sums differs, and momentum carries it on."""
    printed = launched(tmp_path / "two", program)
    assert printed.count("2 epochs →") == 1  # one of them speaks
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


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_ends_both_with_a_checkpoint_to_go_on_from(tmp_path, program):
    options = ["trainer.max_epochs=30", "checkpoints.every_steps=1"]
    both, log = begun(tmp_path / "run", program, *options)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        assert all(process.poll() is None for process in both), log.read_text()
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in both] == [143, 143], log.read_text()
    assert "resume=true" in log.read_text()
    assert load_checkpoint(checkpoint).epochs < 30
    forked(tmp_path / "run", program, *options, "resume=true")
    assert len(rows(tmp_path / "run")) == 30


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_of_two_processes_ends_both_in_one_line(tmp_path, program):
    diverging = "model._target_=tests.end_to_end.models.DivergingInOne"
    printed = forked(tmp_path / "run", program, diverging, status=1)
    assert printed.count("error: training diverged: the loss of 3 steps in a row was not finite") == 2
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_head_that_plays_no_part_in_the_loss_is_told_and_the_strategy_it_names_trains(tmp_path, program):
    idle = "model._target_=tests.end_to_end.models.WithIdleHead"
    printed = forked(tmp_path / "run", program, idle, status=1)
    assert "error: model: some of its weights play no part in the loss" in printed
    assert "Traceback" not in printed
    forked(tmp_path / "again", program, idle, "trainer.strategy=ddp_find_unused_parameters_true")
    assert (tmp_path / "again" / "summary.json").is_file()

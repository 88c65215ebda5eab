"""train.py on two processes against one: the same numbers, and the same answers to whatever ends a run."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.training.train import train

from .conftest import ROOT, composed

# Of 148 images 49 at a time: the last batch of an epoch is a single one, of which the second process has none.
OPTIONS = [
    *("data.validation_size=59852", "data.batch_size=49", "trainer.max_epochs=3", "trainer.limit_val_batches=2"),
    *("regularizer.probes=1", "amortization.fraction=0.3", "amortization.every=2", "eta=constant", "eta.value=0.3"),
    *("optimizer.momentum=0.9", "monitor_images=120", "trainer.precision=64-true", "checkpoints.every_steps=1"),
    *("logger=csv", "trainer.enable_progress_bar=false"),
]
TWO = ["trainer=ddp", "trainer.accelerator=cpu"]


def command(directory, *overrides):
    return [sys.executable, str(ROOT / "train.py"), *TWO, *OPTIONS, f"hydra.run.dir={directory}", *overrides]


def on_two(directory, *overrides, check=True):
    return subprocess.run(command(directory, *overrides), check=check, capture_output=True, text=True, timeout=400)


def rows(directory):
    with (directory / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if value and name != "seconds"}
            for row in csv.DictReader(file)
        ]


def weights(directory):
    state_dict = load_checkpoint(directory / "checkpoints" / "last.ckpt").state_dict
    return torch.cat([weight.flatten() for weight in state_dict.values()])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "run"
    done = on_two(directory)
    assert done.stdout.count("3 epochs →") == 1  # one of them speaks
    assert "Traceback" not in done.stderr
    return directory


@pytest.mark.slow
def test_two_processes_train_what_one_does(two, tmp_path):
    """In float64, where only the order of sums differs: eps is 2e-16, and twelve steps with momentum amplify it."""
    train(composed("train", *OPTIONS, f"output_dir={tmp_path}/one"))
    for ours, theirs in zip(rows(two), rows(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    torch.testing.assert_close(weights(two), weights(tmp_path / "one"), rtol=1e-10, atol=1e-12)
    names = ["checkpoints", "config.yaml", "curves.png", "metrics.csv", "model.safetensors", "summary.json"]
    assert sorted(path.name for path in two.iterdir()) == names


@pytest.mark.slow
def test_schedules_and_averages_are_those_of_one_process(tmp_path):
    """The rate of each step, and the average that is measured in parts and stored; bounds as above."""
    added = ["scheduler=cosine", "averaging=ema", "averaging.decay=0.7", "trainer.max_epochs=2"]
    on_two(tmp_path / "two", *added)
    train(composed("train", *OPTIONS, *added, f"output_dir={tmp_path}/one"))
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-10, atol=1e-12)


def begun(directory, *overrides):
    """Start two processes in a group of their own, and return when they have written a checkpoint."""
    process = subprocess.Popen(
        command(directory, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    checkpoint = directory / "checkpoints" / "last.ckpt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.slow
def test_a_killed_group_goes_on_bit_for_bit(two, tmp_path):
    process = begun(tmp_path / "run")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "summary.json").exists()
    on_two(tmp_path / "run", "resume=true")
    assert torch.equal(weights(tmp_path / "run"), weights(two))
    assert rows(tmp_path / "run") == rows(two)


def group_of(process):
    command = ["ps", "-ww", "-o", "pid=,args=", "-g", str(process.pid)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "spawn_main" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, 1, "error")],
)
def test_whatever_ends_one_ends_all_with_one_line(tmp_path, number, status, word):
    """SIGTERM for the process that was called, SIGINT for the whole group as a terminal sends it, SIGKILL for one."""
    process = begun(tmp_path / "run", "trainer.max_epochs=100000")
    children = group_of(process)
    if number == signal.SIGKILL:
        os.kill(children[-1], number)
    else:
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == status
    (line,) = [line for line in stderr.splitlines() if line.startswith(f"{word}: ")]
    assert "Traceback" not in stderr
    assert f"hydra.run.dir={tmp_path}/run and resume=true" in line
    assert ("killed by SIGKILL" in line) == (number == signal.SIGKILL)
    assert not group_of(process)
    metrics = tmp_path / "run" / "metrics.csv"
    epoch = len(rows(tmp_path / "run")) if metrics.is_file() else 0
    process = begun(tmp_path / "run", "trainer.max_epochs=100000", "resume=true")
    while process.poll() is None and (not metrics.is_file() or len(rows(tmp_path / "run")) == epoch):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(rows(tmp_path / "run")) > epoch


@pytest.mark.slow
def test_a_training_that_diverges_on_two_processes_says_so_once(tmp_path):
    done = on_two(tmp_path / "run", "optimizer.lr=1e200", "trainer.max_epochs=30", check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "training diverged" in line
    assert "Traceback" not in done.stderr
    kept = torch.load(tmp_path / "run" / "nonfinite_batch.pt", weights_only=True)
    assert len(kept["inputs"]) == len(kept["labels"]) >= 2


@pytest.mark.slow
def test_a_twin_an_evaluation_and_wandb_after_training_on_two_processes(tmp_path):
    on_two(
        tmp_path / "pair", "twin=true", "evaluate=true", "limit=40", "sanity_images=0", "geometry_images=0",
        "attack.pgd_linf.steps=3", "logger=wandb", "trainer.precision=32-true",
    )  # fmt: skip
    for name in ("vanilla", "frobenius", "evaluation"):
        assert len(list((tmp_path / "pair" / name / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "pair" / "evaluation" / "robustness.json").is_file()
    again = on_two(
        tmp_path / "pair", "twin=true", "evaluate=true", "limit=40", "sanity_images=0", "geometry_images=0",
        "attack.pgd_linf.steps=3", "logger=wandb", "trainer.precision=32-true", "resume=true",
    )  # fmt: skip
    assert again.stdout.count("trained already") == 2

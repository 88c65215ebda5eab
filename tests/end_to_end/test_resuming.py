"""Runs that are interrupted, killed and damaged, and go on as if nothing had happened."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.errors import Terminated, UserError
from jacobian_robust.files import claimed
from jacobian_robust.training.checkpointing import RunCheckpoint, newest_checkpoint
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.train import train

from . import wandb_records
from .conftest import ROOT, SHORT, TOY, composed

OPTIONS = [
    *("regularizer.probes=1", "trainer.max_epochs=3", "trainer.limit_train_batches=7", "trainer.limit_val_batches=2"),
    *("monitor_images=10", "amortization.every=3", "checkpoints.every_steps=2"),
]


def start(directory, *overrides, logger="csv", network=TOY):
    options = [*SHORT, *network, *OPTIONS, f"logger={logger}", f"output_dir={directory}"]
    return train(composed("train", *options, *overrides))


def rows(directory):
    with (directory / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same(directory, whole):
    ours, theirs = (load_checkpoint(place / "checkpoints" / "last.ckpt") for place in (directory, whole))
    for name, weight in theirs.state_dict.items():
        assert torch.equal(weight, ours.state_dict[name]), name
    assert rows(directory) == rows(whole)


@pytest.fixture(scope="module")
def whole(once):
    directory, _ = once("whole", start)
    return directory


class Killed(Exception):
    pass


@pytest.fixture
def dying(monkeypatch):
    """Make the next training die after a step, counted from 1 over all epochs."""

    def after(step):
        steps = []
        original = RobustClassifier.training_step

        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            if len(steps) > step:
                raise Killed
            return original(self, batch, batch_idx)

        monkeypatch.setattr(RobustClassifier, "training_step", training_step)

    return after


@pytest.mark.parametrize("step", [3, 7, 11, 18])
def test_a_run_that_died_goes_on_bit_for_bit(tmp_path, whole, dying, monkeypatch, step):
    """Within the first epoch, at its end, within a later one: with the weights and metrics of the uninterrupted run."""
    with monkeypatch.context():
        dying(step)
        with pytest.raises(Killed):
            start(tmp_path / "run")
        monkeypatch.undo()
    start(tmp_path / "run", "resume=true")
    assert_same(tmp_path / "run", whole)


def test_a_lenet_that_died_goes_on_bit_for_bit(tmp_path, dying, monkeypatch):
    """On real images, within the second epoch."""
    lenet = {"network": ["data=mnist", "model=lenet"]}
    short = ["trainer.max_epochs=2", "trainer.limit_train_batches=4"]
    start(tmp_path / "whole", *short, **lenet)
    dying(6)
    with pytest.raises(Killed):
        start(tmp_path / "run", *short, **lenet)
    monkeypatch.undo()
    start(tmp_path / "run", *short, "resume=true", **lenet)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_dies_again_and_again_goes_on_all_the_same(tmp_path, whole, dying, monkeypatch):
    deaths = 0
    for _ in range(20):
        dying(4)
        try:
            start(tmp_path / "run", "resume=true")
            break
        except Killed:
            deaths += 1
        finally:
            monkeypatch.undo()
    assert deaths >= 5
    assert_same(tmp_path / "run", whole)


def test_the_random_streams_of_a_model_go_on(tmp_path, dying, monkeypatch):
    """Dropout draws from torch's global stream."""
    model = "model._target_=tests.end_to_end.models.WithDropout"
    start(tmp_path / "whole", model)
    dying(9)
    with pytest.raises(Killed):
        start(tmp_path / "run", model)
    monkeypatch.undo()
    start(tmp_path / "run", model, "resume=true")
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        ["adversary=pgd", "adversary.steps=2"],
        ["adversary=trades", "adversary.steps=2", "adversary.penalty_at=adversary"],
        ["adversary=free", "adversary.replays=3"],
        ["adversary=noise", "adversary.penalty_at=adversary"],
    ],
    ids=lambda options: options[0],
)
def test_an_adversary_goes_on_bit_for_bit(tmp_path, dying, monkeypatch, options):
    """Its draws are torch's global stream's; a free one is within its replays when the run dies."""
    start(tmp_path / "whole", *options)
    dying(9)
    with pytest.raises(Killed):
        start(tmp_path / "run", *options)
    monkeypatch.undo()
    start(tmp_path / "run", *options, "resume=true")
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        ["scheduler=one_cycle", "trainer.accumulate_grad_batches=2", "averaging=ema", "averaging.decay=0.9"],
        pytest.param(["scheduler=one_cycle"], marks=pytest.mark.slow),
        pytest.param(["trainer.accumulate_grad_batches=2", "optimizer.momentum=0.9"], marks=pytest.mark.slow),
        pytest.param(["averaging=ema", "averaging.decay=0.9"], marks=pytest.mark.slow),
        pytest.param(["averaging=ema", "averaging.decay=0.9", "trainer.precision=64-true"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_what_can_be_added_to_a_training_goes_on_too(tmp_path, dying, monkeypatch, options):
    start(tmp_path / "whole", *options)
    dying(10)
    with pytest.raises(Killed):
        start(tmp_path / "run", *options)
    monkeypatch.undo()
    start(tmp_path / "run", *options, "resume=true")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_rising_radius_goes_on_bit_for_bit(tmp_path, dying, monkeypatch):
    """The run dies within the rise; the share of each epoch's last step is on record."""
    options = ["eps_schedule=linear", "eps_schedule.fraction=0.9", "eps_schedule.start=0.01"]
    start(tmp_path / "whole", *options)
    dying(9)
    with pytest.raises(Killed):
        start(tmp_path / "run", *options)
    monkeypatch.undo()
    start(tmp_path / "run", *options, "resume=true")
    assert_same(tmp_path / "run", tmp_path / "whole")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        shares = [float(row["eps_share"]) for row in csv.DictReader(file)]
    assert shares == sorted(shares)
    assert 0.01 < shares[0] < 1
    assert shares[-1] == 1


def test_multipliers_go_on_bit_for_bit(tmp_path, dying, monkeypatch):
    options = [*SHORT, *TOY, *(option for option in OPTIONS if "probes" not in option), "logger=csv"]
    options += ["regularizer=lagrangian", "regularizer.penalty.probes=1", "eta=constant", "eta.value=0.5"]
    options += ["eps_schedule=linear", "eps_schedule.fraction=0.9"]  # of the penalty that is constrained

    def start(name, *more):
        train(composed("train", *options, f"output_dir={tmp_path}/{name}", *more))

    start("whole")
    dying(9)
    with pytest.raises(Killed):
        start("run")
    monkeypatch.undo()
    start("run", "resume=true")
    assert_same(tmp_path / "run", tmp_path / "whole")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        multipliers = [float(row["multiplier"]) for row in csv.DictReader(file)]
    assert multipliers[0] > 0
    assert multipliers[1] != multipliers[0]


@pytest.mark.slow
def test_double_precision_goes_on_bit_for_bit(tmp_path, dying, monkeypatch):
    """The weights are loaded before Lightning converts the network."""
    precision = "trainer.precision=64-true"
    start(tmp_path / "whole", precision)
    dying(9)
    with pytest.raises(Killed):
        start(tmp_path / "run", precision)
    monkeypatch.undo()
    start(tmp_path / "run", precision, "resume=true")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, whole, dying, monkeypatch, capsys):
    dying(12)
    with pytest.raises(Killed):
        start(tmp_path / "run")
    monkeypatch.undo()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    start(tmp_path / "run", "resume=true")
    assert "last.ckpt is damaged" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt.damaged").read_bytes() == content
    assert_same(tmp_path / "run", whole)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, whole, monkeypatch):
    original = pl.Trainer.save_checkpoint
    written = []

    def full(self, path, *args, **kwargs):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(self, path, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.raises(UserError, match=r"cannot be written.*No space left.*resume=true"):
        start(tmp_path / "run")
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.ckpt", "previous.ckpt"]
    start(tmp_path / "run", "resume=true")
    assert_same(tmp_path / "run", whole)


def test_sigterm_keeps_the_step_and_says_how_to_go_on(tmp_path, whole, monkeypatch):
    original = RunCheckpoint.on_train_batch_end

    def asked(self, trainer, *args):
        if trainer.global_step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, trainer, *args)

    monkeypatch.setattr(RunCheckpoint, "on_train_batch_end", asked)
    with pytest.raises(Terminated, match=r"hydra.run.dir=.*run and resume=true"):
        start(tmp_path / "run", "checkpoints.every_steps=null")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").epochs == 1
    start(tmp_path / "run", "checkpoints.every_steps=null", "resume=true")
    assert_same(tmp_path / "run", whole)


def test_a_finished_run_is_left_as_it_is_and_another_configuration_is_refused(whole):
    before = (whole / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    metrics = start(whole, "resume=true")
    assert metrics["epoch"] == 3
    assert (whole / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other options"):
        start(whole, "resume=true", "seed=1")


def test_two_processes_cannot_go_on_with_one_run(tmp_path):
    config = {"some": "thing"}
    with (
        claimed(tmp_path, config),
        pytest.raises(UserError, match="in use by another process"),
        claimed(tmp_path, config, resume=True),
    ):
        pass
    with claimed(tmp_path, config, resume=True):
        pass


def test_a_run_of_a_version_in_which_a_class_had_another_place_is_refused_in_one_line(tmp_path):
    old, new = (
        {"eta": {"_target_": f"jacobian_robust.training.{at}.GeometricEta"}} for at in ("callbacks", "schedules")
    )
    with claimed(tmp_path, old):
        pass
    with (
        pytest.raises(
            UserError, match=r"says _target_: \S+callbacks\.GeometricEta, and now it is _target_: \S+schedules"
        ),
        claimed(tmp_path, new, resume=True),
    ):
        pass


@pytest.mark.slow
def test_the_wandb_run_goes_on(tmp_path, dying, monkeypatch):
    dying(9)
    with pytest.raises(Killed):
        start(tmp_path / "run", logger="wandb")
    monkeypatch.undo()
    time.sleep(1)  # W&B names directories by the second
    start(tmp_path / "run", "resume=true", logger="wandb")
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    ids = {record.run.run_id for place in (first, second) for record in wandb_records.read_records(place)} - {""}
    assert len(ids) == 1


def time_of(path):
    """Return when a file was written; 0 where it is not there, as between two checkpoints, which take turns by name."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def killed_in_training(program, directory, *options, after):
    """Kill a training some steps after it has begun; return the step of its last checkpoint.

    It takes its time: on a loaded machine it would be at its end before this process saw that it had begun.
    """
    checkpoint = directory / "checkpoints" / "last.ckpt"
    before = time_of(checkpoint)
    command = [
        *SHORT,
        *TOY,
        *OPTIONS,
        "logger=csv",
        f"hydra.run.dir={directory}",
        *options,
    ]
    process = program("train", *command, log=directory.parent / "log.txt", SECONDS_A_BATCH="0.1")
    written = 0
    while written < after:  # it trains
        assert process.poll() is None, "it ended before it could be killed"
        if (now := time_of(checkpoint)) not in (0, before):
            before, written = now, written + 1
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (directory / "summary.json").exists()
    return torch.load(newest_checkpoint(checkpoint.parent), weights_only=True)["global_step"]


@pytest.mark.parametrize(("kills", "epochs"), [(1, 8), pytest.param(10, 30, marks=pytest.mark.slow)])
def test_sigkill_in_a_training_changes_nothing(tmp_path, program, kills, epochs):
    """Real processes, killed without warning at random steps, then to the end."""
    batches = 7
    generator = random.Random(0)
    options = [f"trainer.max_epochs={epochs}", "checkpoints.every_steps=1"]
    options.append("model._target_=tests.end_to_end.models.Paced")
    reached = [0]
    for _ in range(kills):
        after = generator.randint(3, 10)
        reached.append(killed_in_training(program, tmp_path / "run", *options, "resume=true", after=after))
    assert reached == sorted(set(reached)), "each training went on from where the one before was killed"
    assert reached[-1] < epochs * batches
    begun = time_of(tmp_path / "run" / "checkpoints" / "last.ckpt")
    start(tmp_path / "run", *options, "resume=true")
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_mtime_ns > begun
    start(tmp_path / "whole", *options)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_killed_at_random_moments_ends_the_same(tmp_path, processes):
    """Also if several processes shared it, and one goes on alone."""
    checkpoint = ROOT / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"
    options = ["attack=[fgsm,pgd_linf]", "limit=400", "sanity_images=0", "geometry_images=0", "reliability=false"]

    def command(directory, *more):
        door = [sys.executable, str(ROOT / "evaluate.py"), f"checkpoint={checkpoint}", *options, "logger=csv"]
        return [*door, f"hydra.run.dir={directory}", *more]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    progress = tmp_path / "parted" / "progress" / "0_linf.pt"
    generator = random.Random(0)
    kills = 0
    for _ in range(5):
        process = subprocess.Popen(
            command(tmp_path / "parted", "resume=true", f"processes={processes}"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not progress.exists():
            time.sleep(0.1)
        try:
            process.wait(timeout=generator.uniform(2, 8))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    subprocess.run(command(tmp_path / "parted", "resume=true"), check=True, capture_output=True)
    assert kills >= 2
    for name in ("robustness.json", "images.csv"):
        assert (tmp_path / "parted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

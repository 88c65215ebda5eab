"""A mistake ends in one clear line that names it, with a non-zero status, before any work, and nothing is lost."""

import gzip
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.files import claimed

from .conftest import ROOT, SHORT, TOY

TRAIN = [
    (["eta.mx=0.006"], "eta.mx", "mx"),
    (["regularizer=frobenious"], "frobenious", "frobenius"),
    (["optimiser=sgd"], "optimiser", ""),
    (["experiment=nothing"], "nothing", "quickstart"),
    (["+regularizer.strength=3"], "regularizer.strength", "unexpected"),
    (["eta.max=1.5"], "eta.max", "less than or equal to 1"),
    (["eta.min=-0.1"], "eta.min", "greater than or equal to"),
    (["eta.min=0.1", "eta.max=0.01"], "min=0.1 is larger than max=0.01", "eta"),
    (["eta=constant", "eta.value=2"], "eta.value", "less than or equal to 1"),
    (["eta.max=high"], "eta.max", "valid number"),
    (["regularizer.eps=0", "regularizer.delta_over_eps=null"], "regularizer.eps", "greater than or equal to 0.000001"),
    (["regularizer.eps=1"], "both are set", "regularizer"),
    (["regularizer.delta_over_eps=null"], "neither is set", "regularizer"),
    (["regularizer.cap=0"], "regularizer.cap", "greater than 0"),
    (["regularizer=spectral", "regularizer.columns=0"], "regularizer.columns", "greater than 0"),
    (["regularizer=spectral", "regularizer.tolerance=0"], "regularizer.tolerance", "greater than or equal to 0.000001"),
    (["amortization.every=0"], "amortization.every", "greater than 0"),
    (["amortization.fraction=1.5"], "amortization.fraction", "less than or equal to 1"),
    (["amortization.often=2"], "amortization.often", "often"),
    (["regularizer.probes=0"], "regularizer.probes", "greater than 0"),
    (["regularizer.chart=flat"], "regularizer.chart", "'stereographic' or 'sphere'"),
    (["model.classes=0"], "model.classes", "greater than or equal to 1"),
    (["model.image_size=4"], "model.image_size", "greater than or equal to 6"),
    (["model.classes=5"], "model.classes=5", "10 classes"),
    (["model.image_size=32"], "model", "give model.image_size=28"),
    (["model.activation=swish"], "model.activation", "'silu'"),
    (["model=resnet18"], "shape (1, 28, 28)", "give model.channels=1"),
    (["model=mlp", "model.classes=10"], "shape (1, 28, 28)", "give model.inputs=784"),
    (["optimizer.lr=-1"], "optimizer", "learning rate"),
    (["optimizer.lr=fast"], "optimizer", ""),
    (["scheduler=cosine", "scheduler.warmup=1"], "scheduler.warmup", "less than 1"),
    (["scheduler=multistep", "scheduler.milestones=[20,30]"], "scheduler.milestones.0", "less than 1"),
    (["scheduler=multistep", "scheduler.milestones=[0.7,0.2]"], "scheduler.milestones", "ascending"),
    (["averaging=ema", "averaging.decay=1"], "averaging.decay", "less than 1"),
    (["averaging=ema", "trainer.precision=bf16-true"], "averaging", "give trainer.precision=bf16-mixed"),
    (["scheduler=cosign"], "cosign", "one_cycle"),
    (["data.batch_size=0"], "data.batch_size", "greater than 0"),
    (["data.validation_size=60000"], "data.validation_size=60000", "60000"),
    (["data.validate_on_test=true"], "data.validate_on_test", "data.validation_size=0"),
    (["data.root=/nonexistent"], "/nonexistent", "data.root"),
    (["trainer.max_epochs=0"], "trainer.max_epochs", "greater than 0"),
    (["trainer.max_epochs=-1"], "trainer.max_epochs", "greater than 0"),
    (["data=cifar10"], "shape (3, 32, 32)", "give model.channels=3 model.image_size=32"),
    (["trainer.accelerator=abacus"], "trainer", "abacus"),
    (["trainer.limit_train_batches=0"], "trainer.limit_train_batches", "nothing to train on"),
    (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches", "greater than 0"),
    (["+trainer.val_check_interval=5000"], "trainer.val_check_interval=5000", "an epoch has 1719 batches"),
    (["+trainer.overfit_batches=2"], "trainer.overfit_batches", "set by the framework"),
    (["data=image_folder"], "data.root is missing", "train/CLASS"),
    (["data=tensors"], "data.file is missing", ".npz"),
    (["trainer.precision=7-bit"], "trainer", "precision"),
    (["+trainer.speed=3"], "trainer", "speed"),
    (["+trainer.callbacks=[]"], "trainer.callbacks", "set by the framework"),
    (["+trainer.fast_dev_run=true"], "trainer.fast_dev_run", "set by the framework"),
    (["adversary=pdg"], "pdg", "pgd"),
    (["adversary=pgd", "adversary.eps=0"], "adversary.eps", "greater than 0"),
    (["adversary=pgd", "adversary.stps=3"], "adversary.stps: there is no such option", "--help"),
    (["adversary=noise", "adversary.fit_at=clean"], "adversary", "adversary.penalty_at=adversary"),
    (["adversary=free", "adversary.replays=0"], "adversary.replays", "greater than 0"),
    (["adversary._target_=builtins.dict"], "adversary", ""),
    (["eps_schedule=linear", "eps_schedule.start=0"], "eps_schedule.start", "greater than 0"),
    (["eps_schedule=linear", "eps_schedule.fraction=2"], "eps_schedule.fraction", "less than or equal to 1"),
    (["eps_schedule=linear", "regularizer=hoffman"], "LogitJacobian has no radius", "eps_schedule=none"),
    (["eps_schedule=linear", "regularizer=none"], "eps_schedule", "eps_schedule=none"),
    (["regularizer=linear_margin", "regularizer.norm=l1"], "regularizer.norm", "'linf' or 'l2'"),
    (["regularizer=lagrangian", "regularizer.rate=0"], "regularizer.rate", "greater than 0"),
    (["regularizer=lagrangian", "regularizer.penalty.eps=-1"], "regularizer.penalty.eps", "greater than"),
    (["regularizer=vat", "regularizer.xi=0"], "regularizer.xi", "greater than 0"),
    (["regularizer=curvature", "regularizer.h=-1"], "regularizer.h", "greater than 0"),
    (["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn", "ddp"),
    (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=0"], "trainer", "devices"),
    (["processes=0", "evaluate=true"], "processes", "greater than 0"),
    (["name=../escaped"], "name", "pattern"),
    (["twin=true", "name=vanilla"], "name=vanilla", "another name"),
    (["~eta"], "eta is empty", "conf/eta"),
    (["~model"], "model is empty", "conf/model"),
    (["eta._target_=builtins.dict"], "eta._target_", "EtaSchedule"),
    (["seed=-1"], "seed", "greater than or equal to 0"),
    (["seed=zero"], "seed", "integer"),
    (["monitor_images=-1"], "monitor_images", "greater than or equal to 0"),
    (["logger.offline=perhaps"], "logger.offline", "boolean"),
    (["logger.projekt=x"], "logger.projekt", ""),
    (["ckpt_path=missing.ckpt"], "missing.ckpt", "no such file"),
    (["twin=true", "regularizer=none"], "twin", "regularizer"),
    (["evaluate=true", "attack.pgd_linf.eps=[-0.1]"], "attack.pgd_linf.eps", "greater than or equal to 0"),
    (["evaluate=true", "attack.pgd_linf.steps=0"], "attack.pgd_linf.steps", "greater than 0"),
    (["evaluate=true", "split=train"], "split", "'test' or 'validation'"),
    (["evaluate=true", "split=validation", "data.validation_size=0"], "data.validation_size=0", "split=test"),
    (["evaluate=true", "limit=0"], "limit", "greater than 0"),
    (["evaluate=true", "attack.steps=5"], "attack.steps: there is no such option", "attack.pgd_linf.steps"),
    (["regularizer.probs=1"], "regularizer.probs: there is no such option", "--help"),
    (["evaluate=true", "sanity_source=nowhere"], "sanity_source=nowhere", "null for none"),
    (
        ["evaluate=true", "attack=[pgd_linf,transfer]", "attack.transfer.source=nowhere"],
        "attack.transfer.source=nowhere",
        "no such file",
    ),
    (["evaluate=true", f"sanity_source={ROOT}/README.md"], "README.md", "checkpoint"),
    (["evaluate=true", "attack=transfer", f"attack.transfer.source={ROOT}/README.md"], "README.md", "checkpoint"),
    (["evaluate=true", "attack=transfer"], "no other model", "attack.transfer.source=CHECKPOINT"),
    (["regularizer.outputs=probabilities"], "regularizer.outputs=probabilities", "model.double_softmax=true"),
    (["experiment=toy", "evaluate=true", "attack=[pgd_l2,autoattack]"], "need 4 classes or more", "parts=[apgd-ce]"),
    (["evaluate=true", "sanity_images=-1"], "sanity_images", "greater than or equal to 0"),
    (["evaluate=true", "~attack"], "attack is empty", "conf/attack"),
]


ALIKE = [
    *("eta.min=-0.1", "eta=constant eta.value=2", "regularizer.cap=0", "regularizer=spectral regularizer.tolerance=0"),
    *("amortization.every=0", "amortization.fraction=1.5", "amortization.often=2", "model.classes=0"),
    *("scheduler=multistep scheduler.milestones=[0.7,0.2]", "trainer.max_epochs=-1", "+trainer.callbacks=[]"),
    *("trainer.accumulate_grad_batches=0", "+trainer.fast_dev_run=true", "adversary=free adversary.replays=0"),
    *("eps_schedule=linear eps_schedule.fraction=2", "regularizer=vat regularizer.xi=0", "scheduler=cosign"),
    *("regularizer=curvature regularizer.h=-1", "processes=0 evaluate=true", "monitor_images=-1", "adversary=pdg"),
    *("regularizer=lagrangian regularizer.rate=0", "evaluate=true attack.pgd_linf.steps=0", "evaluate=true limit=0"),
    *("evaluate=true sanity_images=-1", "averaging=ema averaging.decay=1", "~eta", "experiment=nothing"),
    f"evaluate=true attack=transfer attack.transfer.source={ROOT}/README.md",
]
"""Those that are found as another of the list is, by the same rule of a signature: slow tests."""


def alike(options):
    """Mark what is in :data:`ALIKE` as slow."""
    named = [(*case, " ".join(case[0])) for case in options]
    return [pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in ALIKE else []) for *case, name in named]


@pytest.mark.parametrize(("overrides", "name", "remedy"), alike(TRAIN))
def test_wrong_training_options(refusal, tmp_path, overrides, name, remedy):
    line = refusal("train", *overrides)
    assert name in line
    assert remedy in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


WHERE = [
    ["eta.mx=0.006"],  # Hydra
    ["regularizer=frobenious"],
    ["eta.max=1.5"],  # the signature of what is built
    ["model.image_size=32"],  # the network, given an image
    ["data.root=/nonexistent"],  # the files
    ["trainer.accelerator=abacus"],  # Lightning
    ["seed=-1"],  # the options of a run
    ["twin=true", "name=vanilla"],  # that contradict one another
    ["evaluate=true", "attack.pgd_linf.eps=[-0.1]"],  # an attack
    ["~model"],
]
"""Wrong options by where they are found."""


@pytest.mark.parametrize("overrides", WHERE, ids=" ".join)
def test_wrong_training_options_end_the_program_in_one_line(door, tmp_path, overrides):
    ((name, remedy),) = [known[1:] for known in TRAIN if known[0] == overrides]
    result = door("train", *overrides, "hydra.run.dir=runs/mine")
    assert result.status == 1
    assert name in result.error
    assert remedy in result.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["eta=null"], "eta=null"),  # Hydra raises a ValueError
        (["regularizer=none", "eta.max=0.1"], "eta.max: regularizer=none has no penalty for it"),
        (["regularizer=none", "amortization.every=2"], "amortization.every: regularizer=none has no penalty for it"),
    ],
)
def test_what_only_the_command_line_tells_ends_the_program_in_one_line(door, tmp_path, overrides, name):
    result = door("train", *overrides, "hydra.run.dir=run")
    assert result.status == 1
    assert name in result.error
    assert not (tmp_path / "run").exists()


GOOD = ROOT / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"

EVALUATE = [
    ([], "checkpoint=RUN_OR_FILE is missing", ""),
    (["checkpoint=nowhere"], "checkpoint=nowhere", "no such file"),
    (["checkpoint=GOOD", "attack=pdg"], "pdg", "pgd_linf"),
    (["checkpoint=GOOD", "attack.pgd_linf.eps=[]"], "attack.pgd_linf.eps", "at least 1"),
    (["checkpoint=GOOD", "attack.pgd_linf.eps=[0.1,-1]"], "attack.pgd_linf.eps", "greater than or equal to 0"),
    (["checkpoint=GOOD", "attack.pgd_linf.steps=0"], "attack.pgd_linf.steps", "greater than 0"),
    (["checkpoint=GOOD", "attack.pgd_linf.restarts=0"], "attack.pgd_linf.restarts", "greater than 0"),
    (["checkpoint=GOOD", "attack.pgd_linf.step_size=-1"], "attack.pgd_linf.step_size", "greater than 0"),
    (["checkpoint=GOOD", "attack.pgd_linf.norm=l3"], "attack.pgd_linf.norm", "'linf' or 'l2'"),
    (["checkpoint=GOOD", "suite=quick", "attack=fgsm"], "attack.pgd_linf has options", "was not chosen"),
    (["checkpoint=GOOD", "limit=-3"], "limit", "greater than 0"),
    (["checkpoint=GOOD", "diagnostics=everything"], "diagnostics/everything", "simplifications"),
    (
        ["checkpoint=GOOD", "diagnostics=simplifications", "diagnostics.images=0"],
        "diagnostics.images",
        "greater than 0",
    ),
    (["checkpoint=GOOD", "model=lenet", "model.classes=7"], "another architecture", "size mismatch"),
    (["checkpoint=GOOD", "data=mnist", "data.root=/nonexistent"], "/nonexistent", "data.root"),
]


@pytest.mark.parametrize(
    ("overrides", "name", "remedy"), EVALUATE, ids=[" ".join(o) or "nothing" for o, *_ in EVALUATE]
)
def test_wrong_evaluation_options(refusal, tmp_path, overrides, name, remedy):
    (tmp_path / "data").mkdir()  # an empty folder of that name does not hide the shipped data
    line = refusal("evaluate", *[o.replace("GOOD", str(GOOD)) for o in overrides], "logger=csv")
    assert name in line
    assert remedy in line
    assert "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # so that the mended command may use the directory


@pytest.mark.parametrize("overrides", [EVALUATE[0][0], EVALUATE[2][0], EVALUATE[5][0]], ids=" ".join)
def test_wrong_evaluation_options_end_the_program_in_one_line(door, tmp_path, overrides):
    ((name, remedy),) = [known[1:] for known in EVALUATE if known[0] == overrides]
    result = door("evaluate", *[o.replace("GOOD", str(GOOD)) for o in overrides], "logger=csv", "hydra.run.dir=run")
    assert result.status == 1
    assert name in result.error
    assert remedy in result.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [lambda good: b"", lambda good: good[: len(good) // 2], lambda good: b"#!/bin/sh\necho hello\n"],
    ids=["empty", "truncated", "foreign"],
)
def test_damaged_checkpoints(tmp_path, trained, content):
    good = (trained.directory / "vanilla" / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "bad.ckpt").write_bytes(content(good))
    with pytest.raises(UserError, match=r"bad\.ckpt cannot be read"):
        load_checkpoint(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(("program", "option"), [("train", "ckpt_path"), ("evaluate", "checkpoint")])
def test_a_damaged_checkpoint_ends_the_program_in_one_line(door, tmp_path, program, option):
    (tmp_path / "bad.ckpt").write_bytes(b"")
    result = door(program, f"{option}=bad.ckpt", "hydra.run.dir=run")
    assert result.status == 1
    assert "bad.ckpt cannot be read" in result.error


def test_a_checkpoint_of_something_else(door, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    assert "name the classifier they belong to" in door("evaluate", "checkpoint=other.ckpt").error
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "was not written by jacobian_robust" in door("evaluate", "checkpoint=list.ckpt").error


def test_an_empty_directory_of_checkpoints(door, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no .ckpt or .safetensors file" in door("evaluate", "checkpoint=empty").error


def test_going_on_from_a_finished_run_or_another_network(door, trained):
    checkpoint = trained.directory / "vanilla" / "checkpoints" / "last.ckpt"
    assert "raise trainer.max_epochs above 2" in door("train", f"ckpt_path={checkpoint}", "trainer.max_epochs=2").error
    faster = door("train", *SHORT, f"ckpt_path={checkpoint}", "optimizer.lr=0.5", "trainer.max_epochs=9")
    assert "optimizer.lr was 0.1 and is 0.5" in faster.error
    assert "stands for 2 checkpoints" in door("train", f"ckpt_path={trained.directory}").error


@pytest.mark.parametrize("file", ["config.yaml", "metrics.csv", "robustness.json", "report.html"])
def test_results_are_never_overwritten(tmp_path, file):
    (tmp_path / file).write_text("precious")
    with pytest.raises(UserError, match=rf"already holds a result \({file}\)"), claimed(tmp_path, {"some": "thing"}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "precious"


def test_neither_program_overwrites_results(door, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.html").write_text("precious")
    message = "already holds a result (report.html)"
    assert message in door("train", *SHORT, "logger=csv", "hydra.run.dir=run").error
    assert message in door("evaluate", f"checkpoint={GOOD}", "hydra.run.dir=run").error
    assert [path.name for path in run.iterdir()] == ["report.html"]
    assert (run / "report.html").read_text() == "precious"


def test_a_directory_that_cannot_be_written(door, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in door("train", "hydra.run.dir=file/run").error


def test_damaged_data(door, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    shutil.copytree(ROOT / "data" / "MNIST" / "raw", raw)
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"nonsense"))
    result = door("train", "hydra.run.dir=run")
    assert "train-labels-idx1-ubyte.gz is damaged" in result.error


def test_what_lightning_and_wandb_refuse_is_one_line_too(door):
    tiny = door("train", *SHORT, "logger=csv", "regularizer=none", "trainer.limit_train_batches=0.00001")
    assert "trainer: " in tiny.error
    slash = door("train", *SHORT, "logger.project=a/b", "regularizer=none", "trainer.limit_train_batches=1")
    assert "logger: " in slash.error


@pytest.mark.usefixtures("forking")
def test_a_sweep_runs_its_other_jobs_and_fails_in_the_end(door, tmp_path):
    result = door(
        "train", "-m", "eta.max=0.006,7", "regularizer.probes=1", *SHORT, *TOY, "logger=csv", "trainer.max_epochs=1",
        "trainer.limit_train_batches=1", "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert result.status == 1
    assert "eta.max" in result.error
    assert len(list((tmp_path / "sweep").rglob("summary.json"))) == 1


def test_an_interrupted_run_keeps_its_last_checkpoint_and_says_how_to_go_on(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*SHORT, *TOY, "logger=csv", "regularizer=none", "hydra.run.dir=run"]
    command += ["trainer.limit_train_batches=3", "trainer.max_epochs=100000"]
    process = program("train", *command, log=tmp_path / "log.txt")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for _ in range(600):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    status, printed = process.wait(60), (tmp_path / "log.txt").read_text()
    assert status == 130, printed
    assert "hydra.run.dir=run and resume=true" in printed
    assert "Traceback" not in printed
    assert torch.load(checkpoint, weights_only=True)["jacobian_robust"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_two_kinds_of_budgets_for_one_attack_are_refused(door):
    budgets = ["attack=pgd_l2", "attack.pgd_l2.eps=[0.5]", "attack.pgd_l2.eps_linf=[0.1]"]
    place = f"checkpoint={GOOD}"
    refused = door("evaluate", place, *budgets, "hydra.run.dir=never")
    assert refused.status == 1
    assert refused.stderr == "error: attack.pgd_l2.eps_linf takes the place of attack.pgd_l2.eps: give one of them\n"
    assert not Path("never").exists()

"""Files of strangers run no code and write nowhere, secrets stay where they are, and reports escape what they show."""

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation import journal as journal_of
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.models import LeNet
from jacobian_robust.reporting.compare import compare
from jacobian_robust.training.train import train

from .conftest import ROOT, SHORT, composed
from .test_evaluation import ATTACK

TINY = [*SHORT, "regularizer.probes=1", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]


class Malicious:
    """Unpickled, it leaves a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def poisoned(kind, trace, path):
    """Write a file of a kind of checkpoint that runs code when it is unpickled."""
    bad = Malicious(trace)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bad))
    elif kind == "torch.save":
        torch.save({"state_dict": {"weight": torch.zeros(1)}, "jacobian_robust": bad}, path)
    elif kind == "old torch.save":
        torch.save(bad, path, _use_new_zipfile_serialization=False)
    elif kind == "weights":
        torch.save(LeNet().state_dict() | {"extra": bad}, path)
    elif kind == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(LeNet(), torch.rand(2, 1, 28, 28)).save(path)
        rewritten(path, lambda name: pickle.dumps(bad, 2) if name.endswith((".pkl", ".debug_pkl")) else None)
    elif kind == "torch.export":
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(LeNet(), (torch.rand(2, 1, 28, 28),), dynamic_shapes=shapes), path)
        rewritten(path, lambda name: pickle.dumps(bad) if name.endswith((".pt", ".pkl")) else None)
    return path


def rewritten(path, change):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(name) or content)


KINDS = ["pickle", "torch.save", "old torch.save", "weights", "TorchScript", "torch.export"]


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_malicious_pickle_is_refused_under_whatever_name(kind, suffix, tmp_path):
    trace = tmp_path / "ran"
    path = poisoned(kind, trace, tmp_path / f"theirs{suffix}")
    with pytest.raises(UserError, match="theirs"):
        load_checkpoint(path)
    options = ["logger=csv", "data=mnist", "model=lenet", f"output_dir={tmp_path}/results"]
    with pytest.raises(UserError, match="theirs"):
        evaluate(composed("evaluate", *ATTACK, f"checkpoint={path}", *options))
    with pytest.raises(UserError, match="theirs"):
        train(composed("train", *TINY, f"ckpt_path={path}", "logger=csv", f"output_dir={tmp_path}/run"))
    assert not trace.exists()
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "run").exists()


def test_the_malicious_pickle_would_run_if_it_were_trusted(tmp_path):
    """Else its refusal would prove nothing."""
    path = poisoned("torch.save", tmp_path / "ran", tmp_path / "theirs.pt")
    with pytest.raises(UserError):
        load_checkpoint(path, trust=True)
    assert (tmp_path / "ran").exists()


class WritingScript(torch.nn.Module):
    """TorchScript without any pickle of its own, whose operators write a file."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10] * torch.from_file(self.path, shared=True, size=4)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_script_that_writes_a_file_is_not_run_untrusted(tmp_path):
    torch.jit.script(WritingScript(str(tmp_path / "ran"))).save(tmp_path / "theirs.pt")
    with pytest.raises(UserError, match="TorchScript program, which could do anything"):
        load_checkpoint(tmp_path / "theirs.pt")
    assert not (tmp_path / "ran").exists()
    load_checkpoint(tmp_path / "theirs.pt", trust=True).model()(torch.rand(2, 1, 28, 28))
    assert (tmp_path / "ran").exists(), "else its refusal would prove nothing"


@pytest.mark.parametrize("name", ["last.ckpt", "previous.ckpt"])
def test_a_malicious_checkpoint_in_a_run_directory_is_not_gone_on_with(name, tmp_path):
    options = [*TINY, "logger=csv", f"output_dir={tmp_path}/run"]
    train(composed("train", *options))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    poisoned("torch.save", tmp_path / "ran", tmp_path / "run" / "checkpoints" / name)
    with pytest.raises((UserError, pickle.UnpicklingError)) as refusal:
        train(composed("train", *options, "resume=true"))
    assert refusal.type is UserError
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "old torch.save", "truncated", "another state"])
def test_a_malicious_or_damaged_progress_of_an_evaluation_is_refused(kind, tmp_path):
    journal = journal_of.FileJournal(tmp_path / "progress" / "0_linf.pt", {})
    if kind == "truncated":
        journal.path.write_bytes(b"PK\x03\x04")
    elif kind == "another state":
        torch.save({"identity": journal.identity}, journal.path)
    else:
        poisoned(kind, tmp_path / "ran", journal.path)
    with pytest.raises(UserError, match=r"0_linf\.pt cannot be read"):
        journal.load()
    assert not (tmp_path / "ran").exists()


def changed(trained, path, **config):
    """Write a training's weights with another configuration beside them."""
    stored = torch.load(trained.directory / "vanilla" / "checkpoints" / "last.ckpt", weights_only=True)
    stored["jacobian_robust"]["config"] |= config
    torch.save(stored, path)
    return path


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "builtins.eval", "subprocess.Popen", "torch.load", "jacobian_robust.models.nn.Linear"),
        *("jacobian_robust.models.itertools.count", "jacobian_robust.data.Path", "mylab.Net", "", "..", 5, None),
    ],
)
@pytest.mark.parametrize("group", ["model", "data"])
def test_a_checkpoint_cannot_choose_what_is_called(group, target, trained, tmp_path):
    called = {"_target_": target, "command": f"touch {tmp_path}/ran"}
    path = changed(trained, tmp_path / "theirs.ckpt", **{group: called})
    with pytest.raises(UserError, match="not run on a file's word"):
        evaluate(composed("evaluate", *ATTACK, f"checkpoint={path}", "logger=csv", f"output_dir={tmp_path}/results"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.ckpt"]


@pytest.mark.parametrize("group", ["model", "regularizer", "optimizer", "data", "eta", "trainer"])
@pytest.mark.parametrize("target", ["os.system", "os.mkdir", "subprocess.Popen", "builtins.open", "shutil.rmtree"])
def test_a_config_cannot_have_a_function_of_the_system_called(group, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = composed("train", "output_dir=run")
    for place in (group, f"{group}.inner"):
        broken = cfg.copy()
        called = {"_target_": target, "path": "ran", "command": "touch ran"}
        OmegaConf.update(broken, place, called, merge=False, force_add=True)
        with pytest.raises(UserError, match=rf"{group}.*{target}"):
            train(broken)
    assert not list(tmp_path.iterdir())


MEDDLED = [
    {"seed": "zero"},
    {"seed": [1]},
    {"model": "LeNet"},
    {"model": {"_target_": "jacobian_robust.models.LeNet", "classes": 10**12}},
    {"model": {"_target_": "jacobian_robust.models.LeNet", "classes": "<script>"}},
    {"model": {"_target_": "jacobian_robust.models.PixelInput", "model": "x"}},
    {"model": {"_target_": "jacobian_robust.models.MLP", "width": 10**9}},
    {"data": {"_target_": "jacobian_robust.data.ToyDataModule", "training_size": 10**15}},
    {"data": {"_target_": "jacobian_robust.data.ImageDataModule"}},
    {"data": []},
]


@pytest.mark.parametrize("config", MEDDLED, ids=str)
def test_a_meddled_checkpoint_is_told_in_a_sentence_before_any_work(config, trained, tmp_path):
    path = changed(trained, tmp_path / "theirs.ckpt", **config)
    with pytest.raises(UserError, match="theirs"):
        evaluate(composed("evaluate", *ATTACK, f"checkpoint={path}", "logger=csv", f"output_dir={tmp_path}/results"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("config", "x"), ("epochs", "x"), ("epochs", -1), ("rows", 3), ("rows", [1]), ("rows", [{"seconds": "x"}])),
        *(("wandb", 3), ("wandb", "a/b/c/d"), ("wandb", "")),
    ],
)
def test_meddled_metadata_of_an_export_are_told_in_a_sentence(key, value, tmp_path):
    known = {"config": {}, "epochs": 1, "rows": [], "wandb": None} | {key: value}
    save_file(LeNet().state_dict(), tmp_path / "theirs.safetensors", {"jacobian_robust": json.dumps(known)})
    with pytest.raises(UserError, match=f"theirs.*{key}"):
        load_checkpoint(tmp_path / "theirs.safetensors")


def test_a_checkpoint_does_not_say_where_anything_is_written(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    outside = str(tmp_path / "outside")
    path = changed(
        trained,
        tmp_path / "theirs.ckpt",
        output_dir="../../x",
        name="../../evil",
        trainer={"default_root_dir": outside, "logger": {"save_dir": outside}},
        logger={"dir": outside},
    )
    evaluate(composed("evaluate", *ATTACK, f"checkpoint={path}", "logger=csv", "output_dir=results"))
    assert sorted(place.name for place in tmp_path.iterdir()) == ["outside", "results", "theirs.ckpt"]
    assert not list((tmp_path / "outside").iterdir())
    data = {"_target_": "jacobian_robust.data.MNISTDataModule", "root": f"{outside}/data"}
    monkeypatch.setattr(MNISTDataModule.dataset_class, "download", lambda self: Path(outside, "fetched").mkdir())
    path = changed(trained, tmp_path / "theirs.ckpt", data=data)
    with pytest.raises(UserError, match="name the data"):
        evaluate(composed("evaluate", *ATTACK, f"checkpoint={path}", "logger=csv", "output_dir=second"))
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    "option",
    [
        *("name=../../evil", "name=/tmp/evil", "name=a/b", "name=..", "+trainer.default_root_dir=/tmp/evil"),
        *("+trainer.logger=true", "+logger.dir=/tmp/evil", "+logger.save_dir=/tmp/evil", "+checkpoints.directory=x"),
        *("twin=true name=config.yaml", "twin=true name=checkpoints"),
    ],
)
def test_no_option_but_the_directory_says_where_a_run_writes(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        train(composed("train", *TINY, *option.split(), "output_dir=run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("link", ["checkpoints", "curves.png", "metrics.csv", "checkpoints/.last.ckpt.part", "wandb"])
def test_a_run_directory_with_a_link_that_leads_out_is_refused(link, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    place = tmp_path / "run" / link
    if place.is_dir():
        place.rmdir()
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"is a link to .*outside"):
        train(composed("train", *TINY, "logger=csv", f"output_dir={tmp_path}/run"))
    assert not list((tmp_path / "outside").iterdir())
    assert not (tmp_path / "run" / "config.yaml").exists()


SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
def test_the_wandb_key_is_in_no_file_of_a_run_and_in_nothing_printed(tmp_path):
    """A whole run through the real door: training, evaluation, report and the offline W&B runs."""
    options = [*TINY, *ATTACK, "limit=10", "evaluate=true", "hydra.run.dir=run"]
    environment = os.environ | {"WANDB_API_KEY": SECRET}

    def door(*more):
        command = [sys.executable, str(ROOT / "train.py"), *more, *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    ended = door()
    assert ended.returncode == 0, ended.stderr
    assert SECRET not in ended.stdout + ended.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "config.yaml", "last.ckpt", "model.safetensors"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    one, several = ["hydra.run.dir=second"], ["-m", "hydra.sweep.dir=sweep"]
    for option, more in (
        (f"+logger.api_key={SECRET}", one),
        (f"logger.entity={SECRET}", several),
        ("name=${oc.env:WANDB_API_KEY}", one),
        ("name=${oc.env:WANDB_API_KEY}", several),
    ):
        refused = door(*more, option)
        assert refused.returncode == 1
        assert "error: " in refused.stderr
        assert SECRET not in refused.stdout + refused.stderr
    for path in tmp_path.rglob("*"):
        assert SECRET not in path.name
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_strangers_results_are_escaped_in_a_report(trained, tmp_path):
    """Names, sentences, attacks and data of ``robustness.json``, put into a report by ``compare``."""
    stored = (trained.directory / "evaluation" / "robustness.json").read_text()
    results = json.loads(stored)
    tag = "<script>alert(1)</script>"
    for number, model in enumerate(results["models"]):
        model |= {"name": f"{tag}{number}", "data": tag, "checkpoint": tag, "wandb": tag}
        model["checks"][0] |= {"why": tag, "name": tag}
    (attack,) = results["attacks"].values()
    results["attacks"] = {tag: attack}
    for model in results["models"]:
        for threat in model["threats"]:
            for budget in threat["budgets"]:
                for attack in budget["attacks"]:
                    attack["attack"] = tag
    (tmp_path / "theirs.json").write_text(json.dumps(results))
    compare([tmp_path / "theirs.json"], tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "theirs.json"]
    assert all(path.name.isprintable() and "<" not in path.name for path in (tmp_path / "report").iterdir())

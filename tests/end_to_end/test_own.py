"""Models and data of one's own, from the training to the report."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jacobian_robust.checkpoints import Checkpoint, load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.training.train import train

from .conftest import composed, leave_blank
from .models import Odd, Rectangles

HERE = "tests.end_to_end.models"
OWN = [f"data={{_target_:{HERE}.Rectangles}}", f"model={{_target_:{HERE}.Odd}}"]
QUICK = [
    *("trainer.max_epochs=1", "trainer.enable_progress_bar=false", "logger=csv", "monitor_images=10"),
    *("limit=12", "sanity_images=4", "geometry_images=4", "attack.pgd_linf.steps=2"),
]


def config(tmp_path, *options):
    cfg = composed("train", "~data", "~model", *QUICK, *(f"+{option}" for option in OWN), *options)
    cfg.output_dir = str(tmp_path / "run")
    return cfg


@pytest.fixture(scope="module")
def own(once):
    def undrawn(at):
        with pytest.MonkeyPatch.context() as patched:  # this is made before the fixtures of tests
            leave_blank(patched)
            return train(config(at, "evaluate=true", "attack=[pgd_linf,square]"))

    directory, metrics = once("own", undrawn)
    return directory / "run", metrics


def test_what_the_command_built_is_trusted_by_its_evaluation(own):
    directory, metrics = own
    assert {f"robust_accuracy_linf_{eps:g}" for eps in (0.1, 0.2)} < metrics.keys()
    assert (directory / "evaluation" / "report.html").is_file()
    assert (directory / "model.safetensors").is_file()


def test_a_folder_of_pictures_goes_from_the_training_to_the_report(tmp_path):
    for place, each in (("train", range(12)), ("test", range(12, 16))):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "mine" / place / name).mkdir(parents=True)
            for number in each:
                pixels = np.random.default_rng(number).integers(0, 80, (8, 6)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"mine/{place}/{name}/{number}.png")
    options = ("data=image_folder", f"data.root={tmp_path}/mine", f"data.cache={tmp_path}/cache", "data.batch_size=6")
    network = ("model=mlp", "model.inputs=48", "model.classes=3", "evaluate=true", "regularizer.probes=1")
    train(composed("train", *options, *network, *QUICK, f"output_dir={tmp_path}/run"))
    (model,) = json.loads((tmp_path / "run/evaluation/robustness.json").read_text())["models"]
    assert [of["name"] for of in model["classes"]] == ["ant", "bee", "cat"]
    assert re.fullmatch(r"mine \([0-9a-f]{8}\) test", model["data"])
    assert "pass" in {check["status"] for check in model["checks"] if check["name"] == "unseen images"}


def test_an_attack_that_takes_no_such_images_is_refused_before_the_training(tmp_path):
    for attack in ("square_l2", "autoattack_l2"):
        with pytest.raises(UserError, match=rf"{attack}: .*Square in ℓ2 .* 9×6 pixels"):
            train(config(tmp_path, "evaluate=true", f"attack=[pgd_linf,{attack}]"))
    assert not (tmp_path / "run").exists()


def test_a_file_does_not_choose_them_later(own, tmp_path):
    cfg = composed("evaluate", f"checkpoint={own[0]}", "logger=csv", f"output_dir={tmp_path}/results")
    with pytest.raises(UserError, match="not run on a file's word"):
        evaluate(cfg)


def test_what_is_loaded_computes_what_was_trained(own):
    images = torch.rand(6, *Rectangles.image_shape)
    exported = load_checkpoint(own[0] / "model.safetensors")
    checkpoint = load_checkpoint(own[0] / "checkpoints" / "last.ckpt")
    torch.manual_seed(0)
    (first, second), third = (c.model(Odd()) for c in (exported, checkpoint)), Odd()
    third.load_state_dict(checkpoint.state_dict)
    assert first.seen["steps"] > 5
    assert first.seen == second.seen
    assert torch.equal(first(images), second(images))
    assert torch.equal(first(images), third.eval()(images))
    assert first.third.weight is first.fourth_weight
    assert not torch.equal(first(images), Odd().eval()(images))


class Forgetful(nn.Module):
    """Keeps a random matrix outside its state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.randn(108, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head(images.flatten(1) @ self.projection)


class Unpicklable(Forgetful):
    def get_extra_state(self):
        return {"path": self}

    def set_extra_state(self, state):
        pass


class OfTheBatch(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))


class Monte(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(108, 5))

    def forward(self, images):
        return super().forward(nn.functional.dropout(images, 0.3))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Forgetful", [], r"loaded from its state_dict it computes something else.*buffers"),
        ("Unpicklable", [], r"holds more than tensors and plain values"),
        ("OfTheBatch", ["+data.batch_size=16"], r"batch of 1 image.*another data\.batch_size"),
        ("OfTheBatch", ["+data.batch_size=1"], r"batch of 1 image.*another data\.batch_size"),
        ("OfTheBatch", ["+data.batch_size=15", "amortization.fraction=0.05"], r"batch of 1 image"),
        ("Monte", [], r"random in evaluation mode"),
    ],
)
def test_what_would_fail_or_lie_at_the_end_is_said_before_anything_is_written(name, options, said, tmp_path):
    cfg = config(tmp_path, *options)
    cfg.model._target_ = f"{__name__}.{name}"
    with pytest.raises(UserError, match=said):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_batch_statistics_are_trained_with_a_penalty_and_said(tmp_path, capsys):
    # 97 images: the last batch has one alone, and is left out.
    cfg = config(tmp_path, "+data.batch_size=16", "trainer.limit_train_batches=6")
    cfg.model._target_ = f"{__name__}.OfTheBatch"
    assert train(cfg)["train_penalty"] > 0
    assert "batch statistics couple the samples" in " ".join(capsys.readouterr().out.split())


def test_the_metrics_are_of_the_last_validation(tmp_path):
    several = train(config(tmp_path, "+trainer.val_check_interval=0.25", "optimizer.lr=0.5", "monitor_images=0"))
    once = train(config(tmp_path / "once", "optimizer.lr=0.5", "monitor_images=0"))
    assert several["validation_loss"] == once["validation_loss"]
    stopped = train(config(tmp_path / "stopped", "+trainer.max_steps=3"))
    assert 0 < stopped["seconds"] < 60


def test_weights_under_the_prefixes_of_usual_wrappers_are_recognised(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    prefixed = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "model_state_dict": prefixed, "note": "mine"}, tmp_path / "a.pt")
    twin = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    read = load_checkpoint(tmp_path / "a.pt").model(twin)
    assert torch.equal(read[0].weight, model[0].weight)
    with pytest.raises(UserError, match="another architecture"):
        Checkpoint(tmp_path / "a.pt", "", {}, prefixed).model(nn.Sequential(nn.Linear(3, 4)))


class Beside:
    """What no safe reader knows."""


def test_other_things_beside_the_weights_need_trust_and_no_more(tmp_path):
    model = nn.Linear(3, 2)
    torch.save({"state_dict": model.state_dict(), "args": Beside()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="trust=true"):
        load_checkpoint(tmp_path / "a.pt")
    read = load_checkpoint(tmp_path / "a.pt", trust=True).model(nn.Linear(3, 2))
    assert torch.equal(read.weight, model.weight)

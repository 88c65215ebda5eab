"""Other tasks than classification through the real entry points: trained, attacked, reported."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from torch import nn

from jacobian_robust.training.train import train

from .conftest import SHORT, composed

TASKS = {
    "regression": ["data=mnist_angle", "regularizer=frobenius"],
    "regression_scale": ["data=mnist_angle", "data.outputs=2", "regularizer=margin", "optimizer=adam"],
    "multilabel": ["data=mnist_pairs", "regularizer=linear_margin", "adversary=fgsm"],
    "counts": ["data=mnist_pairs", "data.outputs=1", "regularizer=margin"],
    "segmentation": ["data=mnist_pairs", "data.outputs=11", "model=conv_pixels", "regularizer=margin", "limit=10"],
}
TINY = [
    *("data.training_size=500", "data.batch_size=32", "trainer.max_epochs=1", "evaluate=true", "logger=csv"),
    *("attack=[pgd_linf,fgsm]", "attack.pgd_linf.steps=3", "attack.pgd_linf.eps=0.2", "attack.fgsm.eps=0.2"),
]


METRICS = {
    "multilabel": ["mean_average_precision"],
    "segmentation": ["mean_iou", "pixel_accuracy"],
}
FEW = "data.training_size=500"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_attacked_certified_and_attacked_again(door, task):
    options = ["limit=30", "sanity_images=5", "certificate=interval", *TASKS[task]]
    trained = door("train", f"task={task}", *SHORT, *TINY, *options, "hydra.run.dir=run")
    assert trained.status == 0, trained.stderr
    again = door("evaluate", "checkpoint=run", "attack=pgd_linf", "limit=5", "logger=csv", "hydra.run.dir=again")
    assert again.status == 0, again.stderr
    results = json.loads(Path("run/evaluation/robustness.json").read_text())
    (model,) = results["models"]
    (budget,) = model["threats"][0]["budgets"]
    assert budget["certified"] <= budget["correct"] <= budget["attacked"] == model["clean_correct"]
    assert results["attacks"]["pgd_linf"]["family"]["name"] == model["task"]["family"]
    assert list(model["task"]["metrics"]) == METRICS.get(task, ["mae", "rmse"])
    checks = {check["name"]: check["status"] for check in model["checks"]}
    assert {"certificate interval", "gradient-free", "convergence"} <= checks.keys()
    assert checks["unseen images"] in ("pass", "warn")
    assert model["task"]["right"] in Path("run/evaluation/report.html").read_text()
    assert model["task"]["right"] in trained.stdout.replace("\n", " ")
    with Path("run/metrics.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    assert all(float(epoch[f"validation_{name}"]) >= 0 for name in model["task"]["metrics"])


@pytest.mark.parametrize("task", ["multilabel", "counts"])
def test_certified_training_of_a_task_measures_its_certificate_each_epoch(tmp_path, task):
    options = ["data=mnist_pairs", f"data.outputs={10 if task == 'multilabel' else 1}", "model=conv_small"]
    options += ["regularizer=certified_margin", "eta=linear", "data.training_size=96", "data.validation_size=32"]
    sizes = ["model.first=2", "model.second=2", "model.hidden=4", "monitor_images=8", "trainer.max_epochs=1"]
    train(composed("train", f"task={task}", *options, *sizes, "logger=csv", f"output_dir={tmp_path}"))
    with (tmp_path / "metrics.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    assert 0 <= float(epoch["validation_certified_accuracy"]) <= float(epoch["validation_accuracy"]) <= 1


def test_a_model_from_elsewhere_is_attacked_on_a_task(door):
    """A network that says the same angle of each image: right where that is within the tolerance, whatever is done."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 10.0)
    safetensors.torch.save_file(model.state_dict(), "angle.safetensors")
    own = ["+model._target_=tests.end_to_end.models.Angle", "checkpoint=angle.safetensors", "data=mnist_angle"]
    tiny = ["attack=pgd_linf", "attack.pgd_linf.steps=1", "attack.pgd_linf.eps=0.1", "limit=50", "sanity_images=0"]
    asked = ["task=regression", "task.tolerance=20", "certificate=interval", "data.test_size=60"]
    found = door("evaluate", *own, *tiny, *asked, "logger=csv", "hydra.run.dir=found")
    assert found.status == 0, found.stderr
    (result,) = json.loads(Path("found/robustness.json").read_text())["models"]
    (budget,) = result["threats"][0]["budgets"]
    assert 0 < budget["certified"] == budget["correct"] == result["clean_correct"] < 50
    assert result["task"]["right"] == "share within 20"


def own(task):
    """Return the arrays of a file with targets of one's own, and a model for them."""
    pixels = np.random.default_rng(0).random((60, 1, 8, 8)).astype(np.float32)
    means = pixels.mean((1, 2, 3))
    by_task = {
        "regression": (pixels.reshape(60, -1), np.stack([means, -means], 1), ["model=mlp", "model.inputs=64"]),
        "multilabel": (pixels, pixels[:, 0, 0, :3] > 0.5, ["model=lenet", "model.image_size=8"]),
        "counts": (pixels, (10 * means).round().astype(int), ["model=lenet", "model.image_size=8"]),
        "segmentation": (pixels, (pixels[:, 0] > 0.5).astype(np.uint8), ["model=conv_pixels", "model.width=4"]),
    }
    images, targets, model = by_task[task]
    outputs = {"regression": 2, "multilabel": 3, "counts": 1, "segmentation": 2}[task]
    return {"images": images, "targets": targets}, [*model, f"model.classes={outputs}"]


@pytest.mark.parametrize(
    "task", ["regression", *(pytest.param(t, marks=pytest.mark.slow) for t in ("multilabel", "counts", "segmentation"))]
)
def test_ones_own_targets_are_trained_on_attacked_and_attacked_again(door, task):
    arrays, model = own(task)
    np.savez("mine.npz", **arrays)
    asked = [f"task={task}", "data=tensors", "data.file=mine.npz", *model, "regularizer=margin", "eta=constant"]
    tiny = ["trainer.max_epochs=1", "evaluate=true", "logger=csv", "sanity_images=5", "certificate=interval"]
    attack = ["attack=pgd_linf", "attack.pgd_linf.steps=2", "attack.pgd_linf.eps=0.01"]
    trained = door("train", *asked, *SHORT, *tiny, *attack, "data.validation_size=8", "hydra.run.dir=run")
    assert trained.status == 0, trained.stderr
    again = door("evaluate", "checkpoint=run", *attack, "sanity_images=0", "logger=csv", "hydra.run.dir=again")
    assert again.status == 0, again.stderr
    first, second = (json.loads(Path(d, "robustness.json").read_text()) for d in ("run/evaluation", "again"))
    assert first["models"][0]["clean_correct"] == second["models"][0]["clean_correct"]
    assert first["models"][0]["images"] == 12
    assert first["models"][0]["data"].startswith("mine (")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["task=regression"], "task: MNIST has a class for each image; give task=classification, or data=mnist_angle"),
        (["data=mnist_angle", FEW], "task: MNISTAngle has no targets for Categorical; give task=regression"),
        (["task=counts", "data=mnist_pairs", FEW], "data.outputs=10: the task has 1 for an image; give data.outputs=1"),
        (
            ["task=regression_scale", "data=mnist_angle", "data.outputs=2", FEW],
            "no largest distance where a model gives σ",
        ),
        (
            ["task=multilabel", "data=mnist_pairs", "regularizer=linear_margin", "regularizer.distance=logits", FEW],
            "regularizer: distance=logits is the lead of a class",
        ),
        (["task=regression", "data=mnist_angle", "regularizer=vat", FEW], "VAT is for classification alone"),
        (["task=regression", "data=mnist_angle", "adversary=trades", FEW], "TRADES is for classification alone"),
        (
            ["task=regression", "data=mnist_angle", "attack=autoattack", "evaluate=true", FEW],
            "autoattack: this attack is for classification alone",
        ),
        (["task=segmentation", "data=mnist_pairs", "data.outputs=11", FEW], "choose model=conv_pixels"),
        (
            ["task=regression", "data=mnist_angle", "certificate=crown", "evaluate=true", FEW],
            "certificate.crown: this certificate is for classification alone; choose certificate=interval",
        ),
        (
            ["task=regression", "data=mnist_angle", "diagnostics=simplifications", "evaluate=true", FEW],
            "diagnostics: they are for task=classification alone",
        ),
    ],
)
def test_what_does_not_fit_a_task_is_said_in_one_line(door, options, message):
    refused = door("train", *options, *SHORT)
    assert refused.status == 1
    assert message in refused.error

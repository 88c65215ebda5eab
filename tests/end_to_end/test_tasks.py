"""Other tasks than classification through the real entry points: trained, attacked, reported."""

import json
from pathlib import Path

import pytest

from .conftest import SHORT

TASKS = {
    "regression": ["data=mnist_angle", "regularizer=frobenius"],
    "regression_scale": ["data=mnist_angle", "data.outputs=2", "regularizer=margin"],
    "multilabel": ["data=mnist_pairs", "regularizer=linear_margin", "adversary=fgsm"],
    "counts": ["data=mnist_pairs", "data.outputs=1", "regularizer=margin"],
    "segmentation": ["data=mnist_pairs", "data.outputs=11", "model=conv_pixels", "regularizer=margin", "limit=10"],
}
TINY = [
    *("data.training_size=500", "data.batch_size=32", "trainer.max_epochs=1", "evaluate=true", "logger=csv"),
    *("attack=[pgd_linf,fgsm]", "attack.pgd_linf.steps=3", "attack.pgd_linf.eps=0.2", "attack.fgsm.eps=0.2"),
]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_attacked_and_attacked_again(door, task):
    trained = door("train", f"task={task}", *SHORT, *TINY, "limit=40", *TASKS[task], "hydra.run.dir=run")
    assert trained.status == 0, trained.stderr
    again = door("evaluate", "checkpoint=run", "attack=pgd_linf", "limit=5", "logger=csv", "hydra.run.dir=again")
    assert again.status == 0, again.stderr
    results = json.loads(Path("run/evaluation/robustness.json").read_text())
    (model,) = results["models"]
    (budget,) = model["threats"][0]["budgets"]
    assert budget["correct"] <= budget["attacked"] == model["clean_correct"]
    assert results["attacks"]["pgd_linf"]["family"]["name"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["task=regression"], "task: MNIST has a class for each image; give task=classification, or data=mnist_angle"),
        (["data=mnist_angle"], "task: MNISTAngle has no targets for Categorical; give task=regression"),
        (["task=counts", "data=mnist_pairs"], "data.outputs=10: the task has 1 for an image; give data.outputs=1"),
        (["task=regression", "data=mnist_angle", "regularizer=vat"], "VAT is for classification alone"),
        (["task=regression", "data=mnist_angle", "adversary=trades"], "TRADES is for classification alone"),
        (
            ["task=regression", "data=mnist_angle", "attack=autoattack", "evaluate=true"],
            "autoattack: this attack is for classification alone",
        ),
        (["task=segmentation", "data=mnist_pairs", "data.outputs=11"], "choose model=conv_pixels"),
    ],
)
def test_what_does_not_fit_a_task_is_said_in_one_line(door, options, message):
    refused = door("train", *options, *SHORT)
    assert refused.status == 1
    assert message in refused.error

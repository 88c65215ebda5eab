"""Several runs side by side: ``beside``."""

import json

import pytest
import torch

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.training.train import train

from .conftest import composed

SHORT = (
    *("experiment=toy", "logger=csv", "trainer.enable_progress_bar=false", "trainer.max_epochs=1"),
    *("data.training_size=64", "data.validation_size=20", "data.test_size=20", "monitor_images=0"),
    *("sanity_images=0", "geometry_images=0", "reliability=false", "attack.pgd_l2.steps=2"),
)
OTHERS = (
    *("+regularizer@beside.margin.regularizer=linear_margin", "+eta@beside.margin.eta=constant"),
    *("beside.margin.eta.value=0.25", "+adversary@beside.noisy.adversary=noise"),
)


def test_each_run_differs_in_what_is_said_of_it_and_all_are_attacked(tmp_path):
    metrics = train(composed("train", *SHORT, *OTHERS, f"output_dir={tmp_path}"))
    stored = {name: load_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("frobenius", "margin")}
    assert stored["frobenius"].config["regularizer"]["_target_"].endswith("Frobenius")
    assert stored["margin"].config["regularizer"]["_target_"].endswith("LinearMargin")
    assert "chart" not in stored["margin"].config["regularizer"]  # the run's own penalty is replaced, not merged
    assert stored["margin"].config["eta"]["value"] == 0.25
    assert "beside" not in stored["margin"].config
    evaluated = json.loads((tmp_path / "evaluation/robustness.json").read_text())
    assert [model["name"] for model in evaluated["models"]] == ["vanilla", "frobenius", "margin", "noisy"]
    for prefix in ("twin_", "", "margin_", "noisy_"):
        assert 0 <= metrics[f"{prefix}robust_accuracy_l2_0.1"] <= 1
    first, last = (load_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("vanilla", "noisy"))
    assert any(not torch.equal(first.state_dict[key], last.state_dict[key]) for key in first.state_dict)


def test_a_run_beside_is_the_run_that_it_would_be_alone(tmp_path):
    alone = ("twin=false", "~beside", "evaluate=false", "regularizer=linear_margin", "eta=constant", "eta.value=0.25")
    train(composed("train", *SHORT, *OTHERS, "evaluate=false", f"output_dir={tmp_path / 'several'}"))
    # The toy's own options are of the penalty it chooses; another is composed without them.
    toy = [option for option in SHORT if option != "experiment=toy"]
    train(
        composed(
            "train",
            *toy,
            "data=toy",
            "model=mlp",
            "optimizer=adam",
            "attack=pgd_l2",
            *alone,
            f"output_dir={tmp_path / 'alone'}",
        )
    )
    of_several = load_checkpoint(tmp_path / "several/margin/checkpoints/last.ckpt").state_dict
    of_one = load_checkpoint(tmp_path / "alone/checkpoints/last.ckpt").state_dict
    assert all(torch.equal(of_several[key], value) for key, value in of_one.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["+beside.x.data.root=1"], r"beside\.x\.data: what runs side by side may differ in is model"),
        (["+beside.frobenius.trainer.max_epochs=1"], "name=frobenius"),
        (["+beside.checkpoints.trainer.max_epochs=1"], "another name"),
        (["+beside.x.regularizer.eps=1"], "regularizer: names no class"),
    ],
)
def test_what_cannot_stand_beside_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(composed("train", *SHORT, *options, f"output_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()

"""The toy model through the real entry points, and its figures."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.training.train import train
from jacobian_robust_studies.simplifications.report import summary
from jacobian_robust_studies.simplifications.schema import Simplifications
from jacobian_robust_studies.toy import animation as animated
from jacobian_robust_studies.toy import measure
from jacobian_robust_studies.toy.__main__ import main, toy
from jacobian_robust_studies.toy.measure import classifiers
from jacobian_robust_studies.toy.schema import Toy

from .conftest import ROOT, colours, composed, leave_blank

FIGURES = ("decision_regions", "information_balls", "heights", "geodesic_balls", "circles", "attacks")


@pytest.fixture(scope="module")
def pair(once) -> Path:
    """The twins of experiment=toy, trained for six short epochs and attacked."""
    directory, metrics = once("toy", train_the_pair)
    assert metrics["train_accuracy"] > 0.5
    assert metrics["twin_robust_accuracy_l2_0.1"] <= metrics["twin_robust_accuracy_l2_0.025"]
    return directory


def train_the_pair(directory: Path) -> dict[str, float | int]:
    with pytest.MonkeyPatch.context() as patched:  # this is made before the fixtures of tests
        leave_blank(patched)
        return train_shortly(directory)


def train_shortly(directory: Path) -> dict[str, float | int]:
    return train(
        composed(
            "train",
            "experiment=toy",
            "logger=csv",
            "trainer.enable_progress_bar=false",
            "trainer.max_epochs=6",
            "data.training_size=200",
            "data.validation_size=40",
            "data.test_size=60",
            "monitor_images=20",
            "sanity_images=10",
            "geometry_images=10",
            "attack.pgd_l2.steps=5",
            f"output_dir={directory}",
        )
    )


def test_a_run_of_the_toy_is_a_run_like_any_other(pair):
    for name in ("vanilla", "frobenius"):
        held = {path.name for path in (pair / name).iterdir()}
        assert {"config.yaml", "checkpoints", "model.safetensors", "metrics.csv", "curves.png", "summary.json"} <= held
    report = json.loads((pair / "evaluation" / "robustness.json").read_text())
    assert [model["data"] for model in report["models"]] == ["Toy test", "Toy test"]
    assert not list((pair / "evaluation").glob("examples_*"))  # two pixels are no picture
    others = [row["against"] for model in report["models"] for row in model["out_of_distribution"]]
    assert others == ["uniform noise", "uniform noise"]


def test_what_does_not_apply_to_points_is_left_out_in_words(pair, tmp_path, capsys):
    def run(name, *overrides):
        return evaluate(
            composed(
                "evaluate", f"checkpoint={pair}/vanilla", "logger=csv", *overrides, f"output_dir={tmp_path}/{name}"
            )
        )

    options = ["attack.pgd_l2.eps=[0.05]", "attack.pgd_l2.step_size=0.02", "limit=20", "sanity_images=10"]
    results = run("pgd", "attack=pgd_l2", *options)
    assert results.models[0].images == 20
    assert "left out: rotated and inverted images, the points of Toy are no pictures" in capsys.readouterr().out
    warned = {check.name: check.why for check in results.models[0].checks if check.status == "warn"}
    assert "Square in ℓ2 tiles an image" in warned["gradient-free"]
    with pytest.raises(UserError, match=r"Square in ℓ2 tiles an image .* 1×2 pixels"):
        run("square", "attack=square_l2", "limit=20")
    with pytest.raises(UserError, match="DLR losses need 4 classes or more, and there are 3"):
        run("aa", "attack=autoattack_l2", "limit=20")
    assert run("square_linf", "attack=square", "attack.square.queries=20", "limit=20", "sanity_images=0").models


@pytest.mark.slow
@pytest.mark.drawn
def test_the_figures_and_their_numbers(pair, tmp_path, monkeypatch):
    shown = measure._shown
    for side in ("SIDE", "CLOSED_SIDE"):  # the committed figures have finer grids, more balls and frames
        monkeypatch.setattr(measure, side, 61)
    monkeypatch.setattr(measure, "_shown", lambda *arguments: shown(*arguments)[:1])
    monkeypatch.setattr(animated, "STEPS", (*range(12), 40))
    results = toy(pair, tmp_path / "out", rays=2)
    assert Toy.model_validate_json((tmp_path / "out" / "toy.json").read_bytes()) == results
    for name in FIGURES:
        assert colours(tmp_path / "out" / f"{name}.png") > 50
        assert (tmp_path / "out" / f"{name}.svg").read_text().startswith("<?xml")
    with Image.open(tmp_path / "out" / "attack.gif") as animation:
        assert animation.n_frames > 10
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    assert len(np.unique(frames[0].reshape(-1, 3), axis=0)) > 20, "not blank"
    assert (frames[0] != frames[-1]).any(), "the attack moves"
    report = json.loads((pair / "evaluation" / "robustness.json").read_text())
    for model, evaluated in zip(results.classifiers, report["models"], strict=True):
        assert model.name in ("vanilla", "frobenius")
        assert model.clean_accuracy == pytest.approx(evaluated["clean_accuracy"], abs=0.02)  # float64 against float32
        searched = [budget.search for budget in model.budgets]
        assert searched == sorted(searched, reverse=True)
        assert all(b.search <= b.pgd + 0.05 for b in model.budgets)
        assert model.closed_points == sorted(model.closed_points, reverse=True)
        for ball in model.closed:
            assert 0 < ball.share <= 1
        for ball in model.balls:
            assert ball.reached + ball.left + ball.folded == ball.rays == 2
            assert ball.rays >= ball.partway[0] >= ball.partway[1] >= ball.reached
            assert ball.great_circle_error < 1e-4
        for attack in model.attacks:
            assert attack.euclidean <= results.eps * (1 + 1e-9)
            assert not attack.broken or attack.fisher_rao >= attack.boundary - 1e-9
    with pytest.raises(UserError, match="holds something already"):
        toy(pair, tmp_path / "out")


def test_wrong_runs_are_told_in_one_line(pair, tmp_path, monkeypatch):
    mnist = ROOT / "docs" / "results" / "checkpoints"
    for place, message in (
        (tmp_path / "nowhere", "no such file or directory"),
        (pair / "vanilla", "1 checkpoints without a penalty and 0 with one"),
        (mnist, "classifies MNIST, not points of the plane"),
    ):
        monkeypatch.setattr(sys, "argv", ["toy", str(place), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            main()
    assert not (tmp_path / "out").exists()


def test_the_twins_record_is_told_with_the_radius_it_was_made_with(pair, tmp_path):
    for name in ("vanilla", "frobenius"):
        for file in ("checkpoints/last.ckpt", "model.safetensors"):
            assert load_checkpoint(pair / name / file).condition(3) == (0.1, "center")
    options = ["attack=pgd_l2", "attack.pgd_l2.steps=2", "attack.pgd_l2.eps=[0.05]", "limit=6", "sanity_images=0"]
    options += ["geometry_images=0", "reliability=false", "diagnostics=simplifications", "diagnostics.images=6"]
    evaluate(composed("evaluate", *options, f"checkpoint={pair}/vanilla", "logger=csv", f"output_dir={tmp_path}/r"))
    (model,) = Simplifications.model_validate_json((tmp_path / "r" / "simplifications.json").read_text()).models
    assert (model.condition_eps, model.condition_bound) == (0.1, "center")
    assert summary(model)[5][1].endswith("(ε = 0.1)")


def test_of_a_checkpoint_that_does_not_say_it_is_the_penaltys_radius_or_the_notes(pair):
    for name, eps in (("vanilla", 1910.6), ("frobenius", 0.1)):
        old = replace(load_checkpoint(pair / name / "model.safetensors"), condition_eps=None, condition_bound=None)
        assert old.condition(3) == (pytest.approx(eps, abs=0.1), "center")


@pytest.mark.slow
def test_the_committed_checkpoints_give_the_committed_numbers(tmp_path):
    stored = json.loads((ROOT / "docs" / "toy" / "toy.json").read_text())
    again = json.loads(toy(ROOT / "docs" / "toy", tmp_path / "out").model_dump_json())
    for ours, theirs in zip(again["classifiers"], stored["classifiers"], strict=True):
        for key in ("sha256", "clean_accuracy", "center", "boundary"):
            assert ours[key] == theirs[key]
        for group in ("budgets", "attacks", "balls", "closed"):
            for one, other in zip(ours[group], theirs[group], strict=True):
                # The points are float32: another release of torch rounds them otherwise.
                assert one.get("point") == pytest.approx(other.get("point"), abs=1e-6)
                # How near a great circle a geodesic stays is rounding.
                kept = [key for key in other if key not in ("point", "great_circle_error")]
                for k in kept:
                    assert one[k] == pytest.approx(other[k], rel=1e-4, abs=1e-6), k


def test_the_committed_figures_say_what_the_committed_checkpoints_are():
    models, eps, points, labels = classifiers(ROOT / "docs" / "toy")
    stored = Toy.model_validate_json((ROOT / "docs" / "toy" / "toy.json").read_bytes())
    assert stored.eps == eps
    for model, told in zip(models, stored.classifiers, strict=True):
        assert (model.name, model.checkpoint.sha256) == (told.name, told.sha256)
        assert float((model.predicted(points) == labels).double().mean()) == told.clean_accuracy
        assert {path.stem for path in (ROOT / "docs" / "toy").glob("*.png")} == set(FIGURES)
    assert torch.equal(labels.bincount(), torch.tensor([334, 333, 333]))

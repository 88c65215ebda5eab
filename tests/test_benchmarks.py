import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import AutoAttack
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.models import LeNet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("penalty", [None, "frobenius, 1 probe"])
def test_the_overhead_benchmark_runs(penalty):
    benchmark = runpy.run_path(str(BENCHMARKS / "train_overhead.py"))
    datamodule = MNISTDataModule(validation_size=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    result = benchmark["measure"](penalty and benchmark["PENALTIES"][penalty], datamodule, steps=2, epochs=2)
    assert set(result) == {"bare_ms", "framework_ms", "ratio", "loading_share"}
    assert all(value > 0 for value in result.values())


@pytest.mark.slow
def test_the_step_cost_benchmark_runs():
    benchmark = runpy.run_path(str(BENCHMARKS / "step_cost.py"))
    case = benchmark["random_case"](batch=4)
    steps = benchmark["compare"](case, seconds=0.0, peer=None)
    assert steps["plain"]["ratio"] == 1
    assert {"1 probe", "2 probes", "exact Frobenius", "exact spectral", "torch.func.jacrev"} <= steps.keys()
    errors = benchmark["errors"](case, draws=20)
    assert errors["1 probe"]["relative_variance"] > 0
    assert 0 <= errors["spectral, 1 column, to 2%"]["largest_error"] <= 0.02
    figure = benchmark["error_against_cost"]({"steps": steps, "errors": errors})
    assert {text.get_text() for text in figure.axes[0].texts} - {""} == benchmark["DRAWN"].keys() & steps.keys()
    assert benchmark["peak_memory"](benchmark["ours"](case, None)) > 0


def test_the_image_size_benchmark_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it builds on step_cost.py beside it
    benchmark = runpy.run_path(str(BENCHMARKS / "image_size.py"))
    networks = benchmark["cases"](batch=2)
    assert [len(case.images) for case in networks.values()] == [2] * 7
    small = {name: case for name, case in networks.items() if "LeNet, 1" in name or "MLP, 3" in name}
    result = benchmark["measure"](small, seconds=0.0)
    assert result["LeNet, 1×28×28"]["plain"]["to_lenet"] == 1
    assert all(ways["plain"]["to_plain"] == 1 for ways in result.values())
    assert all(ways["exact"]["to_plain"] > 1 for ways in result.values())


@pytest.mark.slow
def test_the_same_result_benchmark_runs_what_is_missing_and_compares_seed_by_seed(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "same_result.py"), "--epochs=1", "--steps=2", "--images=20"]
    command += ["--directory", str(tmp_path), "--json", str(tmp_path / "all.json"), "--ways", "exact", "1 projection"]
    subprocess.run([*command, "--seeds", "0"], check=True, capture_output=True, timeout=300)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed*/result.json")}
    assert len(first) == 2
    second = subprocess.run([*command, "--seeds", "0"], check=True, capture_output=True, timeout=300, text=True)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    results = json.loads((tmp_path / "all.json").read_text())
    assert set(results) == {"exact", "1 projection"}
    assert 0 <= results["exact"]["0"]["0.1"] <= 100
    assert "less exact, seed by seed" in second.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("short_search")
def test_the_evaluation_cost_benchmark_runs():
    torch.manual_seed(0)
    benchmark = runpy.run_path(str(BENCHMARKS / "evaluation_cost.py"))
    images, labels = torch.rand(6, 1, 28, 28), torch.arange(6)
    ways = {"loop": benchmark["loop"], "sweep": benchmark["ours"]}
    results = benchmark["measure"](ways, LeNet().eval(), images, labels, 1)
    (*_, loop), (*_, swept) = results["loop"], results["sweep"]
    assert swept.keys() == loop.keys()
    assert all(swept[eps] <= loop[eps] for eps in loop)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    labels = model(images).argmax(-1)
    attack = AutoAttack(name="autoattack", norm="linf", eps=(0.1,), batch_size=100)
    assert benchmark["reference"](model, images, labels, attack) == benchmark["our_reference"](
        model, images, labels, attack
    )


def test_a_mistake_is_told_before_the_evaluation_cost_is_measured(tmp_path, monkeypatch, capsys):
    script = str(BENCHMARKS / "evaluation_cost.py")
    monkeypatch.setattr("sys.argv", [script, str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"^error: checkpoint=.*nowhere: no such file or directory$"):
        runpy.run_path(script, run_name="__main__")
    checkpoint = BENCHMARKS.parent / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"
    monkeypatch.setattr("sys.argv", [script, str(checkpoint), "--autoattack-eps", "-1"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "error: --autoattack-eps" in capsys.readouterr().err


@pytest.mark.slow
def test_the_defence_cost_benchmark_runs():
    benchmark = runpy.run_path(str(BENCHMARKS / "defence_cost.py"))
    measured = benchmark["measure"](benchmark["DEFENCES"], seconds=0.0)
    assert measured["regularizer=none"]["ratio"] == 1
    assert measured["regularizer=none adversary=pgd"]["ratio"] > 2  # nine, on an idle machine


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_certified_pairs_are_broken_beyond_the_distance_and_not_before(norm):
    torch.manual_seed(0)
    benchmark = runpy.run_path(str(BENCHMARKS / "certified_pairs.py"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images = 0.5 + 0.02 * torch.rand(30, 1, 4, 4)
    with torch.no_grad():
        model[1].bias.copy_(-model[1].weight.sum(-1) / 2)  # the boundary is at the grey image
    logits = model(images)
    weight = model[1].weight.diff(dim=0)
    distance = logits.diff(dim=-1).abs()[:, 0].detach() / weight.norm(p=1 if norm == "linf" else 2).detach()
    assert distance.max() < 0.4, "else the range of the pixels is in the way"
    attack = lambda scale: benchmark["broken"](model, images, logits.argmax(-1), scale * distance, norm, 4)  # noqa: E731
    assert not attack(0.999).any()
    assert attack(1.05).all()

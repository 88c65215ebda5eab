import csv
import json
import math
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.models import LeNet
from jacobian_robust.reporting.figures import PALETTE
from jacobian_robust.robustness.metrics import TASK_METRICS
from jacobian_robust.robustness.schema import Results
from jacobian_robust.training.callbacks import JacobianMonitor
from jacobian_robust.training.options import METRICS
from jacobian_robust.training.train import train

from . import wandb_records
from .conftest import ROOT, SHORT, TOY, colours, composed, shows


def rows(directory):
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["vanilla", "frobenius"])
def test_a_run_directory_holds_what_it_should(trained, name):
    directory = trained.directory / name
    config = OmegaConf.load(directory / "config.yaml")
    assert config.seed == 0
    assert config.trainer.max_epochs == 2
    assert (config.regularizer is None) == (name == "vanilla")
    assert shows(directory / "curves.png", PALETTE[0]), "the line of the training images"
    assert shows(directory / "curves.png", PALETTE[1]), "that of the held-out images"
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["steps"] == 120
    cost = summary["cost"]
    assert cost["step_ratio"] == pytest.approx(cost["step_seconds"] / cost["plain_step_seconds"])
    assert cost["plain_step_equivalents"] == pytest.approx(120 * cost["step_ratio"])
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (directory / summary["checkpoint"]).is_file()


def test_metrics_have_a_row_an_epoch_with_every_measurement(trained):
    table = rows(trained.directory / "frobenius")
    assert [row["epoch"] for row in table] == ["1", "2"]
    others = ("certified_accuracy", *TASK_METRICS)
    measured = [f"{stage}_{m}" for stage in ("train", "validation") for m in METRICS if m not in others]
    columns = ["epoch", "eta", "lr", *measured, "skipped_steps", "seconds"]
    assert list(table[0]) == columns
    assert all(math.isfinite(float(value)) for row in table for value in row.values())
    assert {row["eta"] for row in table} == {"0.5"}
    assert {row["lr"] for row in table} == {"0.1"}
    for row in table:
        loss, cross_entropy, penalty = (float(row[f"train_{m}"]) for m in ("loss", "cross_entropy", "penalty"))
        assert loss == pytest.approx(0.5 * cross_entropy + 0.5 * penalty, rel=1e-4)
    undefended = rows(trained.directory / "vanilla")
    assert {row["train_penalty"] for row in undefended} == {""}
    assert {row["eta"] for row in undefended} == {"0.0"}


def test_training_learns_and_the_penalty_shrinks_the_jacobian(trained):
    metrics = trained.metrics
    assert metrics["validation_accuracy"] > 0.7
    assert metrics["twin_validation_accuracy"] > 0.7
    assert metrics["validation_jacobian_norm"] < 0.8 * metrics["twin_validation_jacobian_norm"]


def test_training_with_evaluation_returns_the_accuracies_under_attack(trained):
    report = Results.model_validate_json((trained.directory / "evaluation" / "robustness.json").read_text())
    twin, robust = report.models
    assert (twin.name, robust.name) == ("vanilla", "frobenius")
    for model, prefix in ((robust, ""), (twin, "twin_")):
        assert model.images == 60
        assert trained.metrics[f"{prefix}robust_accuracy_linf_0.1"] == model.threats[0].budgets[1].robust_accuracy


def test_twins_begin_alike_and_are_measured_alike(tmp_path):
    """Without learning the two networks are the same, and so is what eq. 14 says of them."""
    overrides = ["twin=true", "optimizer.lr=0", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "logger=csv"]
    overrides += ["regularizer.probes=1", "regularizer.delta_over_eps=null", "regularizer.eps=0.1"]
    train(composed("train", *SHORT, *TOY, *overrides, f"output_dir={tmp_path}/pair"))
    a, b = (
        load_checkpoint(tmp_path / "pair" / name / "checkpoints" / "last.ckpt") for name in ("vanilla", "frobenius")
    )
    assert all(torch.equal(weight, b.state_dict[name]) for name, weight in a.state_dict.items())
    for column in ("jacobian_norm", "condition_satisfied", "cross_entropy"):
        assert a.rows[0][f"validation_{column}"] == b.rows[0][f"validation_{column}"]
    assert a.rows[0]["validation_condition_satisfied"] > 0


@pytest.mark.slow
def test_wandb_offline_run_holds_config_history_curves_and_success(logged):
    directory = logged.directory / "frobenius"
    (offline,) = (directory / "wandb").glob("offline-run-*")
    records = wandb_records.read_records(offline)
    run = next(record.run for record in records if record.HasField("run"))
    assert run.project == "jacobian_robust"
    assert run.display_name == "frobenius-seed0"
    assert run.job_type == "train"
    assert run.run_group == logged.directory.name
    assert {"frobenius", "MNIST", "LeNet"} <= set(run.tags)
    config = wandb_records.config(records)
    assert config["regularizer"]["chart"] == "sphere"
    assert config["optimizer"]["lr"] == 0.1
    history = wandb_records.history(records)
    epochs = [row for row in history if "validation/accuracy" in row]
    assert [row["validation/accuracy"] for row in epochs] == pytest.approx(
        [float(row["validation_accuracy"]) for row in rows(directory)], rel=1e-6
    )
    assert [row["eta"] for row in epochs] == [0.5, 0.5]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert any(row.get("curves/_type") == "image-file" for row in history)
    metrics = {
        record.metric.name or record.metric.glob_name: record.metric for record in records if record.HasField("metric")
    }
    assert metrics["*"].step_metric == "epoch"
    cost, of_twin = (
        sum(float(row["seconds"]) for row in rows(logged.directory / name)) / 2 for name in ("frobenius", "vanilla")
    )
    summary = wandb_records.summary(records)
    assert summary["seconds_per_epoch"] == pytest.approx(cost)
    assert summary["cost_over_twin"] == pytest.approx(cost / of_twin)
    assert wandb_records.exit_code(records) == 0


@pytest.mark.slow
def test_wandb_run_of_a_failed_training_says_so(tmp_path):
    cfg = composed("train", *SHORT, "optimizer.lr=1e20", "trainer.limit_train_batches=5", f"output_dir={tmp_path}/run")
    cfg.regularizer = None
    with pytest.raises(ValueError, match="training diverged: the loss of 3 steps in a row was not finite"):
        train(cfg)
    batch = torch.load(tmp_path / "run" / "nonfinite_batch.pt", weights_only=True)
    assert batch["inputs"].shape == (32, 1, 28, 28)
    assert batch["model"].keys() == LeNet().state_dict().keys()
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert wandb_records.exit_code(wandb_records.read_records(offline)) == 1


def short_run(directory, *overrides, network=TOY):
    train(
        composed(
            "train",
            *SHORT,
            *network,
            "logger=csv",
            "regularizer.probes=1",
            "trainer.limit_train_batches=4",
            f"output_dir={directory}",
            *overrides,
        )
    )
    return load_checkpoint(directory / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, every):
    """Order of the images, η, the probes' signs and the steps that are penalised go on where they were."""
    options = ["eta=constant", f"amortization.every={every}"]
    whole = short_run(tmp_path / "whole", "trainer.max_epochs=2", *options)
    first = short_run(tmp_path / "first", "trainer.max_epochs=1", *options)
    assert first.epochs == 1
    second = short_run(tmp_path / "second", "trainer.max_epochs=2", *options, f"ckpt_path={tmp_path}/first")
    assert second.epochs == 2
    for name, weight in whole.state_dict.items():
        assert torch.equal(weight, second.state_dict[name])
    ours, theirs = rows(tmp_path / "second"), rows(tmp_path / "whole")
    for row in (*ours, *theirs):
        del row["seconds"]
    assert ours == theirs


def test_clipped_gradients_move_the_weights_no_further_than_they_may(tmp_path):
    clipped = short_run(tmp_path / "run", "trainer.max_epochs=1", "trainer.gradient_clip_val=0.01")
    start = short_run(tmp_path / "start", "trainer.max_epochs=1", "optimizer.lr=1e-30")
    moved = sum((clipped.state_dict[name] - weight).square().sum() for name, weight in start.state_dict.items()) ** 0.5
    assert 0 < moved <= 4 * 0.01 * 0.01 * 1.01  # four steps of a learning rate of 0.01


def test_accumulated_gradients_are_those_of_a_larger_batch(tmp_path):
    """With the exact norm, whose mean over a batch is the mean over its halves."""
    exact = ["regularizer.probes=null", "trainer.max_epochs=1", "eta=constant", "eta.value=0.2", "optimizer.lr=0.1"]
    exact.append("regularizer.chart=sphere")  # no samples with a huge weight, which would magnify rounding
    whole = short_run(tmp_path / "whole", *exact, "data.batch_size=32")
    halves = [*exact, "data.batch_size=16", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=8"]
    accumulated = short_run(tmp_path / "accumulated", *halves)
    untrained = short_run(tmp_path / "untrained", *exact, "optimizer.lr=0.0")
    for name, weight in whole.state_dict.items():
        moved = (weight - untrained.state_dict[name]).abs().max()
        assert (weight - accumulated.state_dict[name]).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("every", [1, 2])
def test_accumulation_is_the_larger_batch_also_at_the_end_of_an_epoch_and_where_the_penalty_is_seldom(tmp_path, every):
    """In float64, by rounding alone: 72 points in steps of 16, the last of each epoch of 8."""

    def run(name, *options):
        train(
            composed(
                "train",
                *(
                    "data=toy",
                    "data.training_size=92",
                    "data.validation_size=20",
                    "model=mlp",
                    "regularizer.chart=sphere",
                ),
                *("regularizer.probes=null", "eta=constant", "eta.value=0.3", f"amortization.every={every}"),
                *("optimizer.lr=0.2", "trainer.max_epochs=2", "trainer.precision=64-true", "monitor_images=0"),
                *("logger=csv", "trainer.enable_progress_bar=false", f"output_dir={tmp_path / name}", *options),
            )
        )
        return load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")

    whole = run("whole", "data.batch_size=16")
    parts = run("parts", "data.batch_size=8", "trainer.accumulate_grad_batches=2")
    for name, weight in whole.state_dict.items():
        torch.testing.assert_close(parts.state_dict[name], weight, rtol=1e-9, atol=1e-12)
    assert parts.rows[-1]["train_loss"] == pytest.approx(whole.rows[-1]["train_loss"], rel=1e-9)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert [summary["steps"] for summary in summaries] == [10, 10]


def test_the_penalty_of_a_part_of_the_batch_estimates_that_of_the_whole(tmp_path):
    """The weights stay as they are. The means of eight of 32 points, over four steps, differ by tenths at most."""
    options = ["trainer.max_epochs=1", "optimizer.lr=0", "regularizer.probes=null", "regularizer.chart=sphere"]
    whole = short_run(tmp_path / "whole", *options).rows[-1]
    part = short_run(tmp_path / "part", *options, "amortization.fraction=0.25").rows[-1]
    assert part["train_cross_entropy"] == pytest.approx(whole["train_cross_entropy"], rel=1e-6)
    assert part["train_penalty"] == pytest.approx(whole["train_penalty"], rel=0.3)
    assert part["train_penalty"] != whole["train_penalty"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_graph_is_made_and_a_line_says_so(tmp_path, capsys):
    options = ["trainer.max_epochs=1", "monitor_images=0"]
    eager = short_run(tmp_path / "eager", *options)
    capsys.readouterr()
    asked = short_run(tmp_path / "asked", *options, "cuda_graph=true")
    assert "there is no GPU" in capsys.readouterr().out
    assert asked.rows[-1]["train_loss"] == eager.rows[-1]["train_loss"]


def test_a_resumed_run_has_the_eta_of_its_epoch(tmp_path):
    short_run(tmp_path / "first", "trainer.max_epochs=1")
    second = short_run(tmp_path / "second", "trainer.max_epochs=3", f"ckpt_path={tmp_path}/first")
    assert [row["eta"] for row in second.rows] == pytest.approx([0.002, 0.002 * 3**0.5, 0.006])


def test_a_schedule_sets_the_rate_of_each_step_and_goes_on_in_a_longer_run(tmp_path):
    """The rate of an epoch's last step, of four: of twelve steps after 3, 7 and 11."""

    def rate(step, steps):
        return pytest.approx(0.01 * (1 + math.cos(math.pi * step / steps)) / 2)

    options = ["scheduler=cosine"]
    run = short_run(tmp_path / "run", *options, "trainer.max_epochs=2")
    assert [row["lr"] for row in run.rows] == [rate(3, 8), rate(7, 8)]
    longer = short_run(tmp_path / "longer", *options, "trainer.max_epochs=3", f"ckpt_path={tmp_path}/run")
    assert [row["lr"] for row in longer.rows] == [rate(3, 8), rate(7, 8), rate(11, 12)]


def test_the_average_of_the_weights_is_what_is_validated_measured_stored_and_exported(tmp_path, monkeypatch):
    passed = []

    def noted(self, trainer, *args):
        passed.append({name: weight.clone() for name, weight in trainer.lightning_module.model.state_dict().items()})

    monkeypatch.setattr(JacobianMonitor, "on_train_batch_end", noted)
    options = ["averaging=ema", "averaging.decay=0.7", "optimizer.lr=0.1", "trainer.max_epochs=2"]
    run = short_run(tmp_path / "run", *options, "monitor_images=20")
    exported = load_checkpoint(tmp_path / "run" / "model.safetensors")
    for name, average in passed[0].items():
        for weights in passed[1:]:
            average = 0.7 * average + 0.3 * weights[name]
        torch.testing.assert_close(run.state_dict[name], average)
        assert torch.equal(exported.state_dict[name], run.state_dict[name])
        assert not torch.allclose(passed[-1][name], average)
    datamodule = run.datamodule()
    datamodule.setup("fit")
    images, labels = datamodule.split("validation").first(None)
    loss = torch.nn.functional.cross_entropy(run.model()(images), labels).item()
    assert run.rows[-1]["validation_cross_entropy"] == pytest.approx(loss, rel=1e-5)
    monitor = JacobianMonitor(20, eps=1.0, bound="center")
    assert run.rows[-1]["validation_jacobian_norm"] == pytest.approx(
        monitor.measure(run.model(), images[:20], labels[:20])["jacobian_norm"], rel=1e-5
    )


def test_seeds_decide_the_weights_and_zero_is_one_of_them(tmp_path):
    runs = [short_run(tmp_path / str(i), "trainer.max_epochs=1", f"seed={seed}") for i, seed in enumerate((0, 0, 1))]
    weights = [torch.cat([weight.flatten() for weight in run.state_dict.values()]) for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_edge_cases_of_size_work(tmp_path):
    """One epoch, no validation images, a batch larger than the data set, curves on the test set."""
    run = short_run(
        tmp_path / "run",
        "trainer.max_epochs=1",
        "data.validation_size=490",
        "data.batch_size=64",
        "trainer.limit_val_batches=1",
    )
    assert run.epochs == 1
    run = short_run(tmp_path / "none", "trainer.max_epochs=1", "data.validation_size=0")
    assert "validation_loss" not in run.rows[0]
    run = short_run(
        tmp_path / "test",
        "trainer.max_epochs=1",
        "data.validation_size=0",
        "data.validate_on_test=true",
        "trainer.limit_val_batches=1",
    )
    assert "validation_loss" in run.rows[0]


def test_validation_leaves_the_training_as_it_would_have_been(tmp_path):
    runs = [
        short_run(tmp_path / str(batches), "trainer.max_epochs=2", f"trainer.limit_val_batches={batches}")
        for batches in (0, 2)
    ]
    for name, weight in runs[0].state_dict.items():
        assert torch.equal(weight, runs[1].state_dict[name])


LENET = pytest.param(["data=mnist", "model=lenet"], id="lenet", marks=pytest.mark.slow)


@pytest.mark.parametrize("network", [pytest.param(TOY, id="toy"), LENET])
def test_other_precisions_measure_what_float32_does(tmp_path, network):
    """Float32 has 24 binary digits, bfloat16 eight; a loss is the end of some sixteen products and sums."""
    options = ["trainer.max_epochs=1", "regularizer.chart=sphere", "monitor_images=0"]
    exact = short_run(tmp_path / "single", *options, network=network).rows[0]
    for precision, near in (("64-true", 1e-4), ("bf16-mixed", 16 * 2**-8)):
        row = short_run(tmp_path / precision, *options, f"trainer.precision={precision}", network=network).rows[0]
        for name in (
            f"{stage}_{of}" for of in ("loss", "cross_entropy", "penalty") for stage in ("train", "validation")
        ):
            assert row[name] == pytest.approx(exact[name], rel=near), (precision, name)
            assert row[name] != exact[name], (precision, name)


@pytest.mark.slow
def test_sweep_gives_each_run_its_own_directory_and_wandb_run(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "-m", "regularizer=none,frobenius", "seed=0,1", *SHORT]
    command += ["trainer.max_epochs=1", "trainer.limit_train_batches=2", f"hydra.sweep.dir={tmp_path}/sweep"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    runs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert len(runs) == 4
    seen = set()
    for run in runs:
        (offline,) = (run / "wandb").glob("offline-run-*")
        records = wandb_records.read_records(offline)
        config = OmegaConf.load(run / "config.yaml")
        assert wandb_records.config(records)["seed"] == config.seed
        assert wandb_records.exit_code(records) == 0
        seen.add((config.regularizer is None, config.seed, offline.name))
        assert len(rows(run)) == 1
    assert len({(penalised, seed) for penalised, seed, _ in seen}) == 4
    assert len({name for *_, name in seen}) == 4


def test_an_evaluation_interrupted_after_the_training_says_how_to_have_it(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    options = ["regularizer=none", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=csv"]
    options += ["evaluate=true", "limit=20", "sanity_images=0", "geometry_images=0", "reliability=false"]
    command = [*SHORT, *options, f"output_dir={tmp_path}/run"]
    with monkeypatch.context() as patched:
        patched.setattr("jacobian_robust.evaluation.journal.Bars.__call__", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"the training is done; .*hydra.run.dir=.*run and resume=true"):
            train(composed("train", *command))
    weights = tmp_path / "run" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    metrics = train(composed("train", *command, "resume=true"))
    assert weights.stat().st_mtime_ns == written, "what was trained is not trained again"
    assert "robust_accuracy_linf_0.1" in metrics
    assert train(composed("train", *command, "resume=true")) == metrics


@pytest.mark.slow
@pytest.mark.drawn
def test_colour_images_are_trained_on_by_a_deep_network_and_attacked(tmp_path, cifar10):
    metrics = train(
        composed(
            "train",
            *("data=cifar10", f"data.root={cifar10}", "data.batch_size=4", "data.validation_size=10", "model=resnet18"),
            *("regularizer.probes=1", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "monitor_images=2"),
            *("evaluate=true", "limit=20", "attack.pgd_linf.steps=2", "sanity_images=2", "geometry_images=2"),
            *("logger=csv", "trainer.enable_progress_bar=false", f"output_dir={tmp_path}/run"),
        )
    )
    assert all(math.isfinite(metrics[name]) for name in ("train_loss", "train_penalty", "validation_jacobian_norm"))
    with (tmp_path / "run" / "evaluation" / "images.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 20
    assert colours(tmp_path / "run" / "evaluation" / "examples_linf.png") > 1000

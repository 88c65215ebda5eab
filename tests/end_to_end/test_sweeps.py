"""Sweeps and searches through the real door, with the processes that they start."""

import csv
import math
import signal
import subprocess
import sys
import time

import pytest
import wandb
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from optuna.trial import TrialState

from hydra_plugins.jacobian_robust_search import distribution
from jacobian_robust.cli.sweeps import read_job, read_jobs, run_job
from jacobian_robust.errors import UserError
from jacobian_robust.training.search import open_study
from jacobian_robust.training.train import train

from . import wandb_records
from .conftest import ROOT, SHORT, TOY, composed

BRIEF = [*SHORT, "logger=csv", "regularizer=none", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
"""A job of seconds."""


def by_option(directory, *options):
    """Return the jobs of a sweep by the values of some of their options."""
    found = {}
    for job in read_jobs(directory).values():
        values = dict(option.split("=", 1) for option in job.overrides if "=" in option)
        found[tuple(values[option] for option in options)] = job
    return found


@pytest.mark.slow
def test_jobs_side_by_side_fail_and_die_alone_and_only_what_is_missing_is_run_again(door, tmp_path):
    sweep = [
        "-m",
        "optimizer.lr=0.01,-1",
        "model._target_=jacobian_robust.models.LeNet,tests.end_to_end.models.Killing",
    ]
    sweep += [*BRIEF, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    result = door("train", *sweep)
    assert result.status == 1
    assert "3 of 4 jobs did not finish" in result.error
    assert "the same command with hydra.sweep.dir=sweep and resume=true does what is missing" in result.error
    jobs = by_option(tmp_path / "sweep", "optimizer.lr", "model._target_")
    fine = jobs["0.01", "jacobian_robust.models.LeNet"]
    assert fine.status == "finished"
    assert 0 <= fine.metrics["validation_accuracy"] <= 1
    refused = jobs["-1", "jacobian_robust.models.LeNet"]
    assert refused.status == "failed"
    assert "optimizer" in refused.error
    killed = jobs["0.01", "tests.end_to_end.models.Killing"]
    assert killed.error == "its process was ended by SIGKILL: out of memory?"
    with (tmp_path / "sweep" / "jobs.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)].count("failed") == 3
    (weights,) = (tmp_path / "sweep").rglob("model.safetensors")
    written = weights.stat().st_mtime_ns
    assert "finished" in (weights.parent / "job.json").read_text()
    assert "epochs" in (weights.parent / "log.txt").read_text(), "what a job prints is kept in its directory"

    del sweep[2]  # the model: the default, and one job that finishes, two in all
    again = door("train", *sweep, "model._target_=jacobian_robust.models.LeNet", "resume=true")
    assert again.status == 1
    assert "1 of 2 jobs did not finish" in again.error
    assert "skipped" in again.stdout
    assert weights.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_job_that_finished_keeps_its_record(door, tmp_path):
    sweep = ["-m", "seed=0", *BRIEF, "hydra.sweep.dir=sweep"]
    assert door("train", *sweep).status == 0
    (record,) = (tmp_path / "sweep").glob("*/job.json")
    kept = record.read_text()
    again = door("train", *sweep)
    assert again.status == 0
    assert "already holds a result" in again.stderr
    assert record.read_text() == kept


@pytest.mark.slow
def test_an_option_that_one_choice_lacks_is_given_for_the_others(door, tmp_path):
    """``regularizer.probes=1`` alone is refused by the job without a penalty."""
    sweep = ["-m", "regularizer=none,frobenius", "++regularizer.probes=1", "data=toy", "model=mlp", "model.inputs=2"]
    sweep += ["model.classes=3", "trainer.max_epochs=1", "evaluate=false", "twin=false", "logger=csv"]
    assert door("train", *sweep, "hydra.sweep.dir=sweep").status == 0
    jobs = by_option(tmp_path / "sweep", "regularizer")
    assert {name: job.status for name, job in jobs.items()} == {("none",): "finished", ("frobenius",): "finished"}


@pytest.mark.slow
def test_slurms_launcher_runs_on_this_machine(door, tmp_path):
    result = door("train", "-m", "seed=3", *BRIEF, "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep")
    assert result.status == 0, result.stderr
    (job,) = read_jobs(tmp_path / "sweep").values()
    assert job.status == "finished"
    assert len(list((tmp_path / "sweep").rglob("summary.json"))) == 1


@pytest.mark.slow
def test_ray_runs_a_sweep(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    command = [sys.executable, str(ROOT / "train.py"), "-m", "seed=0,1", *BRIEF, "hydra/launcher=ray"]
    subprocess.run([*command, "hydra.sweep.dir=sweep"], cwd=tmp_path, check=True, timeout=300)
    assert [job.status for job in read_jobs(tmp_path / "sweep").values()] == ["finished"] * 2


@pytest.mark.slow
def test_a_job_whose_sweep_was_killed_ends_and_is_gone_on_with(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "-m", "seed=0", *SHORT, "logger=csv", "regularizer=none"]
    command += ["trainer.limit_train_batches=20", "hydra.sweep.dir=sweep", "resume=true"]
    process = subprocess.Popen([*command, "trainer.max_epochs=3000"], cwd=tmp_path, start_new_session=True)
    while not list((tmp_path / "sweep").rglob("last.ckpt")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(600):
        running = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout
        if not running:
            break
        time.sleep(0.1)
    assert not running, "the job ends when nothing takes its result"
    (job,) = read_jobs(tmp_path / "sweep").values()
    assert job.status == "running"
    (metrics,) = (tmp_path / "sweep").rglob("metrics.csv")
    assert metrics.read_text().count("\n") > 1


def search(*options):
    return ["hparams_search=optuna", *SHORT, "logger=csv", "trainer.max_epochs=2", "trainer.limit_train_batches=2",
            "regularizer.probes=1", "regularizer.delta_over_eps=0.002", "monitor_attack_images=10",
            "attack.pgd_linf.steps=2", "hydra.sweep.dir=search", *options]  # fmt: skip


@pytest.mark.slow
def test_a_search_prunes_and_goes_on_with_what_was_cut_short(door, tmp_path):
    (tmp_path / "search").mkdir()
    storage = str(tmp_path / "search" / "study.journal")
    study = open_study(storage, "jacobian_robust", direction="maximize")
    begun = study.ask(
        {"eta.max": distribution("eta.max", "tag(log, interval(0.002, 0.2))")}
    )  # and its process was killed
    threshold = ["search.pruner._target_=optuna.pruners.ThresholdPruner", "+search.pruner.lower=2.0"]
    threshold += ["~search.pruner.n_startup_trials", "~search.pruner.n_warmup_steps"]
    refused = door("train", *search("hydra.sweeper.trials=1"))
    assert "resume=true goes on with it" in refused.error
    result = door("train", *search("hydra.sweeper.trials=1", "resume=true"))
    assert result.status == 0, result.stderr
    result = door("train", *search("hydra.sweeper.trials=2", "resume=true", *threshold))
    assert result.status == 0, result.stderr
    first, second = open_study(storage, "jacobian_robust").trials
    assert first.params == begun.params
    assert first.state == TrialState.COMPLETE
    assert sorted(first.intermediate_values) == [1, 2]
    assert second.state == TrialState.PRUNED, "no accuracy reaches 2"
    assert sorted(second.intermediate_values) == [1]
    jobs = by_option(tmp_path / "search", "search.trial")
    assert (jobs["0",].status, jobs["1",].status) == ("finished", "pruned")
    assert first.value == jobs["0",].metrics["validation_robust_accuracy"]
    best = yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())
    assert (best["trial"], best["options"]) == (0, first.params)
    summaries = sorted(len(path.read_text().splitlines()) for path in (tmp_path / "search").rglob("metrics.csv"))
    assert summaries == [2, 3], "a header; one epoch, and two"
    done = door("train", *search("hydra.sweeper.trials=2", "resume=true"))
    assert done.status == 0
    assert len(open_study(storage, "jacobian_robust").trials) == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["objective=null"], "objective: name the metric to search by"),
        (["+hydra.sweeper.params.seed=3"], "seed=3: say where to look"),
        (["eta.max=0.5"], "hydra.sweeper.params is empty"),
        (["hydra.sweeper.trials=0"], "trials"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(door, options, error):
    result = door("train", *search("hydra.sweeper.trials=1", *options))
    assert result.status == 1
    assert error in result.error


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["objective=accuracy"], "objective=accuracy: a search goes by one of"),
        (["monitor_attack_images=0"], "needs monitor_attack_images"),
        (["data.validation_size=0", "data.validate_on_test=true"], "a search must not see the test images"),
        (["search.study=null"], "search.trial needs search.storage and search.study"),
    ],
)
def test_a_trial_that_cannot_be_is_refused(tmp_path, options, error):
    trial = [
        "search.trial=0",
        f"search.storage={tmp_path}/study.journal",
        "search.study=s",
        f"output_dir={tmp_path}/run",
    ]
    objective = ["objective=validation_robust_accuracy", "monitor_attack_images=10"]
    with pytest.raises(UserError, match=error):
        train(composed("train", *SHORT, *objective, *trial, *options))


@pytest.mark.usefixtures("forking")
def test_a_job_returns_its_objective(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = [*BRIEF, *TOY, "objective=validation_accuracy", "hydra.mode=MULTIRUN", f"output_dir={tmp_path}"]
        cfg = compose("train", options, return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(tmp_path)
        cfg.hydra.job.num = 0
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    value = run_job("jacobian_robust.training.train.train", own)
    job = read_job(tmp_path)
    assert value == job.metrics["validation_accuracy"]
    own.objective = "no such metric"
    assert math.isnan(run_job("jacobian_robust.training.train.train", own))


@pytest.mark.slow
def test_a_wandb_agent_finds_its_command_its_metric_and_its_run(door, tmp_path):
    described = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    _, python, program, arguments, *fixed = described["command"]
    assert (python, program, arguments) == ("python", "${program}", "${args_no_hyphens}")
    assert described["program"] == "train.py"
    drawn = [f"{name}={p.get('values', [p.get('max')])[-1]}" for name, p in described["parameters"].items()]
    brief = [*SHORT, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger.offline=true"]
    small = ["monitor_attack_images=10", "attack.pgd_linf.steps=1", "hydra.run.dir=run"]
    wandb.teardown()  # it has read the environment, if an earlier test logged
    with pytest.MonkeyPatch.context() as agent:
        agent.setenv("WANDB_RUN_ID", "asked4")
        agent.setenv("WANDB_SWEEP_ID", "sweep")
        assert door("train", *drawn, *fixed, *brief, *small).status == 0
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*-asked4")
    logged = {key for row in wandb_records.history(wandb_records.read_records(offline)) for key in row}
    assert described["metric"]["name"] in logged

"""The runs of a training, one after another, and the evaluation that follows them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.config import build, plain
from jacobian_robust.evaluation.classifiers import load_classifiers
from jacobian_robust.evaluation.evaluate import report
from jacobian_robust.evaluation.options import Evaluation
from jacobian_robust.reporting.wandb import WandbOptions
from jacobian_robust.training.build import Run
from jacobian_robust.training.distributed import rank
from jacobian_robust.training.fit import fit, fit_alone, group
from jacobian_robust.training.options import UNRECORDED, Options


def train_each(
    runs: list[Run],
    cfg: DictConfig,
    options: Options,
    evaluation: Evaluation | None,
    logger: WandbOptions | None,
    directory: Path,
) -> dict[str, float | int]:
    """Train one run after another, and attack what they trained if that is wanted; return their metrics."""
    metrics: dict[str, float | int] = {}
    for run in runs:
        twin = runs[0].record.rows if options.twin and run is not runs[0] else None
        if run.done:
            Console().print(f"[bold]{run.name}[/bold]: trained already → {run.directory}")
            ended = _recalled(run)
        elif rank() == 0:
            ended = fit(run, logger, options, twin, group(options))
        else:
            # Layers that draw, as dropout does, draw something else for each part of a batch.
            (seed,) = np.random.SeedSequence([options.seed, rank()]).generate_state(1).tolist()
            pl.seed_everything(seed, workers=True, verbose=False)
            fit_alone(run, options)
            ended = dict(run.record.rows[-1])
        metrics |= {_prefix(run, runs, options) + key: value for key, value in ended.items()}
    if dist.is_initialized():
        dist.destroy_process_group()
    if evaluation is not None and rank() == 0:
        metrics |= _evaluate(runs, cfg, options, evaluation, logger, directory / "evaluation")
    return metrics


def _recalled(run: Run) -> dict[str, float | int]:
    """Return the metrics of a run that has ended, here or in other processes."""
    checkpoint = load_checkpoint(run.last_checkpoint)
    run.record.rows = checkpoint.rows
    run.module.wandb = checkpoint.wandb
    pruned = json.loads((run.directory / "summary.json").read_text(encoding="utf-8")).get("pruned")
    return dict(checkpoint.rows[-1]) | ({"pruned": True} if pruned else {})


def _evaluate(
    runs: list[Run],
    cfg: DictConfig,
    options: Options,
    evaluation: Evaluation,
    logger: WandbOptions | None,
    directory: Path,
) -> dict[str, float | int]:
    """Attack what was trained, and return the accuracies."""
    try:
        checkpoints = [load_checkpoint(run.last_checkpoint) for run in runs]
        # A file must not choose a class of somebody's own: the command did, and is trusted.
        networks = [
            None if checkpoint.brings_model else build(run.cfg, "model", nn.Module)
            for checkpoint, run in zip(checkpoints, runs, strict=True)
        ]
        if not checkpoints[0].brings_data:
            evaluation = replace(evaluation, data=runs[0].datamodule)
        results = report(
            load_classifiers(checkpoints, evaluation, network=networks),
            evaluation,
            network=networks[int(options.twin)],
            directory=directory,
            logger=logger,
            group=group(options),
            config=plain(cfg, without=UNRECORDED),
            resume=options.resume,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the training is done; the same options with hydra.run.dir={directory.parent} and resume=true go on"
        ) from None
    return {
        f"{_prefix(run, runs, options)}robust_accuracy_{threat.norm}_{budget.eps:g}": budget.robust_accuracy
        for run, model in zip(runs, results.models, strict=True)
        for threat in model.threats
        for budget in threat.budgets
    }


def _prefix(run: Run, runs: list[Run], options: Options) -> str:
    """Return what precedes the names of a run's metrics: nothing for the run itself."""
    position = runs.index(run) - options.twin
    return "twin_" if position < 0 else f"{run.name}_" if position else ""

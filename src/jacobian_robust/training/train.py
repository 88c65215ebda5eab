"""From a config to a trained classifier and the files that tell of it."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch.distributed as dist
from lightning_fabric.utilities.rank_zero import _get_rank
from omegaconf import DictConfig, open_dict
from rich.console import Console

from jacobian_robust.checkpoints import load_checkpoint
from jacobian_robust.config import check, plain, read_options, without_none
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.classifiers import load_classifiers
from jacobian_robust.evaluation.evaluate import report
from jacobian_robust.evaluation.options import EVALUATION_OPTIONS, Evaluation, read_evaluation
from jacobian_robust.evaluation.transfer import require_possible
from jacobian_robust.files import RESULTS, claimed, from_here
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.reporting.wandb import WandbOptions, read_logger
from jacobian_robust.training.build import Run, assemble, trainer_arguments
from jacobian_robust.training.checks import (
    check_objective,
)
from jacobian_robust.training.fit import fit, fit_alone, group
from jacobian_robust.training.options import (
    GROUPS,
    MAY_BE_NONE,
    MAY_DIFFER,
    UNRECORDED,
    Options,
    label,
)
from jacobian_robust.training.unused import check_used, given_on_the_command_line

__all__ = ["train", "trainer_arguments"]


def train(cfg: DictConfig) -> dict[str, float | int]:
    """Train as ``conf/train.yaml`` describes, and return the last epoch's metrics.

    With ``twin=true`` the undefended twin is trained first, and its metrics are returned with the prefix ``twin_``;
    those of a run in ``beside`` are returned with its name as a prefix. With ``evaluate=true`` the accuracies under
    attack are returned, too, as ``robust_accuracy_NORM_EPS``. All parts are made, and all options checked, before the
    first step.

    Raises:
        UserError: if an option, a file or a directory is at fault.
    """
    keep_freed_memory()
    check(cfg, {*Options.model_fields, *EVALUATION_OPTIONS}, GROUPS)
    cfg = without_none(cfg, MAY_BE_NONE)
    check_used(cfg, given_on_the_command_line())
    options = read_options(Options, cfg)
    logger = read_logger(cfg)
    asked = read_evaluation(cfg) if options.evaluate or cfg.get("attack") else None  # what is not used is checked too
    evaluation = asked if options.evaluate else None
    if (options.twin or options.beside) and options.ckpt_path:
        raise UserError("ckpt_path resumes one run: set twin=false and leave beside empty")
    if options.objective is not None:
        check_objective(options.objective, options, evaluation)
    directory = from_here(options.output_dir)
    name = options.name or label(cfg)
    if not (options.twin or options.beside):
        runs = [assemble(cfg, options, name, directory, measured_as=cfg)]
    else:
        configs = _side_by_side(cfg, options, name)
        runs = [assemble(one, options, key, directory / key, measured_as=cfg) for key, one in configs.items()]
    if evaluation is not None:
        require_possible(evaluation, runs[0].datamodule, len(runs))
    with contextlib.ExitStack() as claims:
        if _rank():  # the first process has claimed the directories, and is the only one to write there
            return _train(runs, cfg, options, evaluation, logger, directory)
        # The outer directory first: it says whether the inner ones are this run's to go on with.
        claims.enter_context(claimed(directory, plain(cfg, without=UNRECORDED), resume=options.resume))
        for run in runs if len(runs) > 1 else ():
            config = plain(run.cfg, without=UNRECORDED)
            claims.enter_context(claimed(run.directory, config, resume=options.resume))
        return _train(runs, cfg, options, evaluation, logger, directory)


def _side_by_side(cfg: DictConfig, options: Options, name: str) -> dict[str, DictConfig]:
    """Return the configs of several runs by name: the undefended twin, the run itself, and those of ``beside``."""
    if options.twin and not (cfg.regularizer or cfg.adversary):
        raise UserError(
            "twin=true trains an undefended twin beside a penalty or an adversary: choose one, as regularizer=frobenius"
        )
    undefended = {"regularizer": None, "adversary": None, "eps_schedule": None}
    others = ({"vanilla": undefended} if options.twin else {}) | {name: {}} | options.beside
    if len(others) < options.twin + 1 + len(options.beside) or set(others) & set(RESULTS):
        raise UserError(
            f"name={name}: a run beside it, or a file, is called so, and each has a directory of its name; choose "
            "another name"
        )
    configs = {}
    for key, differences in others.items():
        if unknown := set(differences) - set(MAY_DIFFER):
            raise UserError(
                f"beside.{key}.{min(unknown)}: what runs side by side may differ in is {', '.join(MAY_DIFFER)}"
            )
        configs[key] = cfg.copy()
        with open_dict(configs[key]):
            for group, choice in differences.items():
                configs[key][group] = choice  # in place of the run's own, not merged with it
        configs[key] = without_none(configs[key], MAY_BE_NONE)
    return configs


def _train(
    runs: list[Run],
    cfg: DictConfig,
    options: Options,
    evaluation: Evaluation | None,
    logger: WandbOptions | None,
    directory: Path,
) -> dict[str, float | int]:
    metrics: dict[str, float | int] = {}
    for run in runs:
        twin = runs[0].record.rows if options.twin and run is not runs[0] else None
        if run.done:
            Console().print(f"[bold]{run.name}[/bold]: trained already → {run.directory}")
            ended = _recalled(run)
        elif _rank() == 0:
            ended = fit(run, logger, options, twin, group(options))
        else:
            # Layers that draw, as dropout does, draw something else for each part of a batch.
            (seed,) = np.random.SeedSequence([options.seed, _rank()]).generate_state(1).tolist()
            pl.seed_everything(seed, workers=True, verbose=False)
            fit_alone(run, options)
            ended = dict(run.record.rows[-1])
        metrics |= {_prefix(run, runs, options) + key: value for key, value in ended.items()}
    if dist.is_initialized():
        dist.destroy_process_group()
    if evaluation is not None and _rank() == 0:
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
        results = report(
            load_classifiers([load_checkpoint(run.last_checkpoint) for run in runs], evaluation),
            evaluation,
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


def _rank() -> int:
    """Return the rank of this process, from the environment of whoever started it; 0 for one alone."""
    return _get_rank() or 0

"""From a config to a trained classifier and the files that tell of it."""

import contextlib

from omegaconf import DictConfig, open_dict
from torch import nn, optim

from jacobian_robust.adversaries import Adversary
from jacobian_robust.config import build, check, plain, read_options, without_none
from jacobian_robust.data import Augmentation, ImageDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.options import EVALUATION_OPTIONS, read_evaluation
from jacobian_robust.evaluation.transfer import require_possible
from jacobian_robust.files import RESULTS, claimed, from_here
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.penalties import Penalty
from jacobian_robust.reporting.wandb import read_logger
from jacobian_robust.training.options import (
    GROUPS,
    MAY_BE_NONE,
    MAY_DIFFER,
    UNRECORDED,
    Options,
    check_objective,
    label,
    trainer_options,
)
from jacobian_robust.training.schedules import EpsSchedule, EtaSchedule, Schedule
from jacobian_robust.training.unused import check_used, given_on_the_command_line

__all__ = ["train"]


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
    several = bool(options.twin or options.beside)
    configs = _side_by_side(cfg, options, name) if several else {name: cfg}
    for one in configs.values():
        _check_parts(one)

    # Not at the top: Lightning's import takes longer than all that was checked until here.
    from jacobian_robust.training.build import assemble
    from jacobian_robust.training.distributed import rank
    from jacobian_robust.training.runs import train_each

    runs = [
        assemble(one, options, key, directory / key if several else directory, measured_as=cfg)
        for key, one in configs.items()
    ]
    if evaluation is not None:
        require_possible(evaluation, runs[0].datamodule, [run.module.model for run in runs])
    with contextlib.ExitStack() as claims:
        if rank():  # the first process has claimed the directories, and is the only one to write there
            return train_each(runs, cfg, options, evaluation, logger, directory)
        # The outer directory first: it says whether the inner ones are this run's to go on with.
        claims.enter_context(claimed(directory, plain(cfg, without=UNRECORDED), resume=options.resume))
        for run in runs if several else ():
            config = plain(run.cfg, without=UNRECORDED)
            claims.enter_context(claimed(run.directory, config, resume=options.resume))
        return train_each(runs, cfg, options, evaluation, logger, directory)


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


def _check_parts(cfg: DictConfig) -> None:
    """Raise a UserError for a wrong option of a part; those that take time to make are only looked at."""
    trainer_options(cfg)
    build(cfg, "data", ImageDataModule, partial=True)
    build(cfg, "augmentation", Augmentation, optional=True)
    build(cfg, "model", nn.Module, partial=True)
    build(cfg, "regularizer", Penalty, optional=True)
    build(cfg, "adversary", Adversary, optional=True)
    build(cfg, "eta", EtaSchedule)
    build(cfg, "eps_schedule", EpsSchedule, optional=True)
    build(cfg, "optimizer", optim.Optimizer, partial=True)
    build(cfg, "scheduler", Schedule, optional=True)

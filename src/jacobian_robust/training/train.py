"""From a config to a trained classifier and the files that tell of it."""

import contextlib
import copy
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.rank_zero import _get_rank
from omegaconf import DictConfig, open_dict
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console
from rich.table import Table
from torch import nn

from jacobian_robust.adversaries import Adversary
from jacobian_robust.attacks import Attack, Transfer
from jacobian_robust.checkpoints import export, find_checkpoints, load_checkpoint
from jacobian_robust.config import build, build_each, check, flat, plain, read_options, settled
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import Terminated, UserError, describe
from jacobian_robust.evaluation.classifiers import load_classifiers
from jacobian_robust.evaluation.evaluate import report
from jacobian_robust.evaluation.options import EVALUATION_GROUPS, EVALUATION_OPTIONS, Evaluation, read_evaluation
from jacobian_robust.evaluation.transfer import require_possible
from jacobian_robust.files import RESULTS, claimed, from_here, write_atomically
from jacobian_robust.jacobian.checks import check_model
from jacobian_robust.memory import keep_freed_memory, rare_garbage_collection
from jacobian_robust.options import STRICT, Count, Flag, NonEmpty, Seed, Size
from jacobian_robust.penalties import Amortization, Penalty, note_condition
from jacobian_robust.provenance import git_state, versions
from jacobian_robust.reporting.figures import training_curves
from jacobian_robust.reporting.wandb import WandbOptions, full_id, log_training, read_logger, wandb_run
from jacobian_robust.training.averaging import MovingAverage
from jacobian_robust.training.callbacks import (
    COLUMNS,
    METRICS,
    AttackMonitor,
    EpochRecord,
    EpsSchedule,
    EtaSchedule,
    JacobianMonitor,
    Monitor,
    TrainingProgress,
)
from jacobian_robust.training.checkpointing import Intervals, RunCheckpoint, newest_checkpoint
from jacobian_robust.training.datamodule import LightningImages
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.schedules import Schedule
from jacobian_robust.training.unused import check_used, given_on_the_command_line

if TYPE_CHECKING:
    from jacobian_robust.training.search import Pruning

__all__ = ["train", "trainer_arguments"]

NOT_IN_CHECKPOINT = (
    *("output_dir", "ckpt_path", "resume", "checkpoints", "logger", "twin", "name", "objective", "search"),
    "cuda_graph",
    *("evaluate", "suite", *EVALUATION_GROUPS),
    *(option for option in EVALUATION_OPTIONS if option != "seed"),
)
"""Keys of the config that do not shape the trained network."""

GROUPS = (
    *("data", "model", "regularizer", "adversary", "eta", "eps_schedule", "optimizer", "scheduler"),
    *("averaging", "trainer", "logger", *EVALUATION_GROUPS),
)

MAY_BE_NONE = ("regularizer", "adversary", "eps_schedule", "scheduler", "averaging")

UNRECORDED = ("resume", "processes", "cuda_graph")
"""Keys of the config that do not shape the results: a run may be resumed with others."""

SET_HERE = (
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "fast_dev_run",
    "inference_mode",
    "logger",
    "num_sanity_val_steps",
    "use_distributed_sampler",
)
"""Arguments of Lightning's Trainer that are not the user's to choose."""


class _TrainerOptions(BaseModel):
    """What Lightning would accept of its Trainer's arguments and choke on later, or do something else with."""

    model_config = ConfigDict(strict=True, extra="allow")

    max_epochs: Count
    gradient_clip_val: PositiveFloat | None = None  # a negative one would turn the gradient round
    max_steps: int = Field(-1, ge=-1, lt=2**31)
    min_steps: Count | None = None
    min_epochs: Count | None = None
    check_val_every_n_epoch: Count | None = 1
    accumulate_grad_batches: Count = 1
    log_every_n_steps: Size | None = None
    reload_dataloaders_every_n_epochs: Size = 0


class _Search(BaseModel):
    """Which trial of which study a training is; it is none without a number."""

    model_config = STRICT

    storage: NonEmpty | None
    study: NonEmpty | None
    trial: Size | None
    pruner: dict[str, Any] | None


class _Options(BaseModel):
    """The scalars of ``conf/train.yaml``."""

    seed: Seed
    twin: Flag
    evaluate: Flag
    ckpt_path: NonEmpty | None
    resume: Flag
    checkpoints: Intervals
    monitor_images: Size
    monitor_attack_images: Size
    objective: NonEmpty | None
    search: _Search
    output_dir: NonEmpty
    amortization: Amortization
    cuda_graph: Flag | Literal["auto"]
    name: str | None = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,=+-]*$")


@dataclass
class _Run:
    """One training, assembled and checked but not begun."""

    cfg: DictConfig
    name: str
    directory: Path
    module: RobustClassifier
    datamodule: ImageDataModule
    trainer: pl.Trainer
    record: EpochRecord
    pruning: "Pruning | None"
    checkpoint: Path | None
    done: bool

    @property
    def last_checkpoint(self) -> Path:
        return self.directory / "checkpoints" / "last.ckpt"


def train(cfg: DictConfig) -> dict[str, float | int]:
    """Train as ``conf/train.yaml`` describes, and return the last epoch's metrics.

    With ``twin=true`` the undefended twin is trained first, and its metrics are returned with the prefix ``twin_``;
    with ``evaluate=true`` the accuracies under attack are, as ``robust_accuracy_NORM_EPS``. All parts are made, and all
    options checked, before the first step.

    Raises:
        UserError: if an option, a file or a directory is at fault.
    """
    keep_freed_memory()
    check(cfg, {*_Options.model_fields, *EVALUATION_OPTIONS}, GROUPS)
    cfg = settled(cfg, MAY_BE_NONE)
    check_used(cfg, given_on_the_command_line())
    options = read_options(_Options, cfg)
    logger = read_logger(cfg)
    asked = read_evaluation(cfg) if options.evaluate or cfg.get("attack") else None  # what is not used is checked too
    evaluation = asked if options.evaluate else None
    if options.twin and options.ckpt_path:
        raise UserError("ckpt_path resumes one run: set twin=false")
    if options.objective is not None:
        _check_objective(options.objective, options, evaluation)
    directory = from_here(options.output_dir)
    name = options.name or _label(cfg)
    if options.twin:
        if not (cfg.regularizer or cfg.adversary):
            raise UserError(
                "twin=true trains an undefended twin beside a penalty or an adversary: choose one, as "
                "regularizer=frobenius"
            )
        if name in ("vanilla", *RESULTS):
            raise UserError(f"name={name}: with twin=true a directory beside the run is called so; choose another name")
        undefended = cfg.copy()
        with open_dict(undefended):
            undefended.regularizer = undefended.adversary = undefended.eps_schedule = None
        runs = [
            _assemble(undefended, options, _label(undefended), directory / _label(undefended), measured_as=cfg),
            _assemble(cfg, options, name, directory / name, measured_as=cfg),
        ]
    else:
        runs = [_assemble(cfg, options, name, directory, measured_as=cfg)]
    if evaluation is not None:
        require_possible(evaluation, runs[0].datamodule, len(runs))
    with contextlib.ExitStack() as claims:
        if _rank():  # the first process has claimed the directories, and is the only one to write there
            return _train(runs, cfg, options, evaluation, logger, directory)
        # The outer directory first: it says whether the inner ones are this run's to go on with.
        claims.enter_context(claimed(directory, plain(cfg, without=UNRECORDED), resume=options.resume))
        for run in runs if options.twin else ():
            config = plain(run.cfg, without=UNRECORDED)
            claims.enter_context(claimed(run.directory, config, resume=options.resume))
        return _train(runs, cfg, options, evaluation, logger, directory)


def _train(
    runs: list[_Run],
    cfg: DictConfig,
    options: _Options,
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
            ended = _fit(run, logger, options, twin, _group(options))
        else:
            # Layers that draw, as dropout does, draw something else for each part of a batch.
            (seed,) = np.random.SeedSequence([options.seed, _rank()]).generate_state(1).tolist()
            pl.seed_everything(seed, workers=True, verbose=False)
            _fit_alone(run, options)
            ended = dict(run.record.rows[-1])
        metrics = {f"twin_{key}": value for key, value in metrics.items()} | ended
    if dist.is_initialized():
        dist.destroy_process_group()
    if evaluation is not None and _rank() == 0:
        metrics |= _evaluate(runs, cfg, options, evaluation, logger, directory / "evaluation")
    return metrics


def _recalled(run: _Run) -> dict[str, float | int]:
    """Return the metrics of a run that has ended, here or in other processes."""
    checkpoint = load_checkpoint(run.last_checkpoint)
    run.record.rows = checkpoint.rows
    run.module.wandb = checkpoint.wandb
    pruned = json.loads((run.directory / "summary.json").read_text(encoding="utf-8")).get("pruned")
    return dict(checkpoint.rows[-1]) | ({"pruned": True} if pruned else {})


def _evaluate(
    runs: list[_Run],
    cfg: DictConfig,
    options: _Options,
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
            group=_group(options),
            config=plain(cfg, without=UNRECORDED),
            resume=options.resume,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the training is done; the same options with hydra.run.dir={directory.parent} and resume=true go on"
        ) from None
    return {
        f"{prefix}robust_accuracy_{threat.norm}_{budget.eps:g}": budget.robust_accuracy
        for prefix, model in zip(["twin_", ""][-len(runs) :], results.models, strict=True)
        for threat in model.threats
        for budget in threat.budgets
    }


def _check_objective(objective: str, options: _Options, evaluation: Evaluation | None) -> None:
    """Raise a UserError unless a training returns this metric: a sweep would see nan and say nothing."""
    attacks = evaluation.attacks if evaluation is not None else ()
    attacked = [f"robust_accuracy_{attack.norm}_{eps:g}" for attack in attacks for eps in attack.eps]
    known = [*COLUMNS, *dict.fromkeys(attacked)]
    if objective not in known and not (options.twin and objective.removeprefix("twin_") in known):
        raise UserError(f"objective={objective}: a search goes by one of {', '.join(known)}")
    if objective.endswith("robust_accuracy") and not options.monitor_attack_images:
        raise UserError(f"objective={objective} needs monitor_attack_images, the number of images to attack, as 500")


def _trainer_options(cfg: DictConfig) -> _TrainerOptions:
    if not isinstance(cfg.get("trainer"), DictConfig):
        raise UserError("trainer is empty: choose one, trainer=NAME, of those in conf/trainer")
    try:
        return _TrainerOptions.model_validate(plain(cfg.trainer))
    except ValidationError as error:
        raise UserError(describe(error, "trainer")) from error


def _label(cfg: DictConfig) -> str:
    """Return the short name of what distinguishes a run: its penalty and its adversary, as ``margin+pgd``.

    A run without either is ``vanilla``, the note's word.
    """
    chosen = [cfg[group] for group in ("regularizer", "adversary") if cfg[group]]
    names = [str(group.get("_target_", "")).rpartition(".")[-1].lower() for group in chosen]
    return "+".join(names) or "vanilla"


def _assemble(
    cfg: DictConfig,
    options: _Options,
    name: str,
    directory: Path,
    *,
    measured_as: DictConfig,
) -> _Run:
    """Make all parts of a run.

    ``measured_as`` is the config whose penalty says what eq. 14 is measured with.
    """
    config = plain(cfg, without=NOT_IN_CHECKPOINT)
    epochs = _trainer_options(cfg).max_epochs
    if cfg.trainer.get("limit_train_batches", 1) == 0:
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on; give a share or a number of batches")
    pl.seed_everything(options.seed, workers=True, verbose=False)
    datamodule: ImageDataModule = build(cfg, "data", ImageDataModule, shuffle_seed=options.seed)
    model: nn.Module = build(cfg, "model", nn.Module)
    _check_fit(model, datamodule, cfg.model)
    penalty: Penalty | None = build(cfg, "regularizer", Penalty, optional=True)
    if penalty is not None and penalty.needs_graph:
        _check_differentiable(model, datamodule, cfg.model)
    if penalty is not None and penalty.takes_probabilities:
        _check_probabilities(model, datamodule)
    adversary: Adversary | None = build(cfg, "adversary", Adversary, optional=True)
    if adversary is not None and adversary.idle(penalised=penalty is not None):
        raise UserError(
            "adversary: nothing of the loss is taken at the displaced images; give adversary.fit_at=adversary, or "
            "adversary.penalty_at=adversary and a penalty, or adversary=none"
        )
    eta: EtaSchedule = build(cfg, "eta", EtaSchedule)
    rise: EpsSchedule | None = build(cfg, "eps_schedule", EpsSchedule, optional=True)
    if rise is not None:
        if penalty is None:
            raise UserError("eps_schedule: there is no penalty whose radius could rise; give eps_schedule=none")
        penalty.with_radius(rise.start)
    optimizer: Callable[..., torch.optim.Optimizer] = build(cfg, "optimizer", torch.optim.Optimizer, partial=True)
    try:
        optimizer(model.parameters())
    except (TypeError, ValueError) as error:
        raise UserError(describe(error, "optimizer")) from error
    schedule: Schedule | None = build(cfg, "scheduler", Schedule, optional=True)
    average: MovingAverage | None = build(cfg, "averaging", MovingAverage, optional=True)
    done = options.resume and (directory / "summary.json").is_file()
    resumed = None
    if options.ckpt_path:
        resumed = _check_resumable(options.ckpt_path, config, epochs)
    if options.resume:  # of the same configuration, as the directory's config.yaml shows
        resumed = newest_checkpoint(directory / "checkpoints") or resumed
    datamodule.prepare_data()

    module = RobustClassifier(
        model,
        optimizer,
        penalty,
        adversary=adversary,
        amortization=options.amortization,
        seed=options.seed,
        cuda_graph=options.cuda_graph,
        config=config,
    )
    measured: Penalty | None = build(measured_as, "regularizer", Penalty, optional=True)
    condition = measured.condition(datamodule.classes) if measured is not None else None
    eps, bound = condition or note_condition(datamodule.classes)
    monitors: list[Monitor] = [JacobianMonitor(options.monitor_images, eps=eps, bound=bound)]
    if options.monitor_attack_images:
        monitors.append(AttackMonitor(options.monitor_attack_images, _first_attack(cfg)))
    for monitor in monitors:
        monitor.average = average
    record = EpochRecord(directory / "metrics.csv", monitors, rise)
    callbacks: list[pl.Callback] = [*monitors, record]
    pruning = None if options.search.trial is None else _pruning(cfg, options, record)
    if pruning is not None:
        callbacks.append(pruning)
    callbacks.append(RunCheckpoint(directory / "checkpoints", options.checkpoints))
    if penalty is not None:
        callbacks.insert(0, eta)
    callbacks[:0] = [callback for callback in (schedule, rise, average) if callback is not None]
    if cfg.trainer.get("enable_progress_bar", True):
        callbacks.append(TrainingProgress())
    if taken := [key for key in SET_HERE if key in cfg.trainer]:
        raise UserError(f"trainer.{taken[0]} is set by the framework and cannot be chosen")
    try:
        with _quiet():
            arguments = trainer_arguments(callbacks, directory)
            trainer: pl.Trainer = build(cfg, "trainer", pl.Trainer, partial=True)(**arguments)
    except UserError:
        raise
    except Exception as error:  # Lightning has no common exception for a bad argument
        raise UserError(describe(error, "trainer")) from error
    _check_devices(trainer, cfg)
    if average is not None and trainer.precision in ("16-true", "bf16-true"):
        # The average moves by less than their last digit.
        raise UserError(f"averaging: not in half precision; give trainer.precision={trainer.precision[:-4]}mixed")
    return _Run(cfg, name, directory, module, datamodule, trainer, record, pruning, resumed, done)


def _first_attack(cfg: DictConfig) -> Attack:
    """Return the attack that watches over a training."""
    attack: Attack = build_each(cfg, "attack", Attack)[0]
    if isinstance(attack, Transfer):
        raise UserError(
            "monitor_attack_images: an attack of the network itself has to come first in attack=, not transfer"
        )
    return attack


def _pruning(cfg: DictConfig, options: _Options, record: EpochRecord) -> "Pruning":
    """Return the callback through which a trial of a search reports."""
    from optuna.pruners import BasePruner, NopPruner  # not at the top: few trainings are a trial

    from jacobian_robust.training.search import Pruning

    assert options.search.trial is not None
    search, objective = options.search, options.objective
    epochs = [f"{stage}_{name}" for stage in ("train", "validation") for name in METRICS]
    if objective not in epochs:
        raise UserError(f"objective={objective}: a search goes by one of {', '.join(epochs)}")
    if cfg.data.get("validate_on_test"):
        raise UserError("data.validate_on_test=true: a search must not see the test images; set data.validation_size")
    if search.storage is None or search.study is None:
        raise UserError("search.trial needs search.storage and search.study; hparams_search=optuna fills them in")
    pruner = build(cfg.search, "pruner", BasePruner, optional=True) or NopPruner()
    return Pruning(search.storage, search.study, options.search.trial, pruner, record, objective)


def _rank() -> int:
    """Return the rank of this process, from the environment of whoever started it; 0 for one alone."""
    return _get_rank() or 0


def _check_devices(trainer: pl.Trainer, cfg: DictConfig) -> None:
    """Raise a UserError unless training runs on one device, or on several by Lightning's ``ddp``."""
    strategy = trainer.strategy
    by_script = isinstance(strategy, DDPStrategy) and strategy._start_method == "popen"
    if not by_script and not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(f"trainer.strategy={cfg.trainer.get('strategy')}: for several devices there is trainer=ddp")
    if trainer.world_size == 1 or not HydraConfig.initialized():
        return
    environment = getattr(strategy, "cluster_environment", None)
    started_elsewhere = environment is not None and environment.creates_processes_externally
    named = any(option.startswith("hydra.run.dir=") for option in HydraConfig.get().overrides.hydra)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError("trainer=ddp: not in a sweep, which each process would start; train on one device each")
    if started_elsewhere and not named:
        raise UserError("several processes need the same run directory: give hydra.run.dir")


def trainer_arguments(callbacks: list[pl.Callback], directory: Path) -> dict[str, Any]:
    """Return what the framework, not the user, says to Lightning's Trainer."""
    return {
        "callbacks": callbacks,
        "logger": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "inference_mode": False,  # the norm of the Jacobian needs gradients in validation too
        "use_distributed_sampler": False,  # the datamodule makes its own
        "default_root_dir": str(directory),
    }


def _check_fit(model: nn.Module, datamodule: ImageDataModule, options: Mapping[str, Any]) -> None:
    """Raise a UserError unless the model maps the data's images to a logit for each class."""
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *datamodule.image_shape))
    except RuntimeError as error:
        shape = datamodule.image_shape
        fitting = {"channels": shape[0], "image_size": shape[-1], "inputs": math.prod(shape)}
        wrong = [f"model.{name}={value}" for name, value in fitting.items() if options.get(name, value) != value]
        remedy = f"give {' '.join(wrong)}" if wrong else describe(error)
        raise UserError(f"model: takes no images of the data's shape {shape}: {remedy}") from error
    if logits.shape != (2, datamodule.classes):
        raise UserError(
            f"model.classes={logits.shape[-1]}: the data has {datamodule.classes} classes, and the model must return "
            f"(batch, {datamodule.classes}) logits, not {tuple(logits.shape)} for a batch of 2"
        )
    model.train(training)


def _check_differentiable(model: nn.Module, datamodule: ImageDataModule, options: Mapping[str, Any]) -> None:
    """Raise a UserError unless the gradient of the Jacobian's norm through the model is what it should be."""
    images = torch.rand(4, *datamodule.image_shape, generator=torch.Generator().manual_seed(0))
    try:
        check_model(copy.deepcopy(model), images)
    except ValueError as error:
        remedy = "; give model.norm=group" if options.get("norm") == "batch" else ""
        raise UserError(f"model: cannot be trained with a penalty on its Jacobian: {error}{remedy}") from error


def _check_probabilities(model: nn.Module, datamodule: ImageDataModule) -> None:
    """Raise a UserError unless a model whose outputs are said to be probabilities returns such."""
    with torch.no_grad():
        outputs = copy.deepcopy(model)(torch.zeros(2, *datamodule.image_shape))
    if outputs.min() < 0 or (outputs.sum(-1) - 1).abs().max() > 1e-3:
        raise UserError(
            "regularizer.outputs=probabilities: the model's outputs are none; give outputs=logits, or a model that "
            "ends in a softmax, as model.double_softmax=true"
        )


def _check_resumable(place: str, config: Mapping[str, Any], epochs: int) -> Path:
    """Return the path of a checkpoint that this configuration can go on from."""
    found = find_checkpoints([place])
    if len(found) > 1:
        raise UserError(f"ckpt_path={place} stands for {len(found)} checkpoints; name one of them")
    checkpoint = load_checkpoint(found[0])
    if checkpoint.epochs is None or place.endswith(".safetensors"):
        raise UserError(f"ckpt_path={place}: a run goes on from its checkpoints/last.ckpt, not from weights alone")
    if checkpoint.epochs >= epochs:
        raise UserError(
            f"ckpt_path={place}: all {epochs} epochs are finished; raise trainer.max_epochs above {checkpoint.epochs}"
        )
    ours, theirs = (flat(c) for c in (config, checkpoint.config))
    for field in sorted(ours.keys() | theirs.keys()):
        change = f"{field} was {theirs.get(field)} and is {ours.get(field)}"
        if ours.get(field) == theirs.get(field) or field in ("data.root", "trainer.max_epochs"):
            continue
        if field.split(".")[0] in ("model", "data", "optimizer", "averaging", "seed"):
            raise UserError(f"ckpt_path={place}: {change}; a resumed run keeps it")
        Console().print(f"resumed with a change: {change}", soft_wrap=True)
    return found[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advertising and hints that do not apply out of the way of the results."""
    loggers = [
        logging.getLogger(name)
        for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Batches are slices of a tensor in memory: workers would slow them down.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # A resumed run writes into a directory of its own.
            warnings.filterwarnings("ignore", message=".*dirpath has changed.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
            warnings.filterwarnings("ignore", message=".*returned `None`.*")  # a skipped step tells of itself
            # Nothing is logged by step.
            warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
            # The epoch's means are those of all devices before they are logged.
            warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


Rows = list[dict[str, float | int]]


def _fit_alone(run: _Run, options: _Options) -> None:
    """Train, and do nothing else."""
    try:
        with _quiet(), rare_garbage_collection():
            run.trainer.fit(
                run.module, datamodule=LightningImages(run.datamodule), ckpt_path=run.checkpoint, weights_only=True
            )
    except MisconfigurationException as error:
        raise UserError(describe(error, "trainer")) from error
    except RuntimeError as error:
        if "finished reduction in the prior iteration" not in str(error):
            raise
        raise UserError(
            "model: some of its weights play no part in the loss; give trainer.strategy=ddp_find_unused_parameters_true"
        ) from error
    except SystemExit:  # Lightning's answer to an interruption
        raise KeyboardInterrupt(_how_to_go_on(run, options)) from None
    except Terminated:
        raise Terminated(_how_to_go_on(run, options)) from None


def _fit(
    run: _Run, logger: WandbOptions | None, options: _Options, twin: Rows | None, group: str
) -> dict[str, float | int]:
    """Train, and write the files that tell of it; ``twin`` are the epochs of the undefended twin."""
    console = Console()
    console.print(f"[bold]{run.name}[/bold]: {run.trainer.max_epochs} epochs → {run.directory}")
    config = plain(run.cfg)
    tags = [run.name, run.datamodule.data_name, type(run.module.model).__name__]
    pl.seed_everything(options.seed, workers=True, verbose=False)
    started = time.perf_counter()
    with wandb_run(
        logger,
        directory=run.directory,
        group=group,
        name=f"{run.name}-{_job()}seed{options.seed}",
        job_type="train",
        tags=tags,
        config=config,
        resumed=load_checkpoint(run.checkpoint).wandb if options.resume and run.checkpoint else None,
    ) as wandb:
        if wandb is not None:
            run.trainer.logger = WandbLogger(experiment=wandb)
            run.module.wandb = full_id(wandb)
        _fit_alone(run, options)
        seconds = time.perf_counter() - started
        metrics = run.record.rows[-1]
        if pruned := run.pruning is not None and run.pruning.pruned:
            console.print(f"{run.name}: the search ends this trial after {len(run.record.rows)} epochs")
        figure = training_curves(
            run.record.rows,
            twin=twin,
            penalised=run.module.penalty is not None,
            validation_name=run.datamodule.validation_name,
        )
        figure.savefig(run.directory / "curves.png", dpi=120)
        summary = {
            "name": run.name,
            "seed": options.seed,
            "metrics": metrics,
            "pruned": pruned,
            "epochs": len(run.record.rows),
            "steps": run.trainer.global_step,
            "seconds": round(seconds, 1),
            "parameters": sum(parameter.numel() for parameter in run.module.model.parameters()),
            "checkpoint": "checkpoints/last.ckpt",
            "wandb": run.module.wandb,
            "versions": versions(),
            **git_state(),
        }
        with write_atomically(run.directory / "summary.json") as file:
            json.dump(summary, file, indent=2)
        export(load_checkpoint(run.last_checkpoint), run.directory / "model.safetensors")
        if wandb is not None:
            log_training(wandb, run.directory / "curves.png", summary, run.record.rows, twin)
    console.print(_closing_table(run, metrics, seconds))
    console.print(
        f"results: {run.directory}/checkpoints/last.ckpt, model.safetensors, metrics.csv, curves.png, summary.json",
        soft_wrap=True,
    )
    return dict(metrics) | ({"pruned": True} if pruned else {})


def _how_to_go_on(run: _Run, options: _Options) -> str:
    if not run.last_checkpoint.is_file():
        return "there is no checkpoint yet"
    return f"go on with the same options, hydra.run.dir={from_here(options.output_dir)} and resume=true"


def _group(options: _Options) -> str:
    """Return the name of the directory that a sweep's runs, or a run, its twin and its evaluation, share."""
    directory = Path(options.output_dir).resolve()
    return (directory.parent if _job() else directory).name


def _job() -> str:
    """Return the number of a sweep's job, for its name in W&B; nothing outside a sweep."""
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return f"{HydraConfig.get().job.num}-" if in_sweep else ""


def _closing_table(run: _Run, metrics: Mapping[str, float | int], seconds: float) -> Table:
    table = Table(title=f"{run.name}: {len(run.record.rows)} epochs, {seconds:.0f} s", title_justify="left")
    table.add_column("")
    validation_name = run.datamodule.validation_name
    table.add_column("training", justify="right")
    table.add_column(validation_name, justify="right")
    for metric in METRICS:
        cells = [metrics.get(f"{stage}_{metric}") for stage in ("train", "validation")]
        if any(cell is not None for cell in cells):
            table.add_row(metric.replace("_", " "), *("–" if cell is None else f"{cell:.4f}" for cell in cells))
    return table

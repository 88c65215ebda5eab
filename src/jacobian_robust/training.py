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
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, open_dict
from pydantic import BaseModel, Field, NonNegativeInt
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.profilers import PassThroughProfiler
from rich.console import Console
from rich.table import Table
from torch import nn

from jacobian_robust.callbacks import METRICS, EpochRecord, EtaSchedule, JacobianMonitor, TrainingProgress
from jacobian_robust.checkpointing import Intervals, RunCheckpoint, newest_checkpoint
from jacobian_robust.checkpoints import export, find_checkpoints, load_checkpoint
from jacobian_robust.config import build, describe, plain, read_options
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import Terminated, UserError
from jacobian_robust.evaluation import Evaluation, read_evaluation, report, subjects
from jacobian_robust.files import claimed, from_here, write_atomically
from jacobian_robust.memory import keep_freed_memory, rare_garbage_collection
from jacobian_robust.model_checks import check_model
from jacobian_robust.module import RobustClassifier
from jacobian_robust.plots import training_curves
from jacobian_robust.provenance import versions
from jacobian_robust.regularizers import Amortization, Penalty, condition_of
from jacobian_robust.schedules import Schedule
from jacobian_robust.tracking import WandbOptions, log_training, read_logger, wandb_run

__all__ = ["train", "trainer_arguments"]

NOT_IN_CHECKPOINT = (
    *("output_dir", "ckpt_path", "resume", "checkpoints", "logger", "twin", "name"),
    *("evaluate", "attack", "suite", "limit", "split", "independent"),
    *("sanity_images", "geometry_images", "reliability", "diagnostics", "diagnostics_images"),
)
"""Keys of the config that do not shape the trained network."""

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


class _Options(BaseModel):
    """The scalars of ``conf/train.yaml``."""

    seed: int = Field(ge=0, lt=2**32)
    twin: bool
    evaluate: bool
    ckpt_path: str | None
    resume: bool
    checkpoints: Intervals
    monitor_images: NonNegativeInt
    output_dir: str
    amortization: Amortization
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
    options = read_options(_Options, cfg)
    logger = read_logger(cfg)
    evaluation = read_evaluation(cfg) if options.evaluate else None
    if options.twin and options.ckpt_path:
        raise UserError("ckpt_path resumes one run: set twin=false")
    directory = from_here(options.output_dir)
    name = options.name or _label(cfg)
    if options.twin:
        if not cfg.regularizer:
            raise UserError(
                "twin=true trains an undefended twin beside a penalty: choose one, as regularizer=frobenius"
            )
        if name in ("vanilla", "evaluation"):
            raise UserError(f"name={name}: with twin=true a directory beside the run is called so; choose another name")
        undefended = cfg.copy()
        with open_dict(undefended):
            undefended.regularizer = None
        runs = [
            _assemble(undefended, options, _label(undefended), directory / _label(undefended), measured_as=cfg),
            _assemble(cfg, options, name, directory / name, measured_as=cfg),
        ]
    else:
        runs = [_assemble(cfg, options, name, directory, measured_as=cfg)]
    if evaluation is not None:
        runs[0].datamodule.require(evaluation.split)
    with contextlib.ExitStack() as claims:
        # The outer directory first: it says whether the inner ones are this run's to go on with.
        claims.enter_context(claimed(directory, plain(cfg, without=("resume",)), resume=options.resume))
        for run in runs if options.twin else ():
            config = plain(run.cfg, without=("resume",))
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
        twin = runs[0] if options.twin and run is not runs[0] else None
        ended = _finished(run) if run.done else _fit(run, logger, options, twin)
        metrics = {f"twin_{key}": value for key, value in metrics.items()} | ended
    if evaluation is not None:
        metrics |= _evaluate(runs, cfg, options, evaluation, logger, directory / "evaluation")
    return metrics


def _finished(run: _Run) -> dict[str, float | int]:
    """Return the metrics of a run that has ended already."""
    Console().print(f"[bold]{run.name}[/bold]: trained already → {run.directory}")
    checkpoint = load_checkpoint(run.last_checkpoint)
    run.record.rows = checkpoint.rows
    run.module.wandb = checkpoint.wandb
    return dict(checkpoint.rows[-1])


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
            subjects([load_checkpoint(run.last_checkpoint) for run in runs], evaluation),
            evaluation,
            directory=directory,
            logger=logger,
            group=_group(options),
            config=plain(cfg, without=("resume",)),
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


def _label(cfg: DictConfig) -> str:
    """Return the short name of what distinguishes a run: its penalty, or ``vanilla`` (the note's word) without one."""
    return str(cfg.regularizer.get("_target_", "")).rpartition(".")[-1].lower() if cfg.regularizer else "vanilla"


def _assemble(cfg: DictConfig, options: _Options, name: str, directory: Path, *, measured_as: DictConfig) -> _Run:
    """Make all parts of a run; ``measured_as`` is the config whose penalty says what eq. 14 is measured with."""
    config = plain(cfg, without=NOT_IN_CHECKPOINT)
    if not isinstance(epochs := cfg.trainer.max_epochs, int) or epochs < 1:
        raise UserError(f"trainer.max_epochs: give at least 1 epoch (got {epochs!r})")
    accumulated = cfg.trainer.get("accumulate_grad_batches", 1)
    if not isinstance(accumulated, int) or accumulated < 1:
        raise UserError(f"trainer.accumulate_grad_batches: give at least 1 batch for a step (got {accumulated!r})")
    if cfg.trainer.get("limit_train_batches", 1) == 0:
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on; give a share or a number of batches")
    pl.seed_everything(options.seed, workers=True, verbose=False)
    datamodule: ImageDataModule = build(cfg, "data", ImageDataModule, shuffle_seed=options.seed)
    model: nn.Module = build(cfg, "model", nn.Module)
    _check_fit(model, datamodule, cfg.model)
    penalty: Penalty | None = build(cfg, "regularizer", Penalty, optional=True)
    if penalty is not None:
        _check_differentiable(model, datamodule, cfg.model)
    eta: EtaSchedule = build(cfg, "eta", EtaSchedule)
    optimizer: Callable[..., torch.optim.Optimizer] = build(cfg, "optimizer")
    try:
        optimizer(model.parameters())
    except (TypeError, ValueError) as error:
        raise UserError(describe(error, "optimizer")) from error
    schedule: Schedule | None = build(cfg, "scheduler", Schedule, optional=True)
    done = options.resume and (directory / "summary.json").is_file()
    resumed = None
    if options.ckpt_path:
        resumed = _check_resumable(options.ckpt_path, config, epochs)
    if options.resume:  # of the same configuration, as the directory's config.yaml shows
        resumed = newest_checkpoint(directory / "checkpoints") or resumed
    datamodule.prepare_data()

    module = RobustClassifier(
        model, optimizer, penalty, amortization=options.amortization, seed=options.seed, config=config
    )
    eps, bound = condition_of(build(measured_as, "regularizer", optional=True), datamodule.classes)
    monitor = JacobianMonitor(options.monitor_images, eps=eps, bound=bound)
    record = EpochRecord(directory / "metrics.csv", monitor)
    callbacks: list[pl.Callback] = [
        monitor,
        record,
        RunCheckpoint(directory / "checkpoints", options.checkpoints),
    ]
    if penalty is not None:
        callbacks.insert(0, eta)
    if schedule is not None:
        callbacks.insert(0, schedule)
    if cfg.trainer.get("enable_progress_bar", True):
        callbacks.append(TrainingProgress())
    if taken := [key for key in SET_HERE if key in cfg.trainer]:
        raise UserError(f"trainer.{taken[0]} is set by the framework and cannot be chosen")
    try:
        with _quiet():
            arguments = trainer_arguments(callbacks, directory)
            if "profiler" in cfg.trainer:
                del arguments["profiler"]
            trainer: pl.Trainer = build(cfg, "trainer", _partial_=True)(**arguments)
    except UserError:
        raise
    except Exception as error:  # Lightning has no common exception for a bad argument
        raise UserError(describe(error, "trainer")) from error
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.get('devices')}: training runs on one device, give trainer.devices=1"
        )
    return _Run(cfg, name, directory, module, datamodule, trainer, record, resumed, done)


class _NoProfiler(PassThroughProfiler):
    """No profiler at no cost: Lightning enters it 40 times a step."""

    def profile(self, action_name: str) -> Any:
        return _NOTHING


_NOTHING = contextlib.nullcontext()


def trainer_arguments(callbacks: list[pl.Callback], directory: Path) -> dict[str, Any]:
    """Return what the framework, not the user, says to Lightning's Trainer; a user may name another ``profiler``."""
    return {
        "callbacks": callbacks,
        "logger": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "inference_mode": False,  # the norm of the Jacobian needs gradients in validation too
        "use_distributed_sampler": False,  # the datamodule makes its own
        "default_root_dir": str(directory),
        "profiler": _NoProfiler(),
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
    ours, theirs = (_flat(c) for c in (config, checkpoint.config))
    for field in sorted(ours.keys() | theirs.keys()):
        change = f"{field} was {theirs.get(field)} and is {ours.get(field)}"
        if ours.get(field) == theirs.get(field) or field in ("data.root", "trainer.max_epochs"):
            continue
        if field.split(".")[0] in ("model", "data", "optimizer", "seed"):
            raise UserError(f"ckpt_path={place}: {change}; a resumed run keeps it")
        Console().print(f"resumed with a change: {change}", soft_wrap=True)
    return found[0]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        leaves |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advertising and hints that do not apply out of the way of the results."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
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
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fit(run: _Run, logger: WandbOptions | None, options: _Options, twin: _Run | None) -> dict[str, float | int]:
    console = Console()
    console.print(f"[bold]{run.name}[/bold]: {run.trainer.max_epochs} epochs → {run.directory}")
    config = plain(run.cfg)
    tags = [run.name, run.datamodule.data_name, type(run.module.model).__name__]
    pl.seed_everything(options.seed, workers=True, verbose=False)
    started = time.perf_counter()
    with wandb_run(
        logger,
        directory=run.directory,
        group=_group(options),
        name=f"{run.name}-seed{options.seed}",
        job_type="train",
        tags=tags,
        config=config,
        resumed=load_checkpoint(run.checkpoint).wandb if options.resume and run.checkpoint else None,
    ) as wandb:
        if wandb is not None:
            run.trainer.logger = WandbLogger(experiment=wandb)
            run.module.wandb = "/".join(filter(None, (wandb.entity, wandb.project, wandb.id)))
        try:
            with _quiet(), rare_garbage_collection():
                run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=run.checkpoint, weights_only=True)
        except MisconfigurationException as error:
            raise UserError(describe(error, "trainer")) from error
        except SystemExit:  # Lightning's answer to an interruption
            raise KeyboardInterrupt(_how_to_go_on(run, options)) from None
        except Terminated:
            raise Terminated(_how_to_go_on(run, options)) from None
        seconds = time.perf_counter() - started
        metrics = run.record.rows[-1]
        figure = training_curves(
            run.record.rows,
            twin=twin.record.rows if twin else None,
            penalised=run.module.penalty is not None,
            validation_name=run.datamodule.validation_name,
        )
        figure.savefig(run.directory / "curves.png", dpi=120)
        summary = {
            "name": run.name,
            "seed": options.seed,
            "metrics": metrics,
            "epochs": len(run.record.rows),
            "steps": run.trainer.global_step,
            "seconds": round(seconds, 1),
            "parameters": sum(parameter.numel() for parameter in run.module.model.parameters()),
            "checkpoint": "checkpoints/last.ckpt",
            "wandb": run.module.wandb,
            "versions": versions(),
        }
        with write_atomically(run.directory / "summary.json") as file:
            json.dump(summary, file, indent=2)
        export(load_checkpoint(run.last_checkpoint), run.directory / "model.safetensors")
        if wandb is not None:
            log_training(wandb, figure, summary)
    console.print(_closing_table(run, metrics, seconds))
    console.print(
        f"results: {run.directory}/checkpoints/last.ckpt, model.safetensors, metrics.csv, curves.png, summary.json",
        soft_wrap=True,
    )
    return dict(metrics)


def _how_to_go_on(run: _Run, options: _Options) -> str:
    if not run.last_checkpoint.is_file():
        return "there is no checkpoint yet"
    return f"go on with the same options, hydra.run.dir={from_here(options.output_dir)} and resume=true"


def _group(options: _Options) -> str:
    """Return the name of the directory that a sweep's runs, or a run, its twin and its evaluation, share."""
    directory = Path(options.output_dir).resolve()
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return (directory.parent if in_sweep else directory).name


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

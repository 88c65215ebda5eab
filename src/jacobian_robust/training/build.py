"""The parts of a training, built from its config."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import nn

from jacobian_robust.adversaries import Adversary
from jacobian_robust.attacks import Attack, Transfer
from jacobian_robust.config import build, build_each, plain
from jacobian_robust.data import Augmentation, ImageDataModule
from jacobian_robust.errors import UserError, describe
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.penalties import Amortization, Condition, ExponentialPenalty, Penalty, note_condition
from jacobian_robust.training.averaging import MovingAverage
from jacobian_robust.training.callbacks import (
    AttackMonitor,
    CertificateMonitor,
    EpochRecord,
    JacobianMonitor,
    Monitor,
    ScheduledEps,
    ScheduledEta,
    ScheduledRate,
    TrainingProgress,
)
from jacobian_robust.training.checkpointing import RunCheckpoint, newest_checkpoint
from jacobian_robust.training.checks import (
    check_all_used,
    check_devices,
    check_differentiable,
    check_fit,
    check_penalty,
    check_probabilities,
    check_reloadable,
    check_resumable,
    check_smallest_batch,
)
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.options import METRICS, NOT_IN_CHECKPOINT, SET_HERE, Options, trainer_options
from jacobian_robust.training.quiet import quiet
from jacobian_robust.training.schedules import EpsSchedule, EtaSchedule, Schedule

if TYPE_CHECKING:
    from jacobian_robust.training.search import Pruning


@dataclass
class Run:
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
        """The checkpoint of the last epoch."""
        return self.directory / "checkpoints" / "last.ckpt"


@dataclass
class _Parts:
    """What Hydra builds of a run."""

    datamodule: ImageDataModule
    model: nn.Module
    penalty: Penalty | None
    adversary: Adversary | None
    eta: ScheduledEta
    rise: ScheduledEps | None
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: ScheduledRate | None
    average: MovingAverage | None


def assemble(
    cfg: DictConfig,
    options: Options,
    name: str,
    directory: Path,
    *,
    measured_as: DictConfig,
) -> Run:
    """Make all parts of a run.

    ``measured_as`` is the config whose penalty says what eq. 14 is measured with.
    """
    config = plain(cfg, without=NOT_IN_CHECKPOINT)
    epochs = trainer_options(cfg).max_epochs
    if cfg.trainer.get("limit_train_batches", 1) == 0:
        raise UserError("trainer.limit_train_batches=0 leaves nothing to train on; give a share or a number of batches")
    pl.seed_everything(options.seed, workers=True, verbose=False)
    parts = _build_parts(cfg, options)
    done = options.resume and (directory / "summary.json").is_file()
    resumed = None
    if options.ckpt_path:
        resumed = check_resumable(options.ckpt_path, config, epochs)
    if options.resume:  # of the same configuration, as the directory's config.yaml shows
        resumed = newest_checkpoint(directory / "checkpoints") or resumed

    module = RobustClassifier(
        parts.model,
        parts.optimizer,
        parts.penalty,
        adversary=parts.adversary,
        family=parts.datamodule.family,
        amortization=options.amortization,
        seed=options.seed,
        cuda_graph=options.cuda_graph,
        config=config,
    )
    monitors = _monitors(cfg, options, parts, measured_as)
    record = EpochRecord(directory / "metrics.csv", monitors, parts.rise)
    pruning = None if options.search.trial is None else _pruning(cfg, options, record)
    callbacks = _callbacks(cfg, options, directory, parts, record, pruning)
    images = len(parts.datamodule.split("train"))
    trainer = _trainer(cfg, callbacks, directory, parts.average, -(-images // parts.datamodule.batch_size))
    differentiated = parts.penalty is not None and parts.penalty.needs_graph
    amortization = options.amortization if differentiated else Amortization()
    check_smallest_batch(parts.model, parts.datamodule, trainer, amortization)
    check_all_used(parts.model, parts.datamodule, trainer)
    if differentiated:
        check_differentiable(parts.model, parts.datamodule, trainer.strategy.root_device)
    return Run(cfg, name, directory, module, parts.datamodule, trainer, record, pruning, resumed, done)


def _build_parts(cfg: DictConfig, options: Options) -> _Parts:
    """Build the parts in the order that the seed fixes, and check each as soon as it can be."""
    datamodule: ImageDataModule = build(cfg, "data", ImageDataModule, shuffle_seed=options.seed)
    family: Family = build(cfg, "task", Family, optional=True) or CATEGORICAL
    datamodule.for_task(family)
    datamodule.augmentation = build(cfg, "augmentation", Augmentation, optional=True)
    model: nn.Module = build(cfg, "model", nn.Module)
    if hasattr(datamodule, "image_shape"):  # before files are fetched; of a folder they say what the shape is
        check_fit(model, datamodule, cfg.model)
    datamodule.prepare_data()
    datamodule.setup("fit")
    check_fit(model, datamodule, cfg.model, trained=True)
    check_reloadable(model, lambda: build(cfg, "model", nn.Module), datamodule.image_shape)
    penalty = _penalty(cfg, datamodule)
    if penalty is not None:
        check_penalty(penalty, model, datamodule)
    if penalty is not None and penalty.takes_probabilities:
        check_probabilities(model, datamodule)
    adversary: Adversary | None = build(cfg, "adversary", Adversary, optional=True)
    adversary = adversary and adversary.with_family(family)
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
    return _Parts(
        datamodule,
        model,
        penalty,
        adversary,
        ScheduledEta(eta),
        ScheduledEps(rise) if rise is not None else None,
        optimizer,
        ScheduledRate(schedule) if schedule is not None else None,
        average,
    )


def _penalty(cfg: DictConfig, datamodule: ImageDataModule) -> Penalty | None:
    """Return the penalty, of the task's family."""
    penalty: Penalty | None = build(cfg, "regularizer", Penalty, optional=True)
    try:
        penalty = penalty and penalty.with_family(datamodule.family)
        if isinstance(penalty, ExponentialPenalty):
            penalty.radius_at(torch.zeros(1, *datamodule.output_shape))
    except UserError:
        raise
    except ValueError as error:  # an option that this family has no use for
        raise UserError(describe(error, "regularizer")) from error
    return penalty


def _monitors(cfg: DictConfig, options: Options, parts: _Parts, measured_as: DictConfig) -> list[Monitor]:
    """Return what measures the network after each epoch."""
    measured = _penalty(measured_as, parts.datamodule)
    eps, bound = _condition(measured, parts.datamodule)
    family = parts.datamodule.family
    monitors: list[Monitor] = [JacobianMonitor(options.monitor_images, eps=eps, bound=bound, family=family)]
    # The run's own bound; a twin without a penalty is measured with that of the run beside it.
    if (bounding := parts.penalty or measured) is not None:
        monitors.append(CertificateMonitor(options.monitor_images, bounding))
    if options.monitor_attack_images:
        attack = _first_attack(cfg).with_family(family)
        monitors.append(AttackMonitor(options.monitor_attack_images, attack))
    for monitor in monitors:
        monitor.average = parts.average
    return monitors


def _condition(measured: Penalty | None, datamodule: ImageDataModule) -> Condition:
    """Return the condition that is measured: of another family than the categorical one, by its boundary."""
    if isinstance(datamodule.family, Categorical):
        condition = measured.condition(datamodule.classes) if measured is not None else None
        return condition or note_condition(datamodule.classes)
    if isinstance(measured, ExponentialPenalty):
        return Condition(measured.radius_at(torch.zeros(1, *datamodule.output_shape)), "boundary")
    return Condition(getattr(measured, "eps", 1.0), "boundary")


def _callbacks(
    cfg: DictConfig, options: Options, directory: Path, parts: _Parts, record: EpochRecord, pruning: "Pruning | None"
) -> list[pl.Callback]:
    """Return the callbacks in the order in which Lightning calls them."""
    callbacks: list[pl.Callback] = [*record.monitors, record]
    if pruning is not None:
        callbacks.append(pruning)
    callbacks.append(RunCheckpoint(directory / "checkpoints", options.checkpoints))
    if parts.penalty is not None:
        callbacks.insert(0, parts.eta)
    callbacks[:0] = [callback for callback in (parts.schedule, parts.rise, parts.average) if callback is not None]
    if cfg.trainer.get("enable_progress_bar", True):
        callbacks.append(TrainingProgress())
    return callbacks


def _trainer(
    cfg: DictConfig, callbacks: list[pl.Callback], directory: Path, average: MovingAverage | None, batches: int
) -> pl.Trainer:
    """Return Lightning's Trainer, checked."""
    if taken := [key for key in SET_HERE if key in cfg.trainer]:
        raise UserError(f"trainer.{taken[0]} is set by the framework and cannot be chosen")
    try:
        with quiet():
            arguments = trainer_arguments(callbacks, directory)
            trainer: pl.Trainer = build(cfg, "trainer", pl.Trainer, partial=True)(**arguments)
    except UserError:
        raise
    except Exception as error:  # Lightning has no common exception for a bad argument
        raise UserError(describe(error, "trainer")) from error
    check_devices(trainer, cfg)
    interval = cfg.trainer.get("val_check_interval")
    if isinstance(interval, int) and interval > batches and cfg.trainer.get("check_val_every_n_epoch", 1):
        raise UserError(f"trainer.val_check_interval={interval}: an epoch has {batches} batches; give no more, or null")
    if average is not None and trainer.precision in ("16-true", "bf16-true"):
        # The average moves by less than their last digit.
        raise UserError(f"averaging: not in half precision; give trainer.precision={trainer.precision[:-4]}mixed")
    return trainer


def _first_attack(cfg: DictConfig) -> Attack:
    """Return the attack that watches over a training."""
    attack: Attack = build_each(cfg, "attack", Attack)[0]
    if isinstance(attack, Transfer):
        raise UserError(
            "monitor_attack_images: an attack of the network itself has to come first in attack=, not transfer"
        )
    return attack


def _pruning(cfg: DictConfig, options: Options, record: EpochRecord) -> "Pruning":
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

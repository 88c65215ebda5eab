"""What is checked of a training before its first step."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console
from torch import nn

from jacobian_robust.checkpoints import find_checkpoints, load_checkpoint
from jacobian_robust.config import flat
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import UserError, describe
from jacobian_robust.geometry.families import Categorical
from jacobian_robust.jacobian.checks import check_model
from jacobian_robust.penalties import Penalty


def check_devices(trainer: pl.Trainer, cfg: DictConfig) -> None:
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


def check_fit(model: nn.Module, datamodule: ImageDataModule, options: Mapping[str, Any]) -> None:
    """Raise a UserError unless the model maps the data's images to a logit for each class, or what the task asks."""
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
    outputs = datamodule.output_shape
    if logits.shape != (2, *outputs) and not isinstance(datamodule.family, Categorical):
        remedy = f"give model.classes={outputs[0]}" if len(outputs) == 1 else "choose model=conv_pixels"
        raise UserError(
            f"model: the task's outputs are (batch, {', '.join(map(str, outputs))}), not {tuple(logits.shape)} for a "
            f"batch of 2: {remedy}"
        )
    if logits.shape != (2, *outputs):
        raise UserError(
            f"model.classes={logits.shape[-1]}: the data has {datamodule.classes} classes, and the model must return "
            f"(batch, {datamodule.classes}) logits, not {tuple(logits.shape)} for a batch of 2"
        )
    model.train(training)


def check_differentiable(model: nn.Module, datamodule: ImageDataModule, options: Mapping[str, Any]) -> None:
    """Raise a UserError unless the gradient of the Jacobian's norm through the model is what it should be."""
    images = torch.rand(4, *datamodule.image_shape, generator=torch.Generator().manual_seed(0))
    try:
        check_model(copy.deepcopy(model), images, datamodule.family)
    except ValueError as error:
        remedy = "; give model.norm=group" if options.get("norm") == "batch" else ""
        raise UserError(f"model: cannot be trained with a penalty on its Jacobian: {error}{remedy}") from error


def check_penalty(penalty: Penalty, model: nn.Module, datamodule: ImageDataModule) -> None:
    """Raise a UserError unless a penalty on the model itself, without a graph to the images, can be computed of it."""
    if penalty.needs_graph or not penalty.needs_model:
        return
    images, labels = torch.zeros(2, *datamodule.image_shape), torch.arange(2)
    model = copy.deepcopy(model)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            copy.deepcopy(penalty)(model(images), images, labels, model=model, create_graph=False)
    except ValueError as error:
        raise UserError(f"regularizer: cannot be computed of this model in training: {error}") from error


def check_probabilities(model: nn.Module, datamodule: ImageDataModule) -> None:
    """Raise a UserError unless a model whose outputs are said to be probabilities returns such."""
    with torch.no_grad():
        outputs = copy.deepcopy(model)(torch.zeros(2, *datamodule.image_shape))
    if outputs.min() < 0 or (outputs.sum(-1) - 1).abs().max() > 1e-3:
        raise UserError(
            "regularizer.outputs=probabilities: the model's outputs are none; give outputs=logits, or a model that "
            "ends in a softmax, as model.double_softmax=true"
        )


def check_resumable(place: str, config: Mapping[str, Any], epochs: int) -> Path:
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

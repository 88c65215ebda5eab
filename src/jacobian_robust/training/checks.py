"""What is checked of a training before its first step."""

import copy
import io
import warnings
from collections.abc import Callable, Mapping
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
from jacobian_robust.inspection import is_random, look_at, unchanged
from jacobian_robust.jacobian.checks import check_model
from jacobian_robust.penalties import Amortization, Penalty

UNUSED = "{name} plays no part in the loss; give trainer.strategy=ddp_find_unused_parameters_true"
"""What several processes need for weights that the loss does not use."""


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


def check_fit(
    model: nn.Module, datamodule: ImageDataModule, options: Mapping[str, Any], *, trained: bool = False
) -> None:
    """Raise a UserError unless the model maps the data's images to a logit for each class, or what the task asks.

    With ``trained``, in training mode too.
    """
    sizes = [2] if trained else []
    look_at(model, datamodule.output_shape, datamodule.image_shape, training=sizes, options=options)


def check_smallest_batch(
    model: nn.Module, datamodule: ImageDataModule, trainer: pl.Trainer, amortization: Amortization
) -> None:
    """Raise a UserError if the model is to be trained on a single image and cannot: batch statistics have no variance.

    Single images are the last batch of an epoch, the part of a small batch that a process has, or that is penalised.
    """
    loader = datamodule.train_dataloader(0, trainer.world_size)
    limit, batches = trainer.limit_train_batches, len(loader)
    taken = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    assert loader.batch_size is not None
    images = len(loader.sampler)  # type: ignore[arg-type]
    sizes = {min(loader.batch_size, images - loader.batch_size * number) for number in (0, taken - 1)}
    parts = {amortization.samples(size) for size in sizes}
    parts |= {size - amortization.samples(size) for size in sizes}
    if 1 in parts:
        look_at(model, datamodule.output_shape, datamodule.image_shape, training=[1])


def check_reloadable(model: nn.Module, make: Callable[[], nn.Module], shape: tuple[int, int, int]) -> None:
    """Raise a UserError unless a new model with this one's ``state_dict`` computes the same: it is what is evaluated.

    What a model keeps outside of it, as a random matrix that is a plain attribute, would be another one there.
    """
    try:
        stored = io.BytesIO()
        torch.save(model.state_dict(), stored)
        state = torch.load(io.BytesIO(stored.getvalue()), weights_only=True)
    except Exception as error:  # its extra state can be anything
        raise UserError(
            f"model: its state_dict holds more than tensors and plain values ({describe(error)[:120]}…); let "
            "get_extra_state return such"
        ) from error
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        twin = make()
        with torch.no_grad():
            twin.load_state_dict(state)
            with unchanged(model, training=False), unchanged(twin, training=False):
                expected, found = model(images), twin(images)
                torch.manual_seed(1)
                same = torch.allclose(expected, found, rtol=1e-5, atol=1e-5, equal_nan=True)
    if not same and not is_random(model, images):
        raise UserError(
            "model: loaded from its state_dict it computes something else: it keeps what it draws or learns in plain "
            "attributes; register them as parameters or as buffers (persistent=True)"
        )


def check_differentiable(model: nn.Module, datamodule: ImageDataModule, device: torch.device) -> None:
    """Raise a UserError unless the gradient of the Jacobian's norm through the model is what it should be.

    It is looked at on the device that trains: cuDNN's layers lack derivatives that the processor's have.
    """
    before = next((parameter.device for parameter in model.parameters()), device)
    model.to(device)
    try:
        _check_derivatives(model, datamodule, device)
    finally:
        model.to(before)


def _check_derivatives(model: nn.Module, datamodule: ImageDataModule, device: torch.device) -> None:
    images = torch.rand(4, *datamodule.image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    if is_random(model, images):
        raise UserError(
            "model: is random in evaluation mode too (the same images get other logits), so that its Jacobian is not "
            "defined; let dropout and noise act in training mode alone, as nn.Dropout does, or give regularizer=none"
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with unchanged(model, training=model.training):
                check_model(model, images, datamodule.family)
        except ValueError as error:
            raise UserError(f"model: cannot be trained with a penalty on its Jacobian: {error}") from error
    for warning in said:
        if issubclass(warning.category, UserWarning):
            Console().print(f"model: {warning.message}", soft_wrap=True)


def check_all_used(model: nn.Module, datamodule: ImageDataModule, trainer: pl.Trainer) -> None:
    """Raise a UserError if several processes would wait for the gradient of a weight that the logits do not use."""
    strategy = trainer.strategy
    if trainer.world_size == 1 or getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters"):
        return
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    with unchanged(model, training=True):
        logits = model(torch.zeros(2, *datamodule.image_shape))
        found = torch.autograd.grad(logits.sum(), [weight for _, weight in named], allow_unused=True)
    unused = [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None]
    if unused:
        raise UserError(f"model: {UNUSED.format(name=unused[0])}")


def check_penalty(penalty: Penalty, model: nn.Module, datamodule: ImageDataModule) -> None:
    """Raise a UserError unless a penalty on the model itself, without a graph to the images, can be computed of it."""
    if penalty.needs_graph or not penalty.needs_model:
        return
    images = torch.zeros(2, *datamodule.image_shape)
    try:
        with unchanged(model, training=model.training), torch.no_grad():
            outputs = model(images)
            categorical = isinstance(datamodule.family, Categorical)
            labels = torch.arange(2) if categorical else datamodule.family.predict(outputs)
            copy.deepcopy(penalty)(outputs, images, labels, model=model, create_graph=False)
    except ValueError as error:
        raise UserError(f"regularizer: cannot be computed of this model in training: {error}") from error


def check_probabilities(model: nn.Module, datamodule: ImageDataModule) -> None:
    """Raise a UserError unless a model whose outputs are said to be probabilities returns such."""
    with unchanged(model, training=model.training), torch.no_grad():
        outputs = model(torch.zeros(2, *datamodule.image_shape))
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

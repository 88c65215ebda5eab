"""The classifiers of an evaluation: loaded from checkpoints, placed on the device, checked."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from jacobian_robust.checkpoints import Checkpoint
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.options import Evaluation
from jacobian_robust.files import distinct_names
from jacobian_robust.geometry.families import Family
from jacobian_robust.inspection import look_at
from jacobian_robust.models import PixelInput, SinglePrecision
from jacobian_robust.robustness.certificates import require_certifiable

__all__ = [
    "Classifier",
    "described_data",
    "device",
    "load_classifiers",
    "names_of",
    "placed",
    "require_attacks",
    "weights_hash",
]


@dataclass(frozen=True)
class Classifier:
    """A classifier to evaluate.

    Attributes:
        name: the shortest distinct name of where it was found.
        checkpoint: what its file says.
        network: returns logits for pixels in [0, 1]; on the device, in evaluation mode.
        datamodule: what to evaluate it on.
    """

    name: str
    checkpoint: Checkpoint
    network: nn.Module
    datamodule: ImageDataModule


def load_classifiers(
    checkpoints: Sequence[Checkpoint],
    evaluation: Evaluation,
    *,
    network: nn.Module | list[nn.Module | None] | None = None,
    pixels: dict[str, Any] | None = None,
) -> list[Classifier]:
    """Return the classifiers of checkpoints, ready to be evaluated.

    Args:
        checkpoints: as read from files.
        evaluation: how they are evaluated.
        network: a classifier to load the weights into, instead of the one that each checkpoint names; or, for each
            checkpoint, one or ``None``.
        pixels: arguments of :class:`PixelInput`, for classifiers that want other numbers than pixels in [0, 1].

    Raises:
        UserError: if one cannot be made, does not return logits for the data's classes, or its data are at fault.
    """
    found = []
    networks = network if isinstance(network, list) else [network] * len(checkpoints)
    for checkpoint, name, own in zip(checkpoints, names_of(checkpoints), networks, strict=True):
        made = checkpoint.model(own)
        if pixels:
            made = PixelInput(made, **pixels).eval()
        datamodule = evaluation.data or checkpoint.datamodule()
        datamodule.for_task(_family(checkpoint, evaluation))
        evaluation = evaluation.for_family(datamodule.family)
        datamodule.require(evaluation.split)
        datamodule.prepare_data()
        require_attacks(evaluation, datamodule)
        made = placed(made, datamodule, checkpoint, gradient=evaluation.needs_gradient)
        require_certifiable(evaluation.certificates, made, torch.zeros(1, *datamodule.image_shape).to(device()), name)
        found.append(Classifier(name, checkpoint, made, datamodule))
    if len({images_of(classifier.datamodule, evaluation) for classifier in found}) > 1:
        raise UserError(
            f"the checkpoints were trained on other data, of which their {evaluation.split} images differ, and cannot "
            "share a table: evaluate them apart, or on the same, data=NAME"
        )
    return found


def _family(checkpoint: Checkpoint, evaluation: Evaluation) -> Family:
    """Return the family of a model's task: what was asked for, or what its checkpoint says.

    Raises:
        UserError: if it was trained for another one.
    """
    own = checkpoint.family()
    if checkpoint.config and evaluation.family is not None and type(evaluation.family) is not type(own):
        raise UserError(
            f"task: checkpoint {checkpoint.path} was trained for {type(own).__name__}, not for "
            f"{type(evaluation.family).__name__}; leave task= out"
        )
    return evaluation.family or own


def images_of(datamodule: ImageDataModule, evaluation: Evaluation) -> tuple[str | int, ...]:
    """Return what decides which images are evaluated."""
    held_out = (datamodule.validation_size, datamodule.split_seed) if evaluation.split == "validation" else ()
    return (datamodule.data_name, *held_out)


def described_data(datamodule: ImageDataModule, evaluation: Evaluation) -> str:
    """Return in words which images are evaluated: evaluations of others are not put into one table."""
    name, *held_out = images_of(datamodule, evaluation)
    of = f" ({held_out[0]} held out by split_seed {held_out[1]})" if held_out else ""
    return f"{name} {evaluation.split}{of}"


def placed(network: nn.Module, datamodule: ImageDataModule, checkpoint: Checkpoint, *, gradient: bool) -> nn.Module:
    """Return a classifier on the device, with logits in float32.

    Raises:
        UserError: if it does not return logits for the data's classes, or has no gradient though one is needed.
    """
    network = network.to(device())
    what = f"checkpoint {checkpoint.path}" if checkpoint.path else "model"
    dtype = look_at(
        *(network, datamodule.output_shape, datamodule.image_shape),
        what=what,
        gradient=gradient,
        device=device(),
    )
    return network if dtype == torch.float32 else SinglePrecision(network).eval()


def require_attacks(evaluation: Evaluation, datamodule: ImageDataModule) -> None:
    """Raise a UserError if an attack is not for such images, or so few classes: before others have taken their time."""
    for attack in evaluation.attacks:
        attack.require(datamodule.classes, datamodule.image_shape)


def names_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the shortest distinct names: the run directories, less what they share from the left."""
    files = [checkpoint.path.resolve() if checkpoint.path else Path("model") for checkpoint in checkpoints]
    in_run = ("checkpoints", "last.ckpt")
    runs = [file.parents[1] if file.parts[-2:] == in_run else file.with_suffix("") for file in files]
    return distinct_names(runs if len(set(runs)) == len(runs) else files)  # or files that differ in their suffix alone


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weights_hash(classifier: Classifier) -> str:
    """Return the hash of a classifier's file or, of one without, of its weights: a function may return others next."""
    if classifier.checkpoint.sha256:
        return classifier.checkpoint.sha256
    state = {name: value for name, value in classifier.network.state_dict().items() if isinstance(value, Tensor)}
    apart = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}  # if shared
    return hashlib.sha256(safetensors.torch.save(apart)).hexdigest()

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
from jacobian_robust.errors import UserError, describe
from jacobian_robust.evaluation.options import Evaluation
from jacobian_robust.files import distinct_names
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
    network: nn.Module | None = None,
    pixels: dict[str, Any] | None = None,
) -> list[Classifier]:
    """Return the classifiers of checkpoints, ready to be evaluated.

    Args:
        checkpoints: as read from files.
        evaluation: how they are evaluated.
        network: a classifier to load the weights into, instead of the one that each checkpoint names.
        pixels: arguments of :class:`PixelInput`, for classifiers that want other numbers than pixels in [0, 1].

    Raises:
        UserError: if one cannot be made, does not return logits for the data's classes, or its data are at fault.
    """
    found = []
    for checkpoint, name in zip(checkpoints, names_of(checkpoints), strict=True):
        made = checkpoint.model(network)
        if pixels:
            made = PixelInput(made, **pixels).eval()
        datamodule = evaluation.data or checkpoint.datamodule()
        datamodule.for_task(checkpoint.family())
        datamodule.require(evaluation.split)
        require_attacks(evaluation, datamodule)
        datamodule.prepare_data()
        made = placed(made, datamodule, checkpoint, gradient=evaluation.needs_gradient)
        require_certifiable(evaluation.certificates, made, torch.zeros(1, *datamodule.image_shape).to(device()), name)
        found.append(Classifier(name, checkpoint, made, datamodule))
    if len({images_of(classifier.datamodule, evaluation) for classifier in found}) > 1:
        raise UserError(
            f"the checkpoints were trained on other data, of which their {evaluation.split} images differ, and cannot "
            "share a table: evaluate them apart, or on the same, data=NAME"
        )
    return found


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
    for batch in (3, 1):  # any number of images can be left
        images = torch.zeros(batch, *datamodule.image_shape, device=device(), requires_grad=True)
        try:
            logits = network(images)
        except Exception as error:  # a foreign model can fail in any way
            of = f"{batch} images" if batch > 1 else "1 image"
            raise UserError(
                f"{what}: takes no batch of {of} of shape {datamodule.image_shape}: {describe(error)}"
            ) from error
        _require_logits(logits, images, what, datamodule, gradient=gradient)
    return network if logits.dtype == torch.float32 else SinglePrecision(network).eval()


def _require_logits(logits: Any, images: Tensor, what: str, datamodule: ImageDataModule, *, gradient: bool) -> None:
    """Raise a UserError unless a model's answer to images is logits, with a gradient if one is needed."""
    batch = len(images)
    if not isinstance(logits, Tensor) or logits.shape != (batch, *datamodule.output_shape):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        wanted = ", ".join(map(str, datamodule.output_shape))
        raise UserError(f"{what}: must return (batch, {wanted}) logits, not {shape} for a batch of {batch}")
    if not logits.is_floating_point():
        raise UserError(f"{what}: must return logits, not numbers of type {logits.dtype}")
    if logits.isnan().all():
        raise UserError(f"{what}: returns nan for black images: an evaluation would say nothing")
    if gradient and not _reaches(logits, images):
        raise UserError(
            f"{what}: its logits have no gradient with respect to the image (detached, or computed outside torch), "
            "which this evaluation needs; without, there are attack=[square,square_l2] with sanity_images=0, "
            "geometry_images=0 and diagnostics=null"
        )


def _reaches(logits: Tensor, images: Tensor) -> bool:
    """Return whether logits have a gradient with respect to the images, which may be zero."""
    if not logits.requires_grad:
        return False
    return torch.autograd.grad(logits.sum(), images, allow_unused=True)[0] is not None


def require_attacks(evaluation: Evaluation, datamodule: ImageDataModule) -> None:
    """Raise a UserError if an attack is not for such images, or so few classes: before others have taken their time."""
    for attack in evaluation.attacks:
        attack.with_family(datamodule.family).require(datamodule.classes, datamodule.image_shape)


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
    return hashlib.sha256(safetensors.torch.save({k: v.contiguous() for k, v in state.items()})).hexdigest()

"""What a data set returns, looked at once before anything is trained on it or attacked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family

__all__ = ["checked"]


def checked(
    images: Any,
    labels: Any,
    *,
    outputs: Sequence[int],
    shape: Sequence[int],
    what: str,
    family: Family = CATEGORICAL,
) -> tuple[Tensor, Tensor]:
    """Return images ``(n, channels, height, width)`` in uint8 or float32 in [0, 1], and labels ``(n,)`` in int64.

    NumPy arrays, other integer types, float64 pixels and labels in a column are converted. Of another task the labels
    are its targets, see :meth:`jacobian_robust.geometry.families.Family.as_targets`.

    Args:
        images: as a data set returned them.
        labels: as a data set returned them.
        outputs: the shape of a model's outputs for one image: the number of classes, or what another task asks for.
        shape: channels, height and width of an image.
        what: how the data are called in the message.
        family: of the distribution that the outputs describe.

    Raises:
        UserError: if they are anything else; the message says what, and the remedy.
    """
    try:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what}: images and labels must be tensors or NumPy arrays ({error})") from error
    fault = _fault_of_images(images, tuple(shape))
    of_classes = isinstance(family, Categorical)
    if fault is None and of_classes:
        fault = _fault_of_labels(labels, outputs[0])
    if fault is None and len(images) != len(labels):
        fault = f"there are {len(images)} images and {len(labels)} labels"
    if fault is not None:
        raise UserError(f"{what}: {fault}")
    images = images if images.dtype == torch.uint8 else images.float()
    if of_classes:
        return images, labels.reshape(-1).long()
    try:
        return images, family.as_targets(labels, outputs)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _fault_of_images(images: Tensor, shape: tuple[int, ...]) -> str | None:
    channels, *size = shape
    found = tuple(images.shape[1:])
    if found == tuple(size) or (channels == 1 and images.ndim == 3):
        return f"the images have no channel, {found}; return images[:, None]"
    if found != shape:
        last = found == (*size, channels)
        remedy = "the channels come last: return images.permute(0, 3, 1, 2)" if last else "that is its image_shape"
        return f"an image has the shape {found}, not {shape}; {remedy}"
    if not len(images):
        return "there are no images"
    if images.dtype == torch.uint8:
        return None
    if not images.is_floating_point():
        return f"the pixels are of type {images.dtype}; give uint8 in 0…255 or floats in [0, 1]"
    low, high = (value.item() for value in images.aminmax())
    if not (low > -torch.inf and high < torch.inf):  # nan is neither
        return "some pixels are not finite (nan or inf); mend or leave out these images"
    if low < 0:
        return f"the pixels are in [{low:.3g}, {high:.3g}], not [0, 1]; leave the normalisation to the model"
    if high > 1:
        return f"the pixels are in [{low:.3g}, {high:.3g}], not [0, 1]; divide by {255 if high > 2 else high:.6g}"
    return None


def _fault_of_labels(labels: Tensor, classes: int) -> str | None:
    if labels.ndim == 2 and labels.shape[1] > 1:
        return f"the labels have the shape {tuple(labels.shape)}; one-hot labels become numbers by labels.argmax(1)"
    if labels.ndim not in (1, 2):
        return f"the labels have the shape {tuple(labels.shape)}; give a number for each image, (n,)"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return f"the labels are of type {labels.dtype}; give integers from 0 to {classes - 1}"
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        low, high = labels.min().item(), labels.max().item()
        remedy = "; labels that begin at 1 become so by labels - 1" if (low, high) == (1, classes) else ""
        return f"the labels are {low} to {high}, not 0 to {classes - 1}{remedy}"
    return None

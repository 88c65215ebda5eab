"""Images, or rows of numbers, and labels or the targets of a task in one file of arrays."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from pydantic import Field, validate_call

from jacobian_robust.data.base import ImageDataModule, ImageDataset
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import Categorical, Family, GaussianMeanScale, PixelCategorical
from jacobian_robust.options import STRICT, Count, NonEmpty, Seed, Size

__all__ = ["TensorsDataModule"]

_NAMES = {True: ("train_images", "train_labels"), False: ("test_images", "test_labels")}


class TensorsDataModule(ImageDataModule):
    """Images and labels in a ``.npz`` or ``.safetensors`` file.

    The file holds ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``; or ``images`` and
    ``labels``, of which a part is kept for the test. Images are ``(n, channels, height, width)``, or ``(n, height,
    width)`` for one channel, or rows of a table, ``(n, columns)``: uint8, or floats in ``[low, high]``.

    Labels, or ``targets`` in place of ``labels``, are integers from 0 for ``task=classification``; of
    ``regression``, ``regression_scale`` and ``counts`` numbers ``(n,)`` or ``(n, k)``, of ``multilabel`` 0 or 1 ``(n,
    labels)``, of ``segmentation`` integers from 0 ``(n, height, width)``.

    Args:
        file: the file.
        low: the number that stands for a black pixel, of float images.
        high: the number that stands for a white pixel, of float images.
        test_share: the part of ``images`` that is tested on, chosen by ``split_seed``.
        batch_size: images in a training batch; the last batch of an epoch may be smaller.
        validation_size: number of training images held out for validation; 0 trains on all.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves.
        shuffle_seed: seed of the order of the training images.

    Raises:
        UserError: if the sizes contradict each other; from :meth:`prepare_data` if the file is not as described.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        file: NonEmpty | None = None,
        low: float = Field(0.0, ge=-1e6, le=1e6),
        high: float = Field(1.0, ge=-1e6, le=1e6),
        test_share: float = Field(0.2, gt=0, lt=1),
        batch_size: Count = 128,
        validation_size: Size = 0,
        split_seed: Seed = 0,
        validate_on_test: bool = False,
        shuffle_seed: Seed = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            validation_size=validation_size,
            split_seed=split_seed,
            validate_on_test=validate_on_test,
            shuffle_seed=shuffle_seed,
        )
        if file is None:
            raise UserError("data.file is missing: give data.file=FILE, a .npz or .safetensors with images and labels")
        if not low < high:
            raise UserError(f"data.high={high:g} must be above data.low={low:g}")
        self.file = Path(file)
        self.low, self.high = low, high
        self.test_share = test_share
        self._arrays: dict[str, Any] = {}
        self._outputs: tuple[int, ...] = ()
        self._digest = ""

    @property
    def data_name(self) -> str:
        """The file's name with the first digits of its hash."""
        return f"{self.file.stem} ({self._digest[:8]})" if self._digest else self.file.stem

    @property
    def output_shape(self) -> tuple[int, ...]:
        """A logit for each class, or what the targets of the task ask for."""
        return (self.classes,) if isinstance(self.family, Categorical) else self._outputs

    def for_task(self, family: Family) -> None:
        """Take what the file holds for targets of the task; what does not fit is said when it is read."""
        self.family = family

    def prepare_data(self) -> None:
        """Read the file, and learn the classes and the images' shape from it.

        Raises:
            UserError: if it is missing, cannot be read, or lacks something.
        """
        if self._arrays:
            return
        try:
            content = self.file.read_bytes()
            if self.file.suffix == ".npz":
                with np.load(self.file, allow_pickle=False) as stored:
                    arrays = dict(stored)
            elif self.file.suffix == ".safetensors":
                arrays = safetensors.numpy.load(content)
            else:
                raise ValueError("the name must end in .npz or .safetensors")
        except FileNotFoundError as error:
            raise UserError(f"data.file={self.file} does not exist") from error
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(f"data.file={self.file} cannot be read: {error}") from error
        arrays = {name.replace("targets", "labels"): array for name, array in arrays.items()}
        split = set(_NAMES[True] + _NAMES[False]) <= arrays.keys()
        if not split and not {"images", "labels"} <= arrays.keys():
            raise UserError(
                f"data.file={self.file} holds {', '.join(sorted(arrays)) or 'nothing'}; give images and labels, or "
                "train_images, train_labels, test_images and test_labels"
            )
        self._learn(*(arrays[name] for name in (_NAMES[True] if split else ("images", "labels"))))
        self._arrays, self._digest = arrays, hashlib.sha256(content).hexdigest()

    def _learn(self, images: Any, labels: Any) -> None:
        """Learn from the training images how large they are, and from the labels how many numbers a model has to give.

        Raises:
            UserError: if they cannot be images and labels.
        """
        whole, of_classes = np.issubdtype(labels.dtype, np.integer), isinstance(self.family, Categorical)
        paired = labels.size and labels.shape[:1] == images.shape[:1]
        if images.ndim not in (2, 3, 4) or not paired or (of_classes and not whole):
            raise UserError(
                f"data.file={self.file}: give images (n, channels, height, width), or (n, columns), and n "
                f"{'integer labels' if of_classes else 'targets'}, not {images.shape} {images.dtype} and "
                f"{labels.shape} {labels.dtype}"
            )
        self.pictures = images.ndim > 2
        self.image_shape = (1,) * (4 - images.ndim) + images.shape[1:]
        self.classes = int(labels.max()) + 1 if whole else 1
        if of_classes and self.classes < 2:
            raise UserError(f"data.file={self.file}: there is one class alone; give labels of at least two, from 0")
        numbers = labels.shape[1] if labels.ndim > 1 else 1
        if isinstance(self.family, PixelCategorical):
            self._outputs = (max(self.classes, 2), *self.image_shape[1:])
        else:
            self._outputs = (2 * numbers if isinstance(self.family, GaussianMeanScale) else numbers,)

    def _read(self, *, train: bool) -> ImageDataset:
        self.prepare_data()
        if "images" in self._arrays:
            images, labels = self._arrays["images"], self._arrays["labels"]
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
            tested = max(1, round(self.test_share * len(labels)))
            kept = (order[tested:] if train else order[:tested]).sort().values.numpy()
            images, labels = images[kept], labels[kept]
        else:
            images, labels = (self._arrays[name] for name in _NAMES[train])
        while images.ndim < 4:  # without a channel, or rows of a table
            images = images[:, None]
        if np.issubdtype(images.dtype, np.floating) and (self.low, self.high) != (0.0, 1.0):
            images = (images - self.low) / (self.high - self.low)
        return ImageDataset(images, labels)

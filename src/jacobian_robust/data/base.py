"""What every set of labelled images has in common."""

import abc
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jacobian_robust.data.augmentation import Augmentation
from jacobian_robust.data.checks import checked
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.loading import BatchLoader, EpochSampler, ResumableLoader

__all__ = ["Batch", "ImageDataModule", "ImageDataset"]

Batch = tuple[Float[Tensor, "batch channels height width"], Shaped[Tensor, "batch *_"]]
Images = UInt8[Tensor, "images channels height width"] | Float[Tensor, "images channels height width"]


class ImageDataset(Dataset[Batch]):
    """Images and labels held in memory and indexed a whole batch at a time.

    Args:
        images: ``(images, channels, height, width)``: uint8, or float32 pixels in [0, 1]. What a data set of one's own
            returns is checked, and converted where that is harmless, by the datamodule.
        labels: ``(images,)``, int64; or the targets of a task, ``(images, …)``.
    """

    workers = 0
    """Processes that read ahead; a slice of a tensor needs none."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch: float32 pixels in [0, 1] and labels. The DataLoader calls this once a batch."""
        index = torch.tensor(indices, device=self.images.device)
        return _pixels(self.images[index]), self.labels[index]

    def subset(self, index: Int[Tensor, "kept"]) -> "ImageDataset":
        """Return some of the images, in this order."""
        return ImageDataset(self.images[index], self.labels[index])

    def checked(self, **expected: Any) -> "ImageDataset":
        """Return the same with the types that training needs; see :func:`jacobian_robust.data.checks.checked`.

        Raises:
            UserError: if the images or labels are not what a datamodule promises.
        """
        return ImageDataset(*checked(self.images, self.labels, **expected))

    def to(self, device: torch.device) -> "ImageDataset":
        """Return the same images in a device's memory."""
        return ImageDataset(self.images.to(device), self.labels.to(device))

    def first(self, limit: int | None) -> Batch:
        """Return the first ``limit`` images, or all, as one batch."""
        return _pixels(self.images[:limit]), self.labels[:limit]


def _pixels(images: Images) -> Float[Tensor, "images channels height width"]:
    return images if images.is_floating_point() else images.float().div_(255)


def _as_is(batch: Any) -> Any:
    return batch


class ImageDataModule(abc.ABC):
    """Labelled images, split into what is trained on, what is held out of it and what is tested on.

    Args:
        batch_size: images in a training batch, on all devices together; the last batch of an epoch may be smaller.
        validation_size: number of training images held out for validation; 0 trains on all, as the note does.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves (the note's Figure 1).
            Nothing is selected by them.
        shuffle_seed: seed of the order of the training images, which depends on it and on the epoch alone.

    Attributes:
        classes: number of classes.
        class_names: what they are called in tables and figures; ``None`` for their numbers.
        image_shape: channels, height and width of an image.
        augmentation: changes the images of each training batch; ``None`` for none.
        pictures: whether the images can be looked at, rotated and inverted.
        unit: of the targets, if they have one: ``°`` is an angle of the picture, anticlockwise.
        family: of the distribution that a model's outputs describe; :meth:`for_task` sets it.
        fetches: whether missing files may be fetched and put where they are looked for.

    Raises:
        UserError: if the sizes contradict each other.
    """

    classes: int
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int, int]
    pictures: bool = True
    unit: str = ""
    augmentation: Augmentation | None = None

    def __init__(
        self, *, batch_size: int, validation_size: int, split_seed: int, validate_on_test: bool, shuffle_seed: int
    ) -> None:
        if validate_on_test and validation_size:
            raise UserError("data.validate_on_test needs data.validation_size=0: there are validation images to use")
        self.batch_size = batch_size
        self.validation_size = validation_size
        self.split_seed = split_seed
        self.validate_on_test = validate_on_test
        self.shuffle_seed = shuffle_seed
        self.family: Family = CATEGORICAL
        self.fetches = True
        self._splits: dict[str, ImageDataset] = {}

    @property
    def data_name(self) -> str:
        """What the data are called in results."""
        return type(self).__name__.removesuffix("DataModule")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of a model's outputs for one image."""
        return (self.classes,)

    def for_task(self, family: Family) -> None:
        """Hand out the targets of a task.

        Raises:
            UserError: if these data have none.
        """
        if not isinstance(family, Categorical):
            raise UserError(
                f"task: {self.data_name} has a class for each image; give task=classification, or data=mnist_angle, "
                "data=mnist_pairs or data=tensors"
            )

    @abc.abstractmethod
    def _read(self, *, train: bool) -> ImageDataset:
        """Return the training images, the held-out ones included, or the test images."""

    @property
    def validation_name(self) -> Literal["validation", "test"]:
        """What the per-epoch validation curves are measured on."""
        return "test" if self.validate_on_test else "validation"

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs: ``fit`` the training images, ``test`` the test images, ``None`` both."""
        if stage in ("fit", "validate", None) and "train" not in self._splits:
            everything = self._checked(train=True)
            if self.validation_size >= len(everything):
                raise UserError(
                    f"data.validation_size={self.validation_size} leaves nothing of {len(everything)} images to train "
                    "on; give a smaller one"
                )
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(self.split_seed))
            held_out = order[: self.validation_size].sort().values
            kept = order[self.validation_size :].sort().values
            # Without a copy where none is needed: a set can be as large as the memory.
            self._splits["train"] = everything.subset(kept) if self.validation_size else everything
            self._splits["validation"] = everything.subset(held_out)
        needs_test = stage in ("test", None) or self.validate_on_test
        if needs_test and "test" not in self._splits:
            self._splits["test"] = self._checked(train=False)

    def _checked(self, *, train: bool) -> ImageDataset:
        read = self._read(train=train)  # first: of a folder or a file it says what the classes are
        what = f"data: {self.data_name}, {'training' if train else 'test'} images"
        return read.checked(outputs=self.output_shape, shape=self.image_shape, what=what, family=self.family)

    def prepare_data(self) -> None:  # noqa: B027 (data that are drawn need no files)
        """Make sure that the files are there."""

    def to(self, device: torch.device) -> None:
        """Move what has been read to a device's memory: MNIST is 55 MB, and copying each batch would cost more."""
        self._splits = {name: split.to(device) for name, split in self._splits.items()}

    def require(self, split: Literal["train", "validation", "test"]) -> None:
        """Make sure that a split has images.

        Raises:
            UserError: if it is the validation split and no images are held out.
        """
        if split == "validation" and not self.validation_size:
            raise UserError("split=validation: no images are held out with data.validation_size=0; use split=test")

    def split(self, name: Literal["train", "validation", "test"]) -> ImageDataset:
        """Return a split in memory; :meth:`setup` has been called."""
        return self._splits[name]

    def train_dataloader(self, rank: int = 0, world_size: int = 1) -> DataLoader[Batch]:
        """Return the shuffled batches of one process; the order depends on the seed and the epoch alone.

        Batch ``k`` of all processes together is batch ``k`` of a single one.

        Raises:
            UserError: if the processes cannot share a batch evenly: the mean of their losses would not be its loss.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be split evenly over {world_size} processes; give a multiple"
            )
        split = self.split("train")
        sampler = EpochSampler(len(split), self.shuffle_seed, rank, world_size)
        return ResumableLoader(
            split,
            sampler,
            self.batch_size // world_size,
            augmentation=self.augmentation,
            collate_fn=_as_is,
            num_workers=split.workers,
        )

    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return batches of the held-out images, of the test set if asked for, or nothing."""
        split = self.split(self.validation_name)
        if not len(split):
            return []
        # A batch of 128 keeps the activations in the processor's cache; large ones were twice as slow on a CPU.
        sampler = EpochSampler(len(split), None, rank, world_size)
        return BatchLoader(split, sampler, max(1, 128 // world_size), collate_fn=_as_is, num_workers=split.workers)

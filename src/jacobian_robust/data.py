"""Datamodules: images in memory, handed out in batches as float32 pixels in [0, 1]."""

import abc
import contextlib
import functools
import hashlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from pydantic import Field, validate_call
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jacobian_robust.errors import UserError
from jacobian_robust.files import PROJECT
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.loading import BatchLoader, EpochSampler, ResumableLoader
from jacobian_robust.options import STRICT, Count, NonEmpty, Seed, Size

__all__ = [
    "CIFAR10DataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageDataset",
    "MNISTDataModule",
    "ToyDataModule",
]

Batch = tuple[Float[Tensor, "batch channels height width"], Shaped[Tensor, "batch *_"]]
Images = UInt8[Tensor, "images channels height width"] | Float[Tensor, "images channels height width"]


class ImageDataset(Dataset[Batch]):
    """Images and labels held in memory and indexed a whole batch at a time.

    Args:
        images: ``(images, channels, height, width)``: uint8, or float32 pixels in [0, 1].
        labels: ``(images,)``, int64; or the targets of a task, ``(images, …)``.
    """

    def __init__(self, images: Images, labels: Shaped[Tensor, "images *_"]) -> None:
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

    def to(self, device: torch.device) -> "ImageDataset":
        """Return the same images in a device's memory."""
        return ImageDataset(self.images.to(device), self.labels.to(device))

    def first(self, limit: int | None) -> Batch:
        """Return the first ``limit`` images, or all, as one batch."""
        return _pixels(self.images[:limit]), self.labels[:limit]


def _pixels(images: Images) -> Float[Tensor, "images channels height width"]:
    return images if images.is_floating_point() else images.float().div_(255)


@contextlib.contextmanager
def _no_empty_directory_left(directory: Path) -> Iterator[None]:
    """Remove the directory, and those above it, if they were made in vain: by a download that failed."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or not made
            for place in missing:
                place.rmdir()


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
        image_shape: channels, height and width of an image.
        pictures: whether the images can be looked at, rotated and inverted.
        family: of the distribution that a model's outputs describe; :meth:`for_task` sets it.
        fetches: whether missing files may be fetched and put where they are looked for.

    Raises:
        UserError: if the sizes contradict each other.
    """

    classes: ClassVar[int]
    image_shape: ClassVar[tuple[int, int, int]]
    pictures: ClassVar[bool] = True

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
                "mnist_pairs or tabular"
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
            everything = self._read(train=True)
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(self.split_seed))
            held_out = order[: self.validation_size].sort().values
            kept = order[self.validation_size :].sort().values
            self._splits["train"] = ImageDataset(everything.images[kept], everything.labels[kept])
            self._splits["validation"] = ImageDataset(everything.images[held_out], everything.labels[held_out])
        needs_test = stage in ("test", None) or self.validate_on_test
        if needs_test and "test" not in self._splits:
            self._splits["test"] = self._read(train=False)

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
        return ResumableLoader(split, sampler, self.batch_size // world_size, collate_fn=_as_is)

    def val_dataloader(self, rank: int = 0, world_size: int = 1) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return batches of the held-out images, of the test set if asked for, or nothing."""
        split = self.split(self.validation_name)
        if not len(split):
            return []
        # A batch of 128 keeps the activations in the processor's cache; large ones were twice as slow on a CPU.
        sampler = EpochSampler(len(split), None, rank, world_size)
        return BatchLoader(split, sampler, max(1, 128 // world_size), collate_fn=_as_is)


class _FromTorchvision:
    """A class of torchvision's data sets, imported when it is first asked for: that takes seconds."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.name)


class MNISTDataModule(ImageDataModule):
    """MNIST, from the four original files under ``root/MNIST/raw``, read by torchvision.

    Args:
        root: directory of the data; a relative one is looked for in the working directory, then in the project's.
        batch_size: images in a training batch; the last batch of an epoch may be smaller.
        validation_size: number of training images held out for validation; 0 trains on all, as the note does.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves (the note's Figure 1).
            Nothing is selected by them.
        shuffle_seed: seed of the order of the training images, which depends on it and on the epoch alone.

    Raises:
        UserError: if the sizes contradict each other; from :meth:`prepare_data` if files are missing or damaged.
    """

    dataset_class: Any = _FromTorchvision("MNIST")
    classes = 10
    image_shape = (1, 28, 28)

    @validate_call(config=STRICT)
    def __init__(
        self,
        root: NonEmpty = "data",
        batch_size: Count = 32,
        validation_size: Size = 5000,
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
        if validation_size >= 60_000:
            raise UserError(f"data.validation_size={validation_size} leaves nothing of 60000 images to train on")
        self.root = Path(root)
        if not self.root.is_absolute() and not (self.root / self.dataset_class.__name__).exists():
            self.root = PROJECT / root

    @property
    def data_name(self) -> str:
        """What the data are called in results."""
        return self.dataset_class.__name__

    def prepare_data(self) -> None:
        """Make sure that the files are there, downloading them if torchvision can, and whole.

        Raises:
            UserError: if a file is missing or its md5 sum is not the one that torchvision expects.
        """
        raw = self.root / self.dataset_class.__name__ / "raw"
        archives = [(raw / name, md5) for name, md5 in self.dataset_class.resources]
        if not all(archive.is_file() for archive, _ in archives):
            if not self.fetches:
                raise UserError(
                    f"{self.dataset_class.__name__}: files missing in {raw}, where the checkpoint says that they lay; "
                    "name the data, data=NAME, with data.root if need be"
                )
            try:
                with _no_empty_directory_left(raw):
                    self.dataset_class(str(self.root), download=True)
            except Exception as error:  # torchvision raises what its transport raised
                raise UserError(
                    f"{self.dataset_class.__name__}: files missing in {raw} and the download failed "
                    f"({type(error).__name__}); put the four .gz files there or set data.root"
                ) from error
        for archive, md5 in archives:
            if archive.is_file() and hashlib.md5(archive.read_bytes()).hexdigest() != md5:
                raise UserError(
                    f"{archive} is damaged (its md5 sum is not {md5}); restore it, "
                    f"for the shipped files with: git checkout -- {archive.parent}"
                )

    def present(self) -> bool:
        """Return whether the files are there, without a download."""
        raw = self.root / self.dataset_class.__name__ / "raw"
        return all((raw / name).is_file() for name, _ in self.dataset_class.resources)

    def _read(self, *, train: bool) -> ImageDataset:
        """Return a split, extracted into a temporary folder: the shipped one is never written to, by no process."""
        raw = self.root / self.dataset_class.__name__ / "raw"
        files = sorted(raw.iterdir()) if raw.is_dir() else []
        stamps = tuple((str(file), file.stat().st_mtime_ns) for file in files)
        images, labels = _decoded(self.dataset_class, self.root, train, stamps)
        return ImageDataset(images.clone(), labels.clone())


@functools.lru_cache(maxsize=4)
def _decoded(dataset_class: Any, root: Path, train: bool, stamps: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a split, read once in a process; ``stamps`` are its files with their times."""
    from torchvision.datasets.utils import extract_archive

    raw = root / dataset_class.__name__ / "raw"
    archives = [raw / name for name, _ in dataset_class.resources]
    with tempfile.TemporaryDirectory() as scratch:
        place = root
        if all(archive.is_file() for archive in archives):
            place = Path(scratch)
            extracted = place / dataset_class.__name__ / "raw"
            extracted.mkdir(parents=True)
            for archive in archives:
                extract_archive(str(archive), str(extracted))
        try:
            dataset = dataset_class(str(place), train=train)
        except (RuntimeError, ValueError, AssertionError, OSError) as error:
            raise UserError(f"{raw} cannot be read ({error}); remove the extracted files there") from error
    return dataset.data.unsqueeze(1), dataset.targets


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST, by torchvision: found under ``root/FashionMNIST/raw``, or downloaded to it."""

    dataset_class = _FromTorchvision("FashionMNIST")


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10, by torchvision: found under ``root/cifar-10-batches-py``, extracted or downloaded to it.

    Args:
        root: directory of the data; a relative one is looked for in the working directory, then in the project's.
        batch_size: images in a training batch; the last batch of an epoch may be smaller.
        validation_size: number of training images held out for validation; 0 trains on all.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves. Nothing is selected by
            them.
        shuffle_seed: seed of the order of the training images, which depends on it and on the epoch alone.

    Raises:
        UserError: if the sizes contradict each other; from :meth:`prepare_data` if files are missing or damaged.
    """

    dataset_class: Any = _FromTorchvision("CIFAR10")
    classes = 10
    image_shape = (3, 32, 32)

    @validate_call(config=STRICT)
    def __init__(
        self,
        root: NonEmpty = "data",
        batch_size: Count = 128,
        validation_size: Size = 5000,
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
        if validation_size >= 50_000:
            raise UserError(f"data.validation_size={validation_size} leaves nothing of 50000 images to train on")
        self.root = Path(root)
        places = (self.dataset_class.base_folder, self.dataset_class.filename)
        if not self.root.is_absolute() and not any((self.root / place).exists() for place in places):
            self.root = PROJECT / root

    @property
    def data_name(self) -> str:
        """What the data are called in results."""
        return self.dataset_class.__name__

    def prepare_data(self) -> None:
        """Make sure that the files are there and whole: torchvision extracts the archive, or downloads it if it can.

        Raises:
            UserError: if a file is missing or its md5 sum is not the one that torchvision expects.
        """
        try:
            self.dataset_class(str(self.root))
        except RuntimeError:  # torchvision's word for missing and for damaged files
            try:
                with _no_empty_directory_left(self.root):
                    self.dataset_class(str(self.root), download=True)
            except Exception as error:  # torchvision raises what its transport raised
                raise UserError(
                    f"CIFAR10: files missing or damaged in {self.root / self.dataset_class.base_folder} and the "
                    f"download failed ({type(error).__name__}); put {self.dataset_class.filename} into "
                    f"{self.root} or set data.root"
                ) from error

    def _read(self, *, train: bool) -> ImageDataset:
        try:
            dataset = self.dataset_class(str(self.root), train=train)
        except RuntimeError as error:
            raise UserError(f"CIFAR10: files missing or damaged in {self.root}; set data.root") from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return ImageDataset(images, torch.tensor(dataset.targets))


class ToyDataModule(ImageDataModule):
    """Points of the unit square, along three interleaved spiral arms, one for each class; drawn, not read.

    A point is an image of two pixels, its coordinates, so that models, penalties and attacks see nothing new. Arm ``k``
    is ``(1/2, 1/2) + r(t)·(cos φ, sin φ)`` with ``r = 0.08 + 0.34 t``, ``φ = 2π (k/3 + turns·t)`` and ``t²`` uniform in
    [0, 1], which spreads the points along it; Gaussian noise is added, and what leaves the square is put on its edge.

    Args:
        training_size: number of training points, the held-out ones included.
        test_size: number of test points.
        noise: standard deviation of each coordinate about the arm.
        turns: how much of a full turn an arm makes.
        data_seed: of the points.
        batch_size: points in a training batch.
        validation_size: number of training points held out for validation.
        split_seed: seed of the choice of the held-out points.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves.
        shuffle_seed: seed of the order of the training points.

    Raises:
        UserError: if the sizes contradict each other.
    """

    classes = 3
    image_shape = (1, 1, 2)
    pictures = False

    @validate_call(config=STRICT)
    def __init__(
        self,
        training_size: int = Field(500, gt=0, le=10**7),
        test_size: int = Field(1000, gt=0, le=10**7),
        noise: float = Field(0.05, ge=0, le=1e6),
        turns: float = Field(0.5, ge=-1e6, le=1e6),
        data_seed: Seed = 0,
        batch_size: Count = 32,
        validation_size: Size = 200,
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
        if validation_size >= training_size:
            raise UserError(
                f"data.validation_size={validation_size} leaves nothing of {training_size} points to train on"
            )
        self.training_size = training_size
        self.test_size = test_size
        self.noise = noise
        self.turns = turns
        self.data_seed = data_seed

    def _read(self, *, train: bool) -> ImageDataset:
        size = self.training_size if train else self.test_size
        generator = torch.Generator().manual_seed(2 * self.data_seed + 1 + train)
        labels = torch.arange(size) % self.classes
        t = torch.rand(size, generator=generator).sqrt()
        radius = 0.08 + 0.34 * t
        angle = 2 * math.pi * (labels / self.classes + self.turns * t)
        points = 0.5 + radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        points += self.noise * torch.randn(size, 2, generator=generator)
        return ImageDataset(points.clamp(0, 1).view(-1, *self.image_shape), labels)

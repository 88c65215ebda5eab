"""MNIST, Fashion-MNIST and CIFAR-10, from their files; torchvision fetches them where they are missing."""

import contextlib
import functools
import gzip
import hashlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from pydantic import validate_call
from torch import Tensor

from jacobian_robust.data.base import ImageDataModule, ImageDataset
from jacobian_robust.errors import UserError
from jacobian_robust.files import PROJECT
from jacobian_robust.options import STRICT, Count, NonEmpty, Seed, Size

__all__ = ["CIFAR10DataModule", "FashionMNISTDataModule", "MNISTDataModule"]


_ORIGINAL = {
    "MNIST": "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
    "FashionMNIST": "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
}
"""The hash of what the original files hold, by which unpacked and repacked ones are known.

Debian's Fashion-MNIST is packed without names and times: with those in the headers again, the files have the md5 sums
that torchvision expects.
"""


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


class _FromTorchvision:
    """A class of torchvision's data sets, imported when it is first asked for: that takes seconds."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.name)


class MNISTDataModule(ImageDataModule):
    """MNIST, from four IDX files, packed (``.gz``) or not, under ``root/MNIST/raw`` or in ``root`` itself.

    Any readable files are taken; where they are not the original ones, their hash is part of ``data_name``. For sets of
    other files, as QMNIST and EMNIST, a subclass's ``dataset_class`` reads them itself.

    Args:
        root: directory of the data; a relative one is looked for in the working directory, then in the project's.
        batch_size: images in a training batch; the last batch of an epoch may be smaller.
        validation_size: number of training images held out for validation; 0 trains on all, as the note does.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves (the note's Figure 1).
            Nothing is selected by them.
        shuffle_seed: seed of the order of the training images, which depends on it and on the epoch alone.

    Attributes:
        dataset_class: torchvision's class.
        arguments: further arguments of it, where it reads the files itself.

    Raises:
        UserError: if the sizes contradict each other; from :meth:`prepare_data` if files are missing or damaged.
    """

    dataset_class: Any = _FromTorchvision("MNIST")
    arguments: Mapping[str, Any] = MappingProxyType({})
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
        self.root = Path(root)
        if not self.root.is_absolute() and not self.root.joinpath(self.dataset_class.__name__).exists():
            self.root = self.root if self._files(self.root) else PROJECT / root

    @property
    def data_name(self) -> str:
        """What the data are called in results; with their hash, where they are not the original files."""
        name: str = self.dataset_class.__name__
        files = self.files()
        if files is None or _sums(files) == tuple(md5 for _, md5 in self.dataset_class.resources):
            return name
        contents = _contents(files)
        return name if contents == _ORIGINAL.get(name) else f"{name} ({contents[:12]})"

    @property
    def _reads_itself(self) -> bool:
        """Whether torchvision's class has other files than MNIST's four."""
        return not isinstance(vars(self.dataset_class).get("resources"), list)

    def _files(self, folder: Path) -> tuple[Path, ...] | None:
        """Return the four files in a folder, each packed or unpacked; ``None`` if one is missing."""
        if self._reads_itself:
            return None
        found = []
        for name, _ in self.dataset_class.resources:
            packed = folder / name
            places = [place for place in (packed, packed.with_suffix("")) if place.is_file()]
            if not places:
                return None
            found.append(places[0])
        return tuple(found)

    def files(self) -> tuple[Path, ...] | None:
        """Return the four files, packed or not; ``None`` if they are not there, or the class reads them itself."""
        folders = (self.root / self.dataset_class.__name__ / "raw", self.root)
        return next((files for files in map(self._files, folders) if files), None)

    def prepare_data(self) -> None:
        """Make sure that the files are there, downloading them if torchvision can, and readable.

        Raises:
            UserError: if a file is missing or damaged.
        """
        name = self.dataset_class.__name__
        if self._reads_itself:
            self._torchvision(train=True, download=self.fetches)
            return
        if self.files() is None:
            raw = self.root / name / "raw"
            if not self.fetches:
                raise UserError(
                    f"{name}: files missing in {raw}, where the checkpoint says that they lay; "
                    "name the data, data=NAME, with data.root if need be"
                )
            try:
                with _no_empty_directory_left(raw):
                    self.dataset_class(str(self.root), download=True)
            except Exception as error:  # torchvision raises what its transport raised
                raise UserError(
                    f"{name}: files missing in {raw} and the download failed "
                    f"({type(error).__name__}); put the four .gz files there or set data.root=DIRECTORY, "
                    f"which holds {name}/raw (data/ of a clone of this project has MNIST)"
                ) from error
        for train in (True, False):
            self._read(train=train)

    def _torchvision(self, *, train: bool, download: bool) -> Any:
        """Return torchvision's own data set.

        Raises:
            UserError: if an argument or a file is missing.
        """
        name = self.dataset_class.__name__
        try:
            return self.dataset_class(str(self.root), train=train, download=download, **self.arguments)
        except TypeError as error:
            raise UserError(f"data: {name}: {error}; give it in the class's arguments = {{…}}") from error
        except Exception as error:  # torchvision raises what its transport raised
            raise UserError(
                f"{name}: files missing in {self.root / name / 'raw'}, or unreadable ({type(error).__name__}); "
                "put them there or set data.root"
            ) from error

    def _read(self, *, train: bool) -> ImageDataset:
        """Return a split. Nothing is written to its folder."""
        files = self.files()
        if files is None:
            dataset = self._torchvision(train=train, download=False)
            targets = dataset.targets  # QMNIST's have the class in their first column
            return ImageDataset(dataset.data.unsqueeze(1), targets if targets.ndim == 1 else targets[:, 0])
        images, labels = (_decoded(file, file.stat().st_mtime_ns) for file in (files[:2] if train else files[2:]))
        return ImageDataset(images[:, None].clone(), labels.long())


@functools.lru_cache(maxsize=8)
def _decoded(file: Path, changed: int) -> Tensor:
    """Return the numbers in an IDX file of bytes, read once in a process; ``changed`` is its time.

    Raises:
        UserError: if it is damaged.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        zero, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        if (zero, kind) != (0, 8):
            raise ValueError("it is no IDX file of bytes")
        numbers = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (EOFError, ValueError, struct.error, zlib.error, OSError) as error:
        raise UserError(
            f"{file} is damaged ({error}); restore it, for the shipped files with: git checkout -- {file.parent}"
        ) from error
    return torch.from_numpy(numbers.copy())


def _sums(files: tuple[Path, ...]) -> tuple[str, ...]:
    """Return the files' md5 sums, by which torchvision knows its own."""
    return tuple(_sum(file, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=16)
def _sum(file: Path, changed: int) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def _contents(files: tuple[Path, ...]) -> str:
    """Return the SHA-256 of what the files hold, packed or not."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(_decoded(file, file.stat().st_mtime_ns).numpy().tobytes())
    return digest.hexdigest()


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST, from four IDX files, packed or not, under ``root/FashionMNIST/raw`` or in ``root`` itself."""

    dataset_class = _FromTorchvision("FashionMNIST")
    class_names = (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )


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
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
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

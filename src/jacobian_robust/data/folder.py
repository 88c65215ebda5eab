"""A folder of pictures, one folder a class."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from pydantic import Field, validate_call
from torch import Tensor
from tqdm import tqdm

from jacobian_robust.data.base import Batch, ImageDataModule, ImageDataset
from jacobian_robust.data.checks import checked
from jacobian_robust.errors import UserError
from jacobian_robust.options import STRICT, Count, NonEmpty, Seed, Size

__all__ = ["ImageFolderDataModule"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr", "PA")
_AT_ONCE = 256
"""Pictures that a thread decodes before it takes the next ones: a task for each would cost more than small pictures."""


@dataclass(frozen=True)
class _Format:
    """What every picture becomes: its size, and whether it is cut and scaled to it."""

    channels: int
    height: int
    width: int
    resized: bool

    def decode(self, path: str) -> UInt8[np.ndarray, "channels height width"]:
        """Return a picture's pixels.

        Raises:
            UserError: if it cannot be read, or is of another kind.
        """
        try:
            with Image.open(path) as image:
                mode = image.mode
                if mode not in _GREY + _COLOUR:
                    raise UserError(f"{path} is a picture of mode {mode}; give 8 bits a channel, grey or RGB")
                if self.channels == 1 and mode not in _GREY:
                    raise UserError(f"{path} is in colour, and the first picture is not; give data.channels=3, or 1")
                found = image.convert("L" if self.channels == 1 else "RGB")
        except UserError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(f"{path} cannot be read as a picture ({error}); mend it or take it away") from error
        if self.resized:
            found = ImageOps.fit(found, (self.width, self.height), Image.Resampling.BILINEAR)
        if found.size != (self.width, self.height):
            raise UserError(
                f"{path} has {found.height}×{found.width} pixels, and the first picture {self.height}×{self.width}; "
                "give data.image_size=[HEIGHT,WIDTH]"
            )
        pixels = np.asarray(found)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class _Colours(_Format):
    """Grey pixels of whatever pictures, where one channel was asked for."""

    def decode(self, path: str) -> UInt8[np.ndarray, "channels height width"]:
        """Return a picture's pixels in grey."""
        red_green_blue = _Format(3, self.height, self.width, self.resized).decode(path).transpose(1, 2, 0)
        return np.asarray(Image.fromarray(np.ascontiguousarray(red_green_blue)).convert("L"))[None]


class _LazyImages(ImageDataset):
    """Pictures that are decoded when a batch asks for them, by processes that read ahead."""

    def __init__(self, paths: Sequence[str], labels: Int[Tensor, "images"], form: _Format, workers: int) -> None:
        super().__init__(None, labels)
        self.paths = np.asarray(paths)
        self.form = form
        self.workers = workers

    def _decoded(self, paths: Sequence[str]) -> UInt8[Tensor, "images channels height width"]:
        return torch.from_numpy(np.stack([self.form.decode(path) for path in paths]))

    def __getitems__(self, indices: list[int]) -> Batch:
        return self._decoded(self.paths[indices].tolist()).float().div_(255), self.labels[indices]

    def subset(self, index: Int[Tensor, "kept"]) -> "_LazyImages":
        return _LazyImages(self.paths[index.numpy()].tolist(), self.labels[index], self.form, self.workers)

    def checked(self, **expected: Any) -> "_LazyImages":
        first = self._decoded(self.paths[:2].tolist())
        checked(first, self.labels[: len(first)], **expected)
        return self

    def to(self, device: torch.device) -> "_LazyImages":
        return self

    def first(self, limit: int | None) -> Batch:
        return self.__getitems__(list(range(len(self)))[:limit])


class ImageFolderDataModule(ImageDataModule):
    """Pictures in folders, as torchvision's ``ImageFolder`` has them: ``root/train/CLASS/*.png``, and ``root/test``.

    Without ``train`` and ``test`` the classes lie in ``root``, and a part of the pictures is kept for the test. Classes
    are numbered in the order of their names. What fits into memory is decoded once, and kept in a cache that the names,
    sizes and times of the files decide on; anything larger is read by workers as it is needed.

    Args:
        root: the folder.
        image_size: height and width that every picture is scaled to, its longer side cut; ``None`` where all have one.
        channels: 1 for grey, 3 for RGB; ``None`` for those of the first picture.
        test_share: without a folder ``test``, the part of the pictures that is tested on, chosen by ``split_seed``.
        memory: GB that the decoded pictures may take.
        workers: processes that read pictures where they may not.
        cache: a folder for the decoded pictures; ``None`` for the user's cache.
        batch_size: images in a training batch; the last batch of an epoch may be smaller.
        validation_size: number of training images held out for validation; 0 trains on all.
        split_seed: seed of the choice of the held-out images.
        validate_on_test: with ``validation_size=0``, use the test set for the per-epoch curves.
        shuffle_seed: seed of the order of the training images.

    Raises:
        UserError: if the sizes contradict each other; if the folder, or a picture, is not as described.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        root: NonEmpty | None = None,
        image_size: Count | list[Count] | None = None,
        channels: Literal[1, 3] | None = None,
        test_share: float = Field(0.2, gt=0, lt=1),
        memory: float = Field(4.0, ge=0, le=1e6),
        workers: Size = 2,
        cache: NonEmpty | None = None,
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
        if root is None:
            raise UserError("data.root is missing: give data.root=DIR, a folder of train/CLASS/*.png and test/CLASS/*")
        size = [image_size] * 2 if isinstance(image_size, int) else image_size
        if size is not None and len(size) != 2:
            raise UserError(f"data.image_size={image_size}: give a number of pixels, or [HEIGHT,WIDTH]")
        self.root = Path(root)
        self.size, self.channels, self.test_share = size, channels, test_share
        self.memory, self.workers = memory, workers
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = Path(cache) if cache else caches / "jacobian_robust"
        self._files: dict[bool, list[tuple[str, int, int, int]]] = {}
        self._known_by = ""

    @property
    def data_name(self) -> str:
        """The folder's name, with the first digits of a hash of its files' names and sizes."""
        name = self.root.resolve().name
        return f"{name} ({self._known_by[:8]})" if self._files else name

    def prepare_data(self) -> None:
        """List the files, and learn the classes and the images' shape from them.

        Raises:
            UserError: if there are none, or training and test have other classes.
        """
        if self._files:
            return
        training, test = self.root / "train", self.root / "test"
        places = [training, test] if training.is_dir() and test.is_dir() else [training]
        if not training.is_dir():
            places = [self.root]
        if not self.root.is_dir():
            raise UserError(f"data.root={self.root} is no folder; give one of train/CLASS/*.png and test/CLASS/*.png")
        names = [tuple(sorted(entry.name for entry in os.scandir(place) if entry.is_dir())) for place in places]
        if len(names[0]) < 2:
            raise UserError(f"{places[0]} holds {len(names[0])} folders; give one for each class, at least two")
        if len(names) == 2 and names[0] != names[1]:
            odd = sorted(set(names[0]) ^ set(names[1]))[0]
            raise UserError(f"{self.root}: the class {odd} is not in both train and test; name the folders alike")
        found = [_listed(place, names[0]) for place in places]
        self.classes, self.class_names = len(names[0]), names[0]
        if len(found) == 1:
            order = torch.randperm(len(found[0]), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
            tested = max(1, round(self.test_share * len(order)))
            found = [[found[0][i] for i in sorted(part)] for part in (order[tested:], order[:tested])]
        self._files = {True: found[0], False: found[1]}
        self.image_shape = self._shape(found[0][0][0])
        start = len(str(self.root))
        self._known_by = _digest([(path[start:], size) for path, _, size, _ in found[0] + found[1]])

    def _shape(self, first: str) -> tuple[int, int, int]:
        try:
            with Image.open(first) as image:
                channels = self.channels or (1 if image.mode in _GREY else 3)
                height, width = self.size or (image.height, image.width)
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(f"{first} cannot be read as a picture ({error}); mend it or take it away") from error
        return channels, height, width

    def _read(self, *, train: bool) -> ImageDataset:
        self.prepare_data()
        files = self._files[train]
        paths, labels = [path for path, *_ in files], torch.tensor([label for _, label, *_ in files])
        made = _Colours if self.channels == 1 else _Format
        form = made(*self.image_shape, resized=self.size is not None)
        if sum(map(len, self._files.values())) * np.prod(self.image_shape) > self.memory * 1e9:
            return _LazyImages(paths, labels, form, self.workers)
        described = [made.__name__, *self.image_shape, form.resized, *files]
        file = self.cache / f"{_digest(described)}.npy"
        return ImageDataset(torch.from_numpy(_cached(file, paths, form)), labels)


def _digest(described: Any) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _listed(place: Path, names: Sequence[str]) -> list[tuple[str, int, int, int]]:
    """Return path, class, size in bytes and time of every picture, in the order of the names.

    Raises:
        UserError: if a class has none.
    """
    found = []
    for label, name in enumerate(names):
        entries = [entry for entry in os.scandir(place / name) if entry.name.lower().endswith(_SUFFIXES)]
        if not entries:
            raise UserError(f"{place / name} holds no pictures ({', '.join(_SUFFIXES)}); add some, or take it away")
        for entry in sorted(entries, key=lambda entry: entry.name):
            status = entry.stat()
            found.append((entry.path, label, status.st_size, status.st_mtime_ns))
    return found


def _cached(file: Path, paths: Sequence[str], form: _Format) -> UInt8[np.ndarray, "images channels height width"]:
    """Return the pixels of all pictures, from the cache if they are in it; if they are not, they are put there."""
    shape = (len(paths), form.channels, form.height, form.width)
    try:
        pixels = np.load(file, mmap_mode="c")  # what is not used takes no memory
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    except (OSError, ValueError):  # none, or a damaged one
        pass
    pixels = np.empty(shape, np.uint8)
    _decode(paths, form, pixels)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.{os.getpid()}")
        with scratch.open("wb") as out:
            np.save(out, pixels)
        scratch.replace(file)
    except OSError as error:
        tqdm.write(f"the decoded pictures are not kept for the next time: {error}")
    return pixels


def _decode(paths: Sequence[str], form: _Format, pixels: UInt8[np.ndarray, "images channels height width"]) -> None:
    def decode(start: int) -> int:
        chunk = paths[start : start + _AT_ONCE]
        for offset, path in enumerate(chunk):
            pixels[start + offset] = form.decode(path)
        return len(chunk)

    threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(paths), desc="decoding", unit="picture") as bar:
        for done in pool.map(decode, range(0, len(paths), _AT_ONCE)):
            bar.update(done)

"""Batches of images that are in memory, in an order that a resumed run keeps."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["BatchLoader", "EpochSampler", "ResumableLoader"]


class EpochSampler(Sampler[int]):
    """Indices in a random order, a pure function of the seed and the epoch.

    Args:
        length: number of samples.
        seed: of the order; ``None`` keeps the samples in their own.
        rank: of this process; it takes every ``world_size``-th index.
        world_size: how many processes share the order. Each gets the same number of indices: as in torch's
            ``DistributedSampler``, the first ones are repeated where they do not divide evenly.
    """

    def __init__(self, length: int, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices, in the first pass from ``first`` on."""
        first, self.first = self.first, 0
        if self.seed is None:
            order = torch.arange(self.length)
        else:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        total = len(self) * self.world_size
        order = order.repeat(-(-total // max(self.length, 1)))[:total]
        yield from order[self.rank :: self.world_size][first:].tolist()


class BatchLoader(DataLoader[Any]):
    """A DataLoader of whole batches.

    Args:
        dataset: the samples.
        sampler: their order in this process.
        batch_size: samples in a batch of this process.
        options: of the DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], sampler: EpochSampler, batch_size: int, **options: Any) -> None:
        # A generator of its own: the loader draws a number for each pass, which would shift the global stream.
        generator = torch.Generator().manual_seed(0)
        super().__init__(dataset, batch_size, sampler=sampler, generator=generator, **options)


class ResumableLoader(BatchLoader):
    """A loader that says how many batches of the epoch it has handed out, and goes on behind them.

    Args:
        dataset: the samples.
        sampler: their order.
        batch_size: samples in a batch of this process.
        augmentation: changes the images of a batch, given a seed that depends on the order's seed, the epoch, the
            batch's number and the process alone: a resumed run sees the same images.
        options: of the loader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        batch_size: int,
        augmentation: Callable[[Tensor, int], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, sampler, batch_size, **options)
        self._order = sampler
        self._augmentation = augmentation
        self._batches = self._resumed_behind = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches of this epoch that were handed out."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next pass behind so many batches."""
        self._resumed_behind = state_dict["batches"]

    def end_epoch(self) -> None:
        """Let what is saved from now on begin with a whole epoch: Lightning can end one before the batches end."""
        self._batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator does
        """Yield batches."""
        self._batches, self._resumed_behind = self._resumed_behind, 0
        assert self.batch_size is not None
        self._order.first = self._batches * self.batch_size
        for batch in super().__iter__():
            if self._augmentation is not None:
                order = self._order
                where = [order.seed or 0, order.epoch, self._batches, order.rank]
                images, labels = batch
                batch = self._augmentation(images, int(np.random.SeedSequence(where).generate_state(1)[0])), labels
            self._batches += 1
            yield batch

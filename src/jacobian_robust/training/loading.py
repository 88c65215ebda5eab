"""Batches of images that are in memory, in an order that a resumed run keeps."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from jacobian_robust.training.shares import BatchShares

__all__ = ["BatchLoader", "EpochSampler", "ResumableLoader"]


class EpochSampler(Sampler[int]):
    """Indices in a random order, a pure function of the seed and the epoch.

    Args:
        length: number of samples.
        seed: of the order.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        """Yield the indices, in the first pass from ``first`` on."""
        first, self.first = self.first, 0
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        yield from order[first:].tolist()


class BatchLoader(DataLoader[Any]):
    """A DataLoader of batches, or of one process's part of each.

    Args:
        dataset: the samples.
        sampler: their order.
        batch_size: samples a batch, the parts of all processes together.
        process: the number of the process.
        of: how many there are.
        options: of the DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[int],
        batch_size: int,
        *,
        process: int = 0,
        of: int = 1,
        **options: Any,
    ) -> None:
        if of > 1:
            options["batch_sampler"] = BatchShares(sampler, batch_size, process, of)
        else:
            options |= {"sampler": sampler, "batch_size": batch_size}
        # A generator of its own: the loader draws a number for each pass, which would shift the global stream.
        super().__init__(dataset, generator=torch.Generator().manual_seed(0), **options)


class ResumableLoader(BatchLoader):
    """A loader that says how many batches of the epoch it has handed out, and goes on behind them.

    Args:
        dataset: the samples.
        sampler: their order.
        batch_size: samples a batch, the parts of all processes together.
        options: of the loader.
    """

    def __init__(self, dataset: Dataset[Any], sampler: EpochSampler, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, sampler, batch_size, **options)
        self._order = sampler
        self._whole = batch_size
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
        self._order.first = self._batches * self._whole
        for batch in super().__iter__():
            self._batches += 1
            yield batch

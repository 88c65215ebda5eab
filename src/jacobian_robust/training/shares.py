"""One batch on several processes: the part of each, its random numbers, and what the processes agree on.

Everything is that of a single process where there is one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

__all__ = [
    "BatchShares",
    "DrawnBefore",
    "Share",
    "SharedBatch",
    "SharedGenerator",
    "any_process",
    "drawn",
    "gathered",
    "parted",
    "this_process",
]

T = TypeVar("T")
Batch = tuple[Float[Tensor, "batch *shape"], Int[Tensor, "batch"]]


class Share(NamedTuple):
    """One process's part of a batch: every ``of``-th sample, so that each has its share of the first ones too.

    A process for which there is no sample takes the first one, which counts for nothing: it must not be missing where
    the others wait for its gradient.

    Attributes:
        first: the number of the process.
        of: how many processes there are.
        samples: in the whole batch.
    """

    first: int
    of: int
    samples: int

    @property
    def counted(self) -> int:
        """How many samples of the part count."""
        return len(range(self.first, self.samples, self.of))

    @property
    def indices(self) -> Sequence[int]:
        """Which samples of the whole batch the part is made of; one at least."""
        return range(self.first, self.samples, self.of) or range(1)


class SharedBatch(NamedTuple):
    """A part of a batch."""

    inputs: Tensor
    labels: Tensor
    share: Share


def parted(batch: Batch | SharedBatch) -> tuple[Batch, Share | None]:
    """Return inputs and labels, and which part of a batch they are; ``None`` for the whole."""
    return ((batch.inputs, batch.labels), batch.share) if isinstance(batch, SharedBatch) else (batch, None)


class Indices(list[int]):
    """The indices of a part's samples in the data set."""

    def __init__(self, indices: Sequence[int], share: Share) -> None:
        super().__init__(indices)
        self.share = share


class BatchShares(BatchSampler):
    """Yields one process's part of each batch that a sampler gives.

    Args:
        sampler: the order of the samples, the same in all processes.
        batch_size: samples in a whole batch; the last one may be smaller.
        first: the number of the process.
        of: how many there are.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, first: int, of: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self._first, self._of = first, of

    def __iter__(self) -> Any:
        """Yield indices."""
        for whole in super().__iter__():
            share = Share(self._first, self._of, len(whole))
            yield Indices([whole[i] for i in share.indices], share)


class SharedGenerator(torch.Generator):
    """A random stream that is the same in all processes; :func:`drawn` takes a part of what is drawn for a batch.

    Attributes:
        share: the part; ``None`` for the whole.
        before: has drawn already, and says what.
    """

    share: Share | None = None
    before: "DrawnBefore | None" = None


class DrawnBefore:
    """What a computation draws, kept in the same tensors of a device, so that it can be drawn outside of it.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._draws: list[tuple[Callable[[], Tensor], Tensor]] = []
        self._given = 0

    @contextlib.contextmanager
    def of(self, generator: SharedGenerator) -> Iterator[None]:
        """Within the context, give a computation what was drawn before; in the first one, draw."""
        self._given, generator.before = 0, self
        try:
            yield
        finally:
            generator.before = None

    def next(self, draw: Callable[[], Tensor]) -> Tensor:
        """Return a copy of what is drawn at this place."""
        if self._given == len(self._draws):
            self._draws.append((draw, draw().to(self._device)))
        self._given += 1
        return self._draws[self._given - 1][1].clone()

    def again(self) -> None:
        """Draw all anew, in the same order."""
        for draw, drawn in self._draws:
            drawn.copy_(draw())


def drawn(
    draw: Callable[[int], Tensor], samples: int, generator: torch.Generator | None = None, *, dim: int = 0
) -> Tensor:
    """Return ``draw(samples)``; of a part of a batch, the part of what is drawn for the whole one.

    One process and several then draw the same numbers for each sample, and their streams stay the same.

    Args:
        draw: returns random numbers from the generator for so many samples.
        samples: how many there are here.
        generator: a :class:`SharedGenerator` knows the whole batch; with any other, what is here is all.
        dim: of the samples.
    """
    if isinstance(generator, SharedGenerator) and generator.before is not None:
        return generator.before.next(lambda: draw(samples))
    share = generator.share if isinstance(generator, SharedGenerator) else None
    if share is None:
        return draw(samples)
    whole = draw(share.samples)
    return whole.index_select(dim, torch.tensor(list(share.indices), device=whole.device))


def this_process() -> int:
    """Return the number of this process among those that train together; 0 for one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def any_process(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """Return which flags are raised in one process or more; all of them call this, and get the same answer."""
    if not dist.is_initialized():
        return flags
    raised = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return tuple(map(bool, raised.tolist()))


def gathered(value: T) -> list[T]:
    """Return the values of all processes in their order; all of them call this. Tensors come from the CPU's memory."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

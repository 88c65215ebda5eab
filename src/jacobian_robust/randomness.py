"""Random numbers of a step that are drawn outside of the CUDA graph that uses them."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["DrawnBefore", "SharedGenerator", "drawn"]


class SharedGenerator(torch.Generator):
    """A random stream whose draws :func:`drawn` can take from an earlier time.

    Attributes:
        before: has drawn already, and says what.
    """

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


def drawn(draw: Callable[[], Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Return ``draw()``, or what a CUDA graph's generator has drawn before.

    Args:
        draw: returns random numbers from the generator.
        generator: a :class:`SharedGenerator` may hold earlier draws.
    """
    if isinstance(generator, SharedGenerator) and generator.before is not None:
        return generator.before.next(draw)
    return draw()

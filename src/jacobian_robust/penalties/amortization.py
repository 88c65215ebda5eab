"""How seldom a penalty is computed."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from jacobian_robust.options import STRICT, Count

__all__ = ["Amortization"]


@dataclass(frozen=True, config=STRICT | {"strict": False}, kw_only=True)  # made of a mapping, too
class Amortization:
    """How seldom a penalty is computed, so that it costs less. The loss is the same in the mean.

    Args:
        every: the penalty joins the loss of every ``every``-th step, from the first on, with as many times its weight.
        fraction: share of a batch whose penalty is computed, in (0, 1], rounded to at least one image; its mean stands
            for the batch's.
    """

    every: Count = 1
    fraction: float = Field(default=1.0, gt=0, le=1, strict=True)

    def weight(self, step: int) -> int:
        """Return by what the penalty is multiplied in a step, counted from 0: a pure function, right after resuming."""
        return self.every if step % self.every == 0 else 0

    def samples(self, batch: int) -> int:
        """Return how many images of a batch are penalised."""
        return max(1, round(self.fraction * batch))

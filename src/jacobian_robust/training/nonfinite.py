"""Steps whose loss or gradient is not finite: they are skipped, and too many in a row end a training."""

from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from jacobian_robust.errors import DIVERGED, UserError
from jacobian_robust.training.distributed import any_process, gathered, this_process
from jacobian_robust.training.losses import Batch, LossTerms

__all__ = ["NonFiniteSteps"]

SKIPPED_IN_A_ROW = 3
"""So many steps without a finite loss and gradient end a training."""


class NonFiniteSteps:
    """Counts the skipped steps of a training, and ends it after too many in a row.

    Attributes:
        skipped: how many steps were skipped.
        spoilt: whether a batch since the last step had a loss that is not finite, here or in another process.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.spoilt = False
        self._in_a_row = 0
        self._batch: Batch | None = None

    def spoils(self, batch: Batch, terms: LossTerms) -> bool:
        """Return whether the loss of a batch is not finite in one process or more; all of them call this."""
        if not self.spoilt:
            self._batch = batch
        found = any(any_process(not terms.loss.isfinite(), device=terms.loss.device))
        self.spoilt |= found
        return found

    @staticmethod
    def of_the_scale(scaler: torch.amp.GradScaler | None) -> bool:
        """Return whether a gradient that is not finite can be the loss scale's of mixed precision.

        It begins far too large, and is halved at each such step: that is no divergence until there is none left.
        """
        return scaler is not None and scaler.get_scale() > 1

    def taken(self) -> None:
        """Take note of a step that is not skipped."""
        self._in_a_row = 0

    def skip(self, what: str, *, step: int, model: nn.Module, directory: Path) -> None:
        """Count a step that is skipped.

        Args:
            what: is not finite, the ``loss`` or the ``gradient``.
            step: its number, from 1.
            model: the classifier.
            directory: where the last batch and the weights are kept for inspection if the training ends.

        Raises:
            UserError: if it is the last of too many in a row.
        """
        self.spoilt = False
        if this_process() == 0:
            Console().print(f"step {step} is skipped: its {what} is not finite", soft_wrap=True)
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row < SKIPPED_IN_A_ROW:
            return
        assert self._batch is not None
        inputs, labels = map(torch.cat, zip(*gathered([part.cpu() for part in self._batch]), strict=True))
        place = directory / "nonfinite_batch.pt"
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        if this_process() == 0:
            torch.save({"inputs": inputs, "labels": labels, "model": weights}, place)
        raise UserError(
            f"{DIVERGED}: the {what} of {SKIPPED_IN_A_ROW} steps in a row was not finite; the last batch and "
            f"the weights are in {place}; try a smaller optimizer.lr, eta.max or regularizer.cap"
        )

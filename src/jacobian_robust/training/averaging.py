"""Averages of the weights over the steps of a training."""

import itertools
from typing import Any

import pytorch_lightning as pl
from pydantic import Field, validate_call
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn

from jacobian_robust.options import STRICT

__all__ = ["MovingAverage"]


class MovingAverage(WeightAveraging):
    """Lightning's average of the weights, as an exponential one, updated after every step, from the first on.

    It stands for the model in validation, in the weights of a checkpoint, and so in what is exported and evaluated; the
    weights that the training goes on with travel beside it.

    Args:
        decay: what the average keeps of itself at each step, in (0, 1).
    """

    @validate_call(config=STRICT)
    def __init__(self, decay: float = Field(0.999, gt=0, lt=1)) -> None:
        def moved(average: Tensor, weight: Tensor, count: Tensor | int) -> Tensor:
            # Unlike decay·average + (1 − decay)·weight this leaves what does not change as it is, to the last digit.
            return average.lerp(weight, 1 - decay) if average.is_floating_point() else weight

        super().__init__(avg_fn=moved)

    @property
    def model(self) -> nn.Module:
        """The classifier with the average's weights, in evaluation mode; there is one as soon as training begins."""
        assert self._average_model is not None
        average = self._average_model.module.model
        assert isinstance(average, nn.Module)
        return average.eval()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the average and the weights, in the weights' precision."""
        self._follow(pl_module)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the weights to their device: Lightning makes the average before it moves and converts them."""
        self._follow(pl_module)

    def _follow(self, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        module = self._average_model.module
        averages = itertools.chain(module.parameters(), module.buffers())
        weights = itertools.chain(pl_module.parameters(), pl_module.buffers())
        for average, weight in zip(averages, weights, strict=True):
            average.data = average.data.to(weight)

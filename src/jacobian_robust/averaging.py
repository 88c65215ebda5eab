"""Averages of the weights over the steps of a training."""

from pydantic import Field, validate_call
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn

from jacobian_robust.options import STRICT

__all__ = ["MovingAverage"]


class MovingAverage(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, updated after every step, from the first on.

    It stands for the model in validation, in the weights of a checkpoint, and so in what is exported and evaluated; the
    weights that the training goes on with travel beside it.

    Args:
        decay: what the average keeps of itself at each step, in (0, 1).
    """

    @validate_call(config=STRICT)
    def __init__(self, decay: float = Field(0.999, gt=0, lt=1)) -> None:
        super().__init__(decay=decay)

    @property
    def model(self) -> nn.Module:
        """The classifier with the average's weights, in evaluation mode; there is one as soon as training begins."""
        assert self._average_model is not None
        average = self._average_model.module.model
        assert isinstance(average, nn.Module)
        return average.eval()

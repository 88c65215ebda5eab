"""The usual metrics of other tasks than classification, by torchmetrics; what is right is counted elsewhere."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from jacobian_robust.geometry.families import BernoulliProduct, Categorical, Family, PixelCategorical, flat

__all__ = ["TASK_METRICS", "TaskMetrics"]

TASK_METRICS = ("mean_average_precision", "mae", "rmse", "mean_iou", "pixel_accuracy")
"""Of several labels, their mean average precision; of numbers, mean absolute and root mean square error, in units of
the targets; of pixels, the mean over the classes of intersection over union, and the share that is right."""


class TaskMetrics:
    """Metrics over the batches of a data set. Several processes that each see a part get those of the whole.

    Args:
        family: of the distribution that the outputs describe; of the categorical one there are none.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._metrics: dict[str, Any] = {}
        self._defined = True

    def update(self, outputs: Float[Tensor, "batch *outputs"], targets: Shaped[Tensor, "batch *_"]) -> None:
        """Add a batch."""
        if isinstance(self._family, Categorical):
            return
        if not self._metrics:
            self._metrics = {name: of.to(outputs.device) for name, of in _metrics(self._family, outputs).items()}
        if not outputs.isfinite().all():
            self._defined = False  # torchmetrics would refuse them, or take them for numbers
            return
        said = self._family.predict(outputs)
        for name, metric in self._metrics.items():
            if name == "mean_average_precision":
                metric.update(flat(outputs.sigmoid()), flat(targets).long())
            else:
                metric.update(said, targets.reshape(said.shape).to(said.dtype))

    def value(self) -> dict[str, float]:
        """Return the metrics by name; nan where an output was not finite."""
        return {name: float(of.compute()) if self._defined else torch.nan for name, of in self._metrics.items()}


def _metrics(family: Family, outputs: Tensor) -> dict[str, Any]:
    import torchmetrics  # not at the top: it takes seconds
    from torchmetrics.classification import (
        BinaryAveragePrecision,
        MulticlassAccuracy,
        MulticlassJaccardIndex,
        MultilabelAveragePrecision,
    )

    if isinstance(family, BernoulliProduct):
        labels = outputs[0].numel()
        several = MultilabelAveragePrecision(labels) if labels > 1 else BinaryAveragePrecision()
        return {"mean_average_precision": several}
    if isinstance(family, PixelCategorical):
        classes = outputs.shape[1]
        right = MulticlassAccuracy(classes, average="micro")
        return {"mean_iou": MulticlassJaccardIndex(classes), "pixel_accuracy": right}
    return {"mae": torchmetrics.MeanAbsoluteError(), "rmse": torchmetrics.MeanSquaredError(squared=False)}

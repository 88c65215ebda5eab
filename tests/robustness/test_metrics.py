"""The metrics of tasks against their formulas, over batches."""

import pytest
import torch

from jacobian_robust.geometry.families import BernoulliProduct, Categorical, Gaussian, PixelCategorical
from jacobian_robust.robustness.metrics import TASK_METRICS, TaskMetrics


def measured(family, outputs, targets):
    metrics = TaskMetrics(family)
    for part in zip(outputs.split(7), targets.split(7), strict=True):
        metrics.update(*part)
    return metrics.value()


def test_errors_of_numbers():
    outputs, targets = torch.randn(20, 1), torch.randn(20)
    found = measured(Gaussian(tolerance=1.0), outputs, targets)
    error = outputs[:, 0] - targets
    expected = {"mae": error.abs().mean().item(), "rmse": error.square().mean().sqrt().item()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_precision_of_labels():
    """Of the label 0 the positives are ranked 1, 3 and 4; of the label 1 they come first."""
    ranked = torch.tensor([4.0, 3, 2, 1, 0])
    positive = torch.tensor([[1.0, 1], [0, 1], [1, 0], [1, 0], [0, 0]])
    found = measured(BernoulliProduct(), torch.stack([ranked, ranked], 1) - 2, positive)
    assert found == pytest.approx({"mean_average_precision": ((1 + 2 / 3 + 3 / 4) / 3 + 1) / 2})


def test_overlap_of_masks():
    targets = torch.randint(0, 3, (20, 4, 4), generator=torch.Generator().manual_seed(0))
    said = torch.randint(0, 3, (20, 4, 4), generator=torch.Generator().manual_seed(1))
    found = measured(PixelCategorical(), torch.nn.functional.one_hot(said, 3).movedim(-1, 1).float(), targets)
    overlaps = [((said == c) & (targets == c)).sum() / ((said == c) | (targets == c)).sum() for c in range(3)]
    expected = {"mean_iou": sum(overlaps) / 3, "pixel_accuracy": (said == targets).float().mean()}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()})
    assert set(found) <= set(TASK_METRICS)


def test_of_classes_there_are_none_and_of_nan_no_number():
    assert measured(Categorical(), torch.randn(3, 4), torch.zeros(3)) == {}
    found = measured(Gaussian(tolerance=1.0), torch.tensor([[1.0], [torch.nan]]), torch.zeros(2))
    assert found
    assert all(value != value for value in found.values())

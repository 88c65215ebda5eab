"""The plain function on models of other families."""

import pytest
import torch
from torch import nn

from jacobian_robust import evaluate_robustness
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import Gaussian, PixelCategorical


def test_a_linear_regression_is_robust_up_to_its_exact_radius(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    images = torch.full((3, 1, 4, 4), 0.5)
    offsets = torch.tensor([[0.1], [0.2], [0.5]])
    targets = model(images).detach() + offsets
    reach = float(model[1].weight.abs().sum().detach())
    family = Gaussian(sigma=0.5, tolerance=0.4)
    eps = [0.19 / reach, 0.21 / reach, 0.31 / reach]
    evaluation = evaluate_robustness(model, images, targets, eps, task=family)
    assert evaluation.results.models[0].clean_correct == 2
    assert list(evaluation.robust_accuracy.values()) == pytest.approx([2 / 3, 1 / 3, 0])
    assert evaluation.results.attacks["pgd_linf"]["family"] == {"name": "Gaussian", "tolerance": 0.4, "sigma": 0.5}
    assert "33.3%" in str(evaluation)
    evaluation.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "report.html").is_file()


@pytest.mark.parametrize(
    ("outputs", "targets", "family", "options", "message"),
    [
        (
            2,
            (4, 3),
            Gaussian(tolerance=1.0),
            {},
            r"labels: the targets must be finite numbers, of shape \(4, 2\), not torch.float32",
        ),
        (2, (3, 2), Gaussian(tolerance=1.0), {}, "labels: give the targets of 4 images"),
        (2, (4, 2), PixelCategorical(), {}, "model: must return logits .batch, classes ≥ 2, height, width."),
        (
            2,
            (4, 2),
            Gaussian(tolerance=1.0),
            {"certificates": ["crown"]},
            "crown: this certificate is for classification",
        ),
        (2, (4, 2), Gaussian(tolerance=1.0), {"attacks": ["autoattack"]}, "autoattack: this attack is for classif"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(outputs, targets, family, options, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, outputs))
    with pytest.raises(UserError, match=message):
        evaluate_robustness(model, torch.rand(4, 1, 4, 4), torch.zeros(targets), [0.1], task=family, **options)

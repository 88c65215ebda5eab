import pytest
import torch
from torch import nn

from jacobian_robust.robustness.reliability import (
    calibration,
    log_probabilities,
    noise_accuracy,
    out_of_distribution,
    transformed,
)


def test_calibration_of_known_probabilities():
    """Half of the images at confidence 0.8, all right; half at 0.6, half of them right."""
    p = torch.tensor([[0.8, 0.2]] * 4 + [[0.6, 0.4]] * 4, dtype=torch.double)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    found = calibration(p.log(), labels)
    assert found.ece == pytest.approx((0.2 + 0.1) / 2)
    assert found.nll == pytest.approx(-float(torch.tensor([0.8] * 4 + [0.6] * 2 + [0.4] * 2).log().mean()), rel=1e-6)
    assert found.brier == pytest.approx((4 * 2 * 0.2**2 + 2 * 2 * 0.4**2 + 2 * 2 * 0.6**2) / 8)
    assert [(round(confidence, 6), accuracy, n) for confidence, accuracy, n in found.bins] == [
        (0.6, 0.5, 4),
        (0.8, 1.0, 4),
    ]


def test_a_perfectly_calibrated_model_has_no_error():
    torch.manual_seed(0)
    p = torch.rand(200_000, dtype=torch.double)
    labels = (torch.rand(200_000) > p).long()
    assert calibration(torch.stack([p, 1 - p], 1).log(), labels).ece < 0.005


def test_an_image_without_a_prediction_leaves_the_calibration_undefined_and_the_bins_to_the_others():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6], [torch.nan, torch.nan]], dtype=torch.double)
    found = calibration(p.log(), torch.tensor([0, 1, 0]))
    assert (found.ece, found.nll, found.brier) == (None, None, None)
    assert [(round(confidence, 6), accuracy, n) for confidence, accuracy, n in found.bins] == [(0.6, 1, 1), (0.8, 1, 1)]


class Mean(nn.Module):
    def forward(self, images):
        margin = 20 * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-margin, margin], 1)


def test_accuracy_falls_with_the_noise_and_is_clean_without():
    images = torch.full((5000, 1, 4, 4), 0.55)
    labels = torch.ones(5000, dtype=torch.long)
    points = noise_accuracy(Mean(), images, labels, sigmas=(0.0, 0.1, 0.3, 1.0))
    assert points[0].accuracy == 1.0
    assert points[0].accuracy > points[1].accuracy > points[2].accuracy > points[3].accuracy > 0.5
    assert points[1].accuracy == pytest.approx(0.977, abs=0.0085)  # P(z < 2), within four standard errors


def test_images_of_another_kind_are_told_apart_as_well_as_the_scores_are():
    known, unknown = torch.full((50, 1, 4, 4), 0.9), torch.full((30, 1, 4, 4), 0.5)
    log_p = log_probabilities(Mean(), known)
    apart, alike = out_of_distribution(Mean(), log_p, {"grey": unknown, "the same": known[:20]})
    assert (apart.max_probability, apart.entropy, apart.distance_to_center) == (1, 1, 1)
    assert (alike.max_probability, alike.entropy, alike.distance_to_center) == (0.5, 0.5, 0.5)
    assert (apart.images, alike.images) == (30, 20)


def test_a_probability_of_zero_adds_no_entropy():
    class Certain(nn.Module):
        def forward(self, images):
            return torch.where(torch.arange(2) == 0, 0.0, -torch.inf).expand(len(images), 2)

    certain, undecided = torch.full((50, 1, 4, 4), 0.9), torch.full((30, 1, 4, 4), 0.5)
    (row,) = out_of_distribution(Mean(), log_probabilities(Certain(), certain), {"grey": undecided})
    assert row.entropy == 1
    (row,) = out_of_distribution(Certain(), log_probabilities(Certain(), certain), {"the same": undecided})
    assert row.entropy == 0.5


def test_transformed_images_are_other_images_within_the_pixel_range():
    images = torch.rand(5, 1, 6, 6)
    made = transformed(images)
    assert set(made) == {"rotated by 90°", "inverted", "uniform noise"}
    for other in made.values():
        assert other.shape == images.shape
        assert 0 <= other.min() <= other.max() <= 1
        assert not torch.equal(other, images)
    torch.testing.assert_close(made["inverted"] + images, torch.ones_like(images))

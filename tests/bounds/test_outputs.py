"""Boxes of outputs of any family: what is said of the whole ball holds at random points and corners of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from jacobian_robust.bounds import interval_bounds, output_box, right_in_box
from jacobian_robust.geometry.families import BernoulliProduct, Gaussian, GaussianMeanScale, PixelCategorical, Poisson
from jacobian_robust.models import ConvPixels
from jacobian_robust.penalties import CertifiedMargin

EPS = 0.02
FAMILIES = {
    "numbers": (Gaussian(tolerance=0.2), 2),
    "numbers with scales": (GaussianMeanScale(tolerance=0.2), 2),
    "labels": (BernoulliProduct(), 3),
    "counts": (Poisson(tolerance=0.4), 1),
    "pixels": (PixelCategorical(share=0.9), 3),
}


def network(outputs, family):
    torch.manual_seed(0)
    if isinstance(family, PixelCategorical):
        return ConvPixels(classes=outputs, width=6)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, outputs))


def points(images):
    generator = torch.Generator().manual_seed(1)
    for number in range(30):
        step = 2 * torch.rand(images.shape, generator=generator) - 1
        yield (images + EPS * (step if number % 2 else step.sign())).clamp(0, 1)


@pytest.mark.parametrize(("family", "outputs"), FAMILIES.values(), ids=FAMILIES)
def test_loss_and_rightness_of_the_box_hold_in_the_ball(family, outputs):
    model, images = network(outputs, family), torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        targets = family.predict(model(images))
        if isinstance(family, Poisson):
            targets = targets.round()
        box = output_box(model, images, targets, EPS, family)
        certain, worst = right_in_box(family, *box, targets), family.worst_loss(*box, targets)
        assert certain.any()
        for moved in points(images):
            found = model(moved)
            assert family.right(found, targets)[certain].all()
            assert (family.unreduced_loss(found, targets).flatten(1).mean(-1) <= worst + 1e-5).all()
        far = output_box(model, images, targets, 0.5, family)
        assert not right_in_box(family, *far, targets).all()


def test_the_last_convolution_is_merged_with_the_difference():
    family, model = PixelCategorical(), network(3, PixelCategorical())
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        targets = model(images).argmax(1)
        merged, _ = output_box(model, images, targets, EPS, family)
        lower, upper = interval_bounds(model, (images - EPS).clamp_min(0), (images + EPS).clamp_max(1))
    own = targets[:, None]
    assert merged.gather(1, own).abs().max() < 1e-5
    apart = upper - lower.gather(1, own)
    other = nn.functional.one_hot(targets, 3).movedim(-1, 1) == 0
    assert (merged <= apart + 1e-5)[other].all()
    assert (merged < apart - 1e-3)[other].any()


@pytest.mark.parametrize(("family", "outputs"), FAMILIES.values(), ids=FAMILIES)
def test_certified_training_certifies_more(family, outputs):
    model, images = network(outputs, family), torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bright = images.mean((1, 2, 3), keepdim=True)
    targets = {
        "Gaussian": torch.cat([bright, -bright], 1).flatten(1),
        "GaussianMeanScale": bright.flatten(1),
        "BernoulliProduct": (images[:, 0, 0, :3] > 0.5).float(),
        "Poisson": (4 * images[:, 0, 0, :1]).round(),
        "PixelCategorical": (images[:, 0] > 0.5).long(),
    }[type(family).__name__]
    penalty = CertifiedMargin(eps=EPS).with_family(family)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = penalty(model(images), images, targets, model=model).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    certified = replace(penalty, target=1e-3).certified(model, images, targets)
    with torch.no_grad():
        assert (certified <= family.right(model(images), targets)).all()

"""The faults that the checks look for, planted again where the outputs are numbers, labels and classes of pixels."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import PGD
from jacobian_robust.geometry.families import BernoulliProduct, Gaussian, PixelCategorical, Poisson
from jacobian_robust.robustness import sanity
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.certificates import IntervalBounds, certify
from jacobian_robust.robustness.sanity import sanity_checks

NUMBER = Gaussian(tolerance=1.0, sigma=0.5)
ATTACK = PGD(name="pgd", norm="linf", eps=[0.005, 0.01, 0.015], steps=20, step_size=0.005)


class Number(nn.Module):
    """A linear function of the image, with random weights: an ε of 0.02 moves it by one."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False))
        with torch.no_grad():
            self.layers[1].weight.copy_(scale * torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return self.layers(images - 0.5)


class Rates(Number):
    """The logarithm of a rate between one and three."""

    def forward(self, images):
        return 0.5 + 0.1 * super().forward(images)


class Planted(nn.Module):
    """A model with a fault."""

    def __init__(self, model, fault) -> None:
        super().__init__()
        self.model, self.fault = model, fault

    def forward(self, images):
        return self.fault(self.model, images)


def rounding(model, images):
    return model((images * 16).round() / 16)


def noise(model, images):
    outputs = model(images)
    return outputs + torch.randn_like(outputs)


def batch_statistics(model, images):
    return model(images - images.mean(0) + 0.5)


def undefined(model, images):
    light = images.flatten(1).mean(1) > 0.5
    outputs = model(images)
    return outputs.masked_fill(light.view(-1, *[1] * (outputs.dim() - 1)), torch.nan)


class Memory(nn.Module):
    """Says of an image what is right for the nearest one that it knows."""

    def __init__(self, images, targets) -> None:
        super().__init__()
        self.images, self.targets = images.flatten(1), targets

    def forward(self, images):
        nearest = torch.cdist(images.detach().flatten(1), self.images).argmin(1)
        return self.targets[nearest] + 0 * images.flatten(1).sum(1, keepdim=True)


class Labels(nn.Module):
    """Three labels an image."""

    def __init__(self, turned, scale: float = 1.0) -> None:
        super().__init__()
        self.turned, self.layers = turned, nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
        with torch.no_grad():
            self.layers[1].weight.copy_(scale * torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return self.turned(self.layers(images - 0.5))


class Pixels(nn.Module):
    """Three classes a pixel, by its brightness."""

    def __init__(self, turned, scale: float = 1.0) -> None:
        super().__init__()
        self.turned, self.layer = turned, nn.Conv2d(1, 3, 1)
        with torch.no_grad():
            self.layer.weight.copy_(scale * torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1))
            self.layer.bias.copy_(scale * torch.tensor([0.3, 0.0, -0.7]))

    def forward(self, images):
        return self.turned(self.layer(images))


@pytest.fixture
def images():
    return (torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 255).round() / 255


def checked(model, images, targets=None, attack=ATTACK, family=NUMBER, **options):
    if targets is None:
        off = torch.rand(60, 1, generator=torch.Generator().manual_seed(2)) - 0.5
        targets = Number()(images).detach() + off
    attack = attack.with_family(family)
    result = sweep(model, images, targets, [attack])
    checks = sanity_checks(model, images, targets, [attack], [result], **options)
    return {check.name: check for check in checks}


def test_an_honest_regression_passes_everything(images):
    training = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    checks = checked(Number().eval(), images, training_images=training, others=[Number(2.0).eval()])
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(checks, "pass")
    assert list(checks) == [*sanity.MODEL_CHECKS, *sanity.BALL_CHECKS]


TASKS = {
    "regression": (Number(), NUMBER),
    "counts": (Rates(), Poisson(tolerance=0.5)),
    "labels": (Labels(lambda s: s), BernoulliProduct()),
    "pixels": (Pixels(lambda s: s), PixelCategorical()),
}


@pytest.mark.parametrize(
    "task", ["regression", *(pytest.param(task, marks=pytest.mark.slow) for task in ("counts", "labels", "pixels"))]
)
@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (rounding, {"gradients"}),
        (noise, {"deterministic"}),
        (batch_statistics, {"deterministic"}),
        (undefined, {"logits"}),
        (None, {"evaluation mode", "deterministic"}),
    ],
    ids=["rounding", "noise", "batch statistics", "nan", "dropout"],
)
def test_a_planted_fault_is_caught_in_each_task(task, fault, caught_by, images, monkeypatch):
    monkeypatch.setattr(sanity.balls, "QUERIES", 50)
    base, family = TASKS[task]
    targets = family.predict(base.eval()(images).detach())
    model = nn.Sequential(nn.Dropout(0.1), base).train() if fault is None else Planted(base, fault).eval()
    found = checked(model, images, targets, replace(ATTACK, eps=(0.02, 0.1), step_size=0.01), family)
    assert caught_by <= {name for name, check in found.items() if check.status == "fail"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["counts", "labels", "pixels"])
def test_training_images_and_false_certificates_are_caught_in_each_task(task, images, monkeypatch):
    monkeypatch.setattr(sanity.balls, "QUERIES", 50)
    model, family = TASKS[task]
    targets = family.predict(model.eval()(images).detach())
    eps = (0.02, 0.3)
    honest = certify(model, images, targets, IntervalBounds(name="interval", family=family), eps)
    assert not honest.bounded.certified[:, 1].all()
    lie = honest._replace(bounded=honest.bounded._replace(certified=torch.ones(60, 2, dtype=torch.bool)))
    found = checked(
        model,
        images,
        targets,
        replace(ATTACK, eps=eps, step_size=0.05),
        family,
        training_images=(images[:7] * 255).to(torch.uint8),
        certified=[lie],
    )
    assert found["unseen images"].status == "fail"
    assert found["certificate interval"].status == "fail"


def test_a_regression_that_no_attack_moves_is_caught(images):
    targets = Number()(images).detach()
    found = checked(Memory(images, targets).eval(), images, targets)["chance at a large budget"]
    assert found.status == "fail"
    assert "no model can do better than" in found.why


def test_training_images_early_stops_and_other_models_examples_are_caught(images, monkeypatch):
    monkeypatch.setattr(sanity.balls, "QUERIES", 1)  # so that there is something left for the other model
    seen = (images[:7] * 255).to(torch.uint8)
    assert checked(Number().eval(), images, training_images=seen)["unseen images"].status == "fail"
    early = replace(ATTACK, eps=(0.02,), steps=1, step_size=0.01, random_start=False)
    assert checked(Number().eval(), images, attack=early)["convergence"].status == "fail"
    other = replace(ATTACK, eps=(0.03,))
    assert (
        checked(Planted(Number(), rounding).eval(), images, attack=other, others=[Number().eval()])["transfer"].status
        == "fail"
    )


def test_a_regression_on_which_larger_budgets_find_less_is_caught():
    class Shell(nn.Module):
        """Errs in a thin shell around the grey image alone; outside of it the gradient leads further out."""

        def forward(self, images):
            distance = (images - 0.5).flatten(1).abs().mean(1, keepdim=True)
            inside = (distance > 0.02) & (distance < 0.06)
            return torch.where(inside, 3 + distance, 0.5 + 0.1 * distance)

    grey, targets = torch.full((20, 1, 8, 8), 0.5), torch.zeros(20, 1)
    attack = PGD(name="pgd", norm="linf", eps=(0.08, 0.3), steps=20, step_size=0.02)
    found = checked(Shell().eval(), grey, targets, attack)["monotone"]
    assert found.status == "fail"
    assert "20 more images stay correct than at 0.08" in found.why


def test_a_certificate_of_a_regression_that_lies_is_caught(images):
    family = replace(NUMBER, tolerance=2.0)
    targets, model = Number()(images).detach() + 0.1, Number().eval()
    asked = IntervalBounds(name="interval", family=family)
    eps = (0.02, 0.1)
    check = functools.partial(
        checked, model, images, targets, replace(ATTACK, eps=eps, step_size=0.01), family, sample=20
    )
    honest = certify(model, images, targets, asked, eps)
    assert honest.bounded.certified[:, 0].sum() > 10
    assert check(certified=[honest])["certificate interval"].status == "pass"
    lying = honest._replace(bounded=honest.bounded._replace(certified=torch.ones(60, 2, dtype=torch.bool)))
    found = check(certified=[lying])["certificate interval"]
    assert found.status == "fail"
    assert "60 of the 60 certified images are broken" in found.why


@pytest.mark.parametrize(
    ("model", "family", "caught_by"),
    [
        (Labels(lambda s: s), BernoulliProduct(), None),
        (Labels(torch.sigmoid), BernoulliProduct(), "logits"),
        (Labels(lambda s: s, 1e4), BernoulliProduct(), "saturation"),
        (Pixels(lambda s: s), PixelCategorical(), None),
        (Pixels(lambda s: s.softmax(1)), PixelCategorical(), "logits"),
        (Pixels(lambda s: s, 1e5), PixelCategorical(), "gradients"),
    ],
    ids=["labels", "sigmoid", "huge logits", "pixels", "softmax", "huge logits of pixels"],
)
def test_faults_of_labels_and_of_pixels_are_caught(model, family, caught_by, images):
    targets = family.predict(model.eval()(images))
    attack = replace(ATTACK, eps=(0.02, 0.1), step_size=0.01)
    failed = {name for name, check in checked(model, images, targets, attack, family).items() if check.status == "fail"}
    assert caught_by in failed if caught_by else not failed

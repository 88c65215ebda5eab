"""Certificates hold, and one that does not is caught: by its check, or refused before an attack."""

from dataclasses import dataclass as plain_dataclass
from dataclasses import replace

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import FAB, PGD
from jacobian_robust.bounds import lipschitz_margin
from jacobian_robust.errors import UserError
from jacobian_robust.models import ConvSmall, LeNet, ResNet18
from jacobian_robust.robustness import certificates
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.certificates import (
    CROWN,
    Bounded,
    Certificate,
    IntervalBounds,
    Lipschitz,
    Smoothing,
    certify,
    require_certifiable,
)
from jacobian_robust.robustness.evaluate import evaluate_robustness
from jacobian_robust.robustness.sanity import sanity_checks

INTERVAL, LIPSCHITZ = IntervalBounds(name="interval"), Lipschitz(name="lipschitz")


NORMAL = torch.randn(64, generator=torch.Generator().manual_seed(0))


class Linear(nn.Sequential):
    """Two classes and a plane through the grey image between them: every distance is known.

    With a factor there is a layer before it that multiplies the normal's direction by it, and leaves those across.
    """

    def __init__(self, factor=None):
        last = nn.Linear(64, 2)
        unit = NORMAL / NORMAL.norm()
        with torch.no_grad():
            last.weight.copy_(torch.stack([-NORMAL, NORMAL]))
            last.bias.copy_(torch.stack([NORMAL, -NORMAL]).sum(1) / 2 * (factor or 1))
        before = nn.Linear(64, 64, bias=False)
        before.weight.data = torch.eye(64) + ((factor or 1) - 1) * torch.outer(unit, unit)
        super().__init__(nn.Flatten(), *([before] if factor else []), last)
        self.normal = NORMAL * (factor or 1)

    def distances(self, images, norm):
        margin = self(images)[:, 1].abs()
        return margin / (self.normal.norm() if norm == "l2" else self.normal.abs().sum())


@pytest.fixture
def images():
    return 0.3 + 0.4 * torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def case(images, norm, eps=(0.01, 0.03), factor=None):
    """A linear model, its own labels, and PGD's result."""
    model = Linear(factor).eval()
    labels = model(images).argmax(-1)
    attacks = [PGD(name="pgd", norm=norm, eps=eps, steps=20, step_size=0.25 * max(eps))]
    return model, labels, attacks, sweep(model, images, labels, attacks)


def check(model, images, labels, attacks, swept, certificate, sample=40):
    found = certify(model, images, labels, certificate, [budget.eps for budget in swept.budgets])
    checks = sanity_checks(model, images, labels, attacks, [swept], certified=[found], sample=sample)
    return next(check for check in checks if check.name == f"certificate {certificate.name}"), found


@pytest.mark.parametrize(
    ("certificate", "norm"), [(INTERVAL, "linf"), (CROWN(name="crown"), "linf"), (LIPSCHITZ, "l2")]
)
def test_of_a_linear_model_the_certificates_are_the_distances_and_hold(certificate, norm, images):
    eps = (0.005, 0.02) if norm == "linf" else (0.05, 0.2)
    model, labels, attacks, swept = case(images, norm, eps)
    checked, found = check(model, images, labels, attacks, swept, certificate)
    true = model.distances(images, norm)
    for number, radius in enumerate(eps):
        assert torch.equal(found.bounded.certified[:, number], true > radius)
    assert 0 < int(found.bounded.certified[:, 1].sum()) < len(images)
    if norm == "l2":
        torch.testing.assert_close(found.bounded.radius, true.double(), rtol=1e-4, atol=1e-6)
    assert checked.status == "pass"
    pairs = int(found.bounded.certified.sum())
    assert f"({pairs} pairs of a certified image and an attack of the evaluation" in checked.why
    assert found.bounded.correct.all()


def test_what_is_misclassified_is_not_certified(images):
    model, labels, *_ = case(images, "linf")
    for certificate in (INTERVAL, LIPSCHITZ, Smoothing(name="smoothing", sigma=0.01, samples=100)):
        wrong = certify(model, images, 1 - labels, certificate, [0.0])
        assert not wrong.bounded.certified.any()
        assert not (wrong.bounded.radius > 0).any()
        assert not wrong.bounded.correct.any()


# Planted faults.


class Long(Lipschitz):
    """A radius 5% too long."""

    def bound(self, model, images, labels, eps, stream):
        radius = 1.05 * lipschitz_margin(nn.Sequential(*model), images, labels)
        return certificates._by_radius(radius > 0, radius, eps)


class Early(Lipschitz):
    """A constant by two steps of power iteration, which is a lower bound."""

    def bound(self, model, images, labels, eps, stream):
        gap = model(images).sort().values.diff()[:, -1].double()
        (_, before, last) = model
        vector = torch.randn(64, generator=torch.Generator().manual_seed(5))
        for _ in range(2):
            vector = nn.functional.normalize(before.weight.T @ (before.weight @ vector), dim=0)
        constant = (before.weight @ vector).norm() * last.weight.diff(dim=0).norm()
        assert constant < torch.linalg.matrix_norm(before.weight, 2) * last.weight.diff(dim=0).norm() / 1.1
        return certificates._by_radius(gap > 0, gap / constant.double(), eps)


class Unordered(IntervalBounds):
    """Carries the ends of the box through the layers as they are, whatever the signs of the weights."""

    def bound(self, model, images, labels, eps, stream):
        own = labels[:, None]
        found = []
        for radius in eps:
            low, high = model((images - radius).clamp(0, 1)), model((images + radius).clamp(0, 1))
            found.append(high.gather(1, 1 - own) < low.gather(1, own))
        correct = model(images).argmax(-1) == labels
        return Bounded(
            correct, torch.cat(found, -1), torch.full((len(images),), torch.nan).double(), torch.zeros_like(correct)
        )


@pytest.mark.parametrize(
    ("fault", "norm", "eps", "factor"),
    [
        (Long(name="long"), "l2", (0.05, 0.1), None),
        (Early(name="early"), "l2", (0.05, 0.1), 1.2),
        (Unordered(name="unordered"), "linf", (0.01, 0.03), None),
    ],
    ids=["radius 5% too long", "few power iterations", "ends not ordered"],
)
def test_a_planted_fault_fails_and_names_its_images(fault, norm, eps, factor, images):
    model, labels, attacks, swept = case(images, norm, eps, factor)
    checked, found = check(model, images, labels, attacks, swept, fault)
    assert checked.status == "fail"
    assert "the certificate is wrong: image " in checked.why
    true = model.distances(images, norm)
    named = int(checked.why.split("wrong: image ")[1].split()[0].strip(",()"))
    assert true[named] < found.length[named]


def test_the_evaluations_own_attacks_alone_catch_a_fault(images):
    model, labels, _, _ = case(images, "l2")
    fab = [FAB(name="fab", norm="l2", eps=(3.0,), steps=50)]
    swept = sweep(model, images, labels, fab)
    checked, found = check(model, images, labels, fab, swept, Long(name="long"), sample=0)
    assert checked.status == "fail"
    assert len(found.broken(swept.smallest)) > 30
    sound, _ = check(model, images, labels, fab, swept, LIPSCHITZ, sample=0)
    assert sound.status == "pass"


def test_a_smoothed_classifier_is_not_broken_by_attacks_on_the_network(images):
    model, labels, attacks, swept = case(images, "l2", (0.05, 0.2))
    smoothing = Smoothing(name="smoothing", sigma=0.1, samples=2000)
    checked, found = check(model, images, labels, attacks, swept, smoothing)
    assert checked.status == "skip"
    assert "not the network" in checked.why
    true = model.distances(images, "l2")
    assert (found.bounded.radius <= true).double().mean() > 0.9, "a linear model's smoothed radius is its distance"
    assert found.bounded.radius.median() > 0.3 * true.median()
    assert found.pairs(swept) == 0
    assert found.broken(torch.zeros(40)) == []


def batch_norm():
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), Linear()).eval()


@pytest.mark.parametrize(
    ("certificate", "model", "said"),
    [
        (INTERVAL, batch_norm, "certificate.interval: model: BatchNorm is in training mode"),
        (INTERVAL, lambda: nn.Sequential(nn.BatchNorm2d(1), Linear()).train(), "BatchNorm is in training mode"),
        (
            Smoothing(name="smoothing"),
            lambda: nn.Sequential(nn.BatchNorm2d(1), Linear()).train(),
            "BatchNorm2d is in training mode",
        ),
        (INTERVAL, lambda: nn.Sequential(Linear(), nn.Softmax(-1)), "softmax has no interval rule"),
        (CROWN(name="crown"), lambda: nn.Sequential(nn.PReLU(), Linear()), "prelu has no interval rule"),
        (LIPSCHITZ, lambda: nn.Sequential(nn.PReLU(), Linear()), "the layer prelu has no Lipschitz rule"),
        (LIPSCHITZ, lambda: LeNet(image_size=8, double_softmax=True), "the layer softmax has no Lipschitz rule"),
        (LIPSCHITZ, lambda: ResNet18(2, 1), "the layer group_norm has no Lipschitz rule"),
    ],
)
def test_a_model_without_a_rule_is_refused_in_one_line_that_names_the_layer(certificate, model, said):
    with pytest.raises(UserError) as refused:
        require_certifiable([certificate], model(), torch.rand(1, 1, 8, 8))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("network", [LeNet, ConvSmall])
def test_the_projects_chains_of_layers_have_a_lipschitz_radius(network):
    torch.manual_seed(0)
    model, x = network().eval(), torch.rand(2, 1, 28, 28)
    labels = model(x).argmax(-1)
    found = certify(model, x, labels, LIPSCHITZ, [0.0])
    expected = lipschitz_margin(model.layers, x, labels)
    torch.testing.assert_close(found.bounded.radius, expected * (1 - certificates.ROUNDING))


@plain_dataclass
class Memory:
    """Keeps what was saved, and fails at the third batch."""

    kept: dict | None = None
    left: int = 3

    def load(self):
        return self.kept

    def save(self, state):
        self.kept = state()
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("certificate", [replace(INTERVAL, batch_size=8), Smoothing(name="s", sigma=0.1, samples=50)])
def test_an_interrupted_certificate_goes_on_to_the_same_result(certificate, images):
    model, labels, *_ = case(images, "l2")
    whole = certify(model, images, labels, certificate, [0.01, 0.02], seed=3)
    memory, seen = Memory(), []
    with pytest.raises(KeyboardInterrupt):
        certify(model, images, labels, certificate, [0.01, 0.02], seed=3, journal=memory)
    memory.left = 100
    progress = lambda done, of, certified: seen.append(done)  # noqa: E731
    again = certify(model, images, labels, certificate, [0.01, 0.02], seed=3, journal=memory, progress=progress)
    for mine, others in zip(again.bounded, whole.bounded, strict=True):
        torch.testing.assert_close(mine, others, equal_nan=True, rtol=0, atol=0)
    assert seen[0] > certificate.batch_size if certificate.batch_size else seen[0] > 5
    assert seen[-1] == 40


def test_another_seed_draws_other_noise(images):
    model, labels, *_ = case(images, "l2")
    certificate = Smoothing(name="s", sigma=0.3, samples=50)
    first, second = (certify(model, images, labels, certificate, [0.1], seed=seed).bounded.radius for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_plain_function_certifies_attacks_and_saves(images, tmp_path):
    model = Linear()
    labels = model(images).argmax(-1)
    result = evaluate_robustness(
        model, images, labels, [0.005, 0.02], certificates=["interval", CROWN(name="mine")], sanity_images=0
    )
    assert result.verdict == "pass"
    (entry,) = result.results.models
    true = model.distances(images, "linf")
    for budget in entry.threats[0].budgets:
        assert budget.certified == int((true > budget.eps).sum()) <= budget.correct
        assert budget.certified_accuracy == budget.certified / 40
    assert [c.certificate for c in entry.certificates] == list(result.results.certificates) == ["interval", "mine"]
    assert "certified beside robust under attack" in str(result)
    result.save(tmp_path / "r")
    heading, *rows = (tmp_path / "r/images.csv").read_text().splitlines()
    assert sum(int(row.split(",")[heading.split(",").index("certified_interval_0.02")]) for row in rows) == int(
        (true > 0.02).sum()
    )
    for name in ("robustness.csv", "report.html"):
        assert "certified" in (tmp_path / "r" / name).read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"certificates": ["lipschitz"]}, "certificate.lipschitz certifies in l2, and no attack has a budget there"),
        ({"certificates": ["ibp"]}, "there is no 'ibp'; choose of interval, crown, lipschitz, smoothing"),
        ({"certificates": ["interval", "interval"]}, "give each another name"),
        ({"certificates": ["interval"], "model": nn.Sequential(Linear(), nn.Softmax(-1))}, "softmax has no"),
    ],
)
def test_what_does_not_fit_is_refused_before_an_attack(given, said, images, monkeypatch):
    monkeypatch.setattr(PGD, "perturb", lambda *_: pytest.fail("attacked"))
    labels = torch.zeros(40, dtype=torch.long)
    with pytest.raises(UserError, match=said):
        evaluate_robustness(given.pop("model", Linear()), images, labels, [0.1], **given)


def test_a_certificate_is_abstract():
    with pytest.raises(TypeError):
        Certificate(name="none", norm="linf")

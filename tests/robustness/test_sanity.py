"""Each fault that a check looks for is planted, and caught by that check; an honest model passes all."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import FGSM, PGD, GaussianNoise, Square
from jacobian_robust.robustness import sanity
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.sanity import Check, checks_of, sanity_checks, verdict

ATTACK = PGD(name="pgd", norm="linf", eps=[0.02, 0.05, 0.1], steps=20, step_size=0.02)


class Honest(nn.Module):
    """Two classes, parted by a plane through the grey image, with a random normal."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        normal = torch.randn(64, generator=torch.Generator().manual_seed(0))
        self.normal = nn.Parameter(scale * normal)

    def forward(self, images):
        margin = (images - 0.5).flatten(1) @ self.normal
        return torch.stack([-margin, margin], dim=1)


class Rounding(Honest):
    """Defended by a gradient that is zero almost everywhere."""

    def forward(self, images):
        return super().forward((images * 16).round() / 16)


class Noisy(Honest):
    def forward(self, images):
        return super().forward(images) + torch.randn(len(images), 2)


class BatchNormalised(Honest):
    """Normalises by the batch's own statistics, whatever its mode."""

    def forward(self, images):
        return super().forward(images - images.mean(0) + 0.5)


class Undefined(Honest):
    """Divides zero by zero for light images."""

    def forward(self, images):
        light = images.flatten(1).mean(1, keepdim=True) > 0.5
        return super().forward(images).masked_fill(light, torch.nan)


class WithDropout(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Honest(), nn.Dropout(0.1))


class WithBatchNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(1), Honest())


class Steep(Honest):
    """No logit is large but those of light images, which make up the minority."""

    def forward(self, images):
        light = images.flatten(1).mean(1, keepdim=True) > 0.52
        return super().forward(images) * torch.where(light, 1e4, 1.0)


class Root(Honest):
    """The square root of the absolute value of zero, whose slope is infinite times zero."""

    def forward(self, images):
        return super().forward(images) + (0 * images.flatten(1).sum(1, keepdim=True)).abs().sqrt()


class FirstUndefined(Rounding):
    """Without a gradient at any image, and one that is no number at the first."""

    def forward(self, images):
        first = (images == images[:1]).flatten(1).all(1, keepdim=True)
        return (
            super().forward(images) + torch.where(first, 0 * images.flatten(1).sum(1, keepdim=True), 1.0).abs().sqrt()
        )


class Shell(nn.Module):
    """Errs in a thin shell around the grey image alone; outside of it the gradient leads further out."""

    def forward(self, images):
        distance = (images - 0.5).flatten(1).abs().mean(1)
        inside = (distance > 0.02) & (distance < 0.06)
        lead = torch.where(inside, 1.0, 0.1 * distance - 1)
        return torch.stack([-lead, lead], dim=1)


@pytest.fixture(autouse=True)
def fewer_queries(monkeypatch):
    """Let the random search end sooner: it is most of a check's time, and a planted fault must show all the same."""
    monkeypatch.setattr(sanity.balls, "QUERIES", 100)


@pytest.fixture
def images():
    return (torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 255).round() / 255


def checked(model, images, attack=ATTACK, **options):
    labels = Honest()(images).argmax(-1)
    result = sweep(model, images, labels, [attack])
    checks = sanity_checks(model, images, labels, [attack], [result], **options)
    return {check.name: check for check in checks}


def test_an_honest_model_passes_everything(images, monkeypatch):
    monkeypatch.undo()  # all queries
    training = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    checks = checked(Honest().eval(), images, training_images=training, others=[Honest(2.0).eval()])
    assert {name: check.status for name, check in checks.items()} == dict.fromkeys(checks, "pass")
    assert list(checks) == [*sanity.MODEL_CHECKS, *sanity.BALL_CHECKS]
    assert verdict(list(checks.values())) == "pass"
    assert all(check.why for check in checks.values())


@pytest.mark.parametrize(
    ("model", "caught_by"),
    [
        (nn.Sequential(Honest(), nn.Softmax(-1)).eval(), {"logits"}),
        (Rounding().eval(), {"gradients", "gradient-free", "chance at a large budget"}),
        (Honest(1e4).eval(), {"gradients", "saturation"}),
        (Noisy().eval(), {"deterministic"}),
        (BatchNormalised().eval(), {"deterministic"}),
        (Undefined().eval(), {"logits"}),
        (WithDropout().train(), {"evaluation mode", "deterministic"}),
        (WithBatchNorm().train(), {"evaluation mode", "deterministic"}),
        (Steep().eval(), {"gradients", "saturation"}),
        (Root().eval(), {"gradients"}),
    ],
    ids=[
        *("softmax", "rounding", "huge logits", "noise", "batch statistics", "nan", "dropout", "batch normalisation"),
        *("a few huge logits", "nan gradients"),
    ],
)
def test_a_planted_fault_is_caught(model, caught_by, images):
    checks = checked(model, images)
    assert caught_by <= {name for name, check in checks.items() if check.status == "fail"}
    assert verdict(list(checks.values())) == "fail"


class Answer(nn.Module):
    """Turns the logits of three classes into something else."""

    def __init__(self, turned) -> None:
        super().__init__()
        self.logits = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False))
        self.turned = turned
        with torch.no_grad():
            self.logits[1].weight.copy_(2 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return self.turned(self.logits(images - 0.5))


def of_the_logits(turned, images):
    """Of the checks of a model, which no attack is made for."""
    model = Answer(turned).eval()
    labels, noise = model(images).argmax(-1), GaussianNoise(name="g", eps=0.1)
    checks = sanity_checks(model, images, labels, [noise], [sweep(model, images, labels, [noise])])
    return next(check for check in checks if check.name == "logits")


@pytest.mark.parametrize(
    ("turned", "status", "said"),
    [
        (lambda logits: logits.bfloat16().softmax(-1).float(), "fail", "sum to 1"),
        (lambda logits: logits.half().softmax(-1).float(), "fail", "sum to 1"),
        (lambda logits: (logits / 30).softmax(-1), "fail", "sum to 1"),
        (lambda logits: logits.softmax(-1).clamp(0.02, 0.98), "warn", r"in \[0, 1\]"),
        (torch.sigmoid, "warn", r"in \[0, 1\]"),
        (lambda logits: 100 * logits.softmax(-1), "warn", "sum to 100"),
        (lambda logits: 100 * logits.bfloat16().softmax(-1).float(), "warn", "sum to 1"),
    ],
    ids=["bfloat16", "float16", "flat", "clamped", "sigmoid", "times 100", "times 100 in bfloat16"],
)
def test_probabilities_are_known_by_any_name(turned, status, said, images):
    found = of_the_logits(turned, images)
    assert found.status == status
    assert re.search(said, found.why)


@pytest.mark.parametrize(
    "turned",
    [
        lambda logits: logits,
        lambda logits: logits / 1000,
        lambda logits: logits - logits.mean(-1, keepdim=True),
        lambda logits: logits.log_softmax(-1),
        lambda logits: logits.bfloat16().float(),
        lambda logits: logits - logits.amin() + 1e-3,
        torch.relu,
        nn.functional.softplus,
        lambda logits: 0.3 + logits / 1000,
        lambda logits: 5.0 + logits / 1000,
        lambda logits: nn.functional.normalize(logits),
    ],
    ids=[
        *("logits", "small", "centred", "log-softmax", "bfloat16", "shifted", "rectified", "softplus"),
        *("about 0.3", "about 5", "cosines"),
    ],
)
def test_logits_are_no_probabilities(turned, images):
    assert of_the_logits(turned, images).status == "pass"


@pytest.mark.parametrize("classes", [2, 10])
def test_the_first_logits_of_a_network_are_no_probabilities(classes, images):
    for seed in range(20):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Flatten(1), nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, classes), nn.ReLU())
        assert of_the_logits(layers, images).status == "pass"


def test_a_budget_of_zero_that_changes_predictions_is_caught(images):
    torch.manual_seed(0)

    class Loud(Honest):
        def forward(self, images):
            return super().forward(images) + 30 * torch.randn(len(images), 2)

    assert checked(Loud().eval(), images)["budget zero"].status == "fail"


def test_training_images_are_recognised(images):
    checks = checked(Honest().eval(), images, training_images=(images[:7] * 255).to(torch.uint8))
    assert checks["unseen images"].status == "fail"
    assert "7 of 60" in checks["unseen images"].why
    images[:7] = torch.linspace(0, 1, 7)[:, None, None, None]  # an empty canvas is the same in both sets
    checks = checked(Honest().eval(), images, training_images=(images[:7] * 255).to(torch.uint8))
    assert checks["unseen images"].status == "pass"


def test_an_attack_that_was_stopped_early_is_caught(images):
    early = replace(ATTACK, steps=2, step_size=0.01, random_start=False)
    found = checked(Honest().eval(), images, early)["convergence"]
    assert found.status == "fail"
    assert re.search(r"robust images at ε 0\.\d+, the largest budget with a tenth of the sample robust$", found.why)


@pytest.mark.parametrize(
    ("fragile", "standing", "status"),
    [
        *((0, 60, "pass"), (1, 60, "warn"), (3, 60, "warn"), (4, 60, "fail")),
        *((2, 20, "warn"), (3, 20, "fail"), (1, 6, "warn"), (2, 6, "fail"), (1, 1, "warn"), (2, 2, "fail")),
    ],
)
def test_a_longer_run_is_judged_by_the_robust_images(fragile, standing, status):
    """Of 60 images so many are robust, and so many of these a longer run breaks: their mean is near the boundary."""

    class Brighter(nn.Module):
        def forward(self, images):
            lead = images.flatten(1).mean(1) - 0.5
            return torch.stack([-lead, lead], dim=1)

    images, labels = torch.full((60, 1, 8, 8), 0.9), torch.ones(60, dtype=torch.long)
    images[:fragile] = 0.52
    attack = replace(ATTACK, eps=(0.05,))
    result = sweep(Brighter().eval(), images, labels, [attack])
    stood = replace(result, robust=[torch.arange(60) < standing])
    checks = sanity_checks(Brighter().eval(), images, labels, [attack], [stood])
    found = next(check for check in checks if check.name == "convergence")
    assert found.status == status
    assert f"breaks {fragile or 'none'} of the {standing} robust images" in found.why


@pytest.mark.parametrize("attack", [ATTACK, FGSM(name="fgsm", eps=[0.02])], ids=["PGD", "FGSM"])
def test_gradients_that_mislead_are_caught(images, attack, monkeypatch):
    """The sine is small and steep: it turns the gradient around, and hardly moves the boundary."""
    monkeypatch.undo()  # all queries

    class Wave(Honest):
        def forward(self, images):
            margin = super().forward(images)
            return margin + 0.3 * torch.sin(40 * margin)

    checks = checked(Wave().eval(), images, attack)
    assert checks["gradient-free"].status == "fail"
    assert checks["convergence"].status in ("warn", "fail")


def test_what_the_evaluations_own_square_broke_after_gradients_is_told(images):
    """The check's own Square meets only what that one left, and breaks nothing."""
    model, labels = Rounding().eval(), Honest()(images).argmax(-1)
    square = Square(name="square", norm="linf", eps=[0.1], queries=600)

    def outcome(*attacks):
        result = sweep(model, images, labels, attacks)
        broken = [made.broken for made in result.budgets[-1].attacks if made.attack == "square"]
        checks = sanity_checks(model, images, labels, attacks, [result])
        return broken, next(check for check in checks if check.name == "gradient-free")

    (broken,), after = outcome(replace(ATTACK, eps=(0.1,)), square)
    assert broken > 10
    assert after.status in ("warn", "fail")
    assert f"Square breaks {broken} of the" in after.why
    _, alone = outcome(square)
    assert "evaluation's own" not in alone.why


def test_what_breaks_another_model_and_this_one_too_is_caught(images, monkeypatch):
    monkeypatch.setattr(sanity.balls, "QUERIES", 1)  # so that there is something left for it
    checks = checked(Rounding().eval(), images, others=[Honest().eval()])
    assert checks["transfer"].status == "fail"
    assert checked(Rounding().eval(), images)["transfer"].status == "warn"


def test_one_undefined_gradient_does_not_hide_those_that_are_zero(images):
    check = checked(FirstUndefined().eval(), images)["gradients"]
    assert check.status == "fail"
    assert "not finite at 1:" in check.why
    assert "zero at 59:" in check.why


def test_a_small_rise_does_not_hide_a_larger_one(images):
    model, labels = Honest().eval(), Honest()(images).argmax(-1)
    result = sweep(model, images, labels, [replace(ATTACK, eps=(0.01, 0.02, 0.03))])
    risen = [replace(b, correct=c) for b, c in zip(result.budgets, (20, 21, 50), strict=True)]
    checks = sanity_checks(model, images, labels, [ATTACK], [replace(result, budgets=risen)])
    (check,) = (check for check in checks if check.name == "monotone")
    assert check.status == "fail"
    assert "at ε 0.03 30 more images stay correct than at 0.01" in check.why


def test_a_model_on_which_larger_budgets_find_less_is_caught():
    """The sweep's own counts cannot show it: what broke at a smaller budget stays broken."""
    grey, labels = torch.full((20, 1, 8, 8), 0.5), torch.zeros(20, dtype=torch.long)
    attack = replace(ATTACK, eps=(0.08, 0.3))
    result = sweep(Shell().eval(), grey, labels, [attack])
    assert [budget.correct for budget in result.budgets] == [0, 0]
    checks = sanity_checks(Shell().eval(), grey, labels, [attack], [result])
    (check,) = (check for check in checks if check.name == "monotone")
    assert check.status == "fail"
    assert "20 more images stay correct than at 0.08" in check.why


def test_independent_counts_that_rise_with_the_budget_are_caught(images):
    model, labels = Honest().eval(), Honest()(images).argmax(-1)
    result = sweep(model, images, labels, [ATTACK])
    turned = replace(result, budgets=[replace(b, eps=0.12 - b.eps) for b in result.budgets])
    (check,) = (c for c in sanity_checks(model, images, labels, [ATTACK], [turned]) if c.name == "monotone")
    assert check.status == "fail"


def test_each_ball_has_its_own_checks(images):
    model, labels = Honest().eval(), Honest()(images).argmax(-1)
    attacks = [
        ATTACK,
        PGD(name="l2", norm="l2", eps=[0.1, 0.3], steps=20, step_size=0.05),
        GaussianNoise(name="g", eps=0.1),
    ]
    sweeps = [sweep(model, images, labels, [attack]) for attack in attacks]
    names = [check.name for check in sanity_checks(model, images, labels, attacks, sweeps)]
    assert names == [name for name, *_ in checks_of(["linf", "l2", "gaussian"])]
    assert names.count("gradients") == 1
    assert {"convergence, ℓ∞", "convergence, ℓ2"} <= set(names)
    assert not any("gaussian" in name.lower() for name in names)


def test_it_is_said_that_no_image_is_robust(images):
    checks = checked(Honest().eval(), images, replace(ATTACK, eps=(0.5,)))
    assert checks["convergence"].status == checks["gradient-free"].status == "skip"


def test_robust_images_are_attacked_at_a_budget_with_enough_of_them(images):
    labels = Honest()(images).argmax(-1)
    few = sanity_checks(Honest().eval(), images, labels, [ATTACK], [of(images, labels, 5, 50, 3)])
    said = "of the 50 robust images at ε 0.05, the largest budget with a tenth of the sample robust"
    assert said in next(c.why for c in few if c.name == "convergence")
    fewer = sanity_checks(Honest().eval(), images, labels, [ATTACK], [of(images, labels, 5, 4, 3)])
    said = "of the 5 robust images at ε 0.02, the budget with the most of the sample robust"
    assert said in next(c.why for c in fewer if c.name == "convergence")


def of(images, labels, *standing):
    """A result in which so many of the first images are robust at each of the attack's budgets."""
    result = sweep(Honest().eval(), images, labels, [ATTACK])
    return replace(result, robust=[torch.arange(len(images)) < number for number in standing])


def test_checks_leave_model_images_and_random_stream_as_they_were(images):
    model = Honest().train()
    before, state = images.clone(), torch.get_rng_state()
    checked(model, images)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_verdict_is_the_worst_status():
    def worst(*statuses):
        return verdict([Check("", status, "") for status in statuses])

    assert worst("pass", "skip") == "pass"
    assert worst("pass", "warn") == "warn"
    assert worst("fail", "warn") == "fail"

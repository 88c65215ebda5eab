import pytest
import torch
from pydantic import ValidationError
from torch import nn

from jacobian_robust.attacks import FGSM, PGD, AutoAttack, Square
from jacobian_robust.errors import UserError
from jacobian_robust.robustness import distances, sweep

PGD_OPTIONS = {"name": "pgd", "norm": "linf", "eps": [0.1], "steps": 10, "step_size": 0.02}


class Linear(nn.Module):
    """Two classes, parted by the mean pixel at 0.5: an ℓ∞ attack succeeds exactly when eps > |mean - 0.5|."""

    def __init__(self, scale: float = 50.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        margin = self.scale * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-margin, margin], dim=1)


def grey(*levels: float) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    return images, (images.flatten(1).mean(1) > 0.5).long()


@pytest.mark.parametrize(
    "attack", [PGD(**PGD_OPTIONS | {"eps": [0.05, 0.15, 0.25, 0.35]}), FGSM(name="fgsm", eps=[0.05, 0.15, 0.25, 0.35])]
)
def test_accuracy_under_attack_of_a_linear_model_is_known(attack):
    images, labels = grey(0.4, 0.3, 0.2, 0.6, 0.7, 0.8)
    if isinstance(attack, PGD):
        attack = PGD(**PGD_OPTIONS | {"eps": attack.eps, "steps": 40})
    result = sweep(Linear().eval(), images, labels, attack)
    assert [b.correct for b in result.budgets] == [6, 4, 2, 0]
    assert [b.robust_accuracy for b in result.budgets] == pytest.approx([1, 4 / 6, 2 / 6, 0])
    assert result.clean_correct == 6


class Counting(Linear):
    """Counts the images that it is shown with their gradient, the attack's own passes."""

    shown = 0

    def forward(self, images):
        self.shown += len(images) * images.requires_grad
        return super().forward(images)


def test_what_a_smaller_budget_broke_is_not_attacked_again_unless_budgets_are_independent():
    images, labels = grey(0.4, 0.3, 0.2, 0.6, 0.7, 0.8)
    attack = PGD(**PGD_OPTIONS | {"eps": [0.35, 0.05, 0.25, 0.15], "steps": 40})
    nested, independent = Counting().eval(), Counting().eval()
    results = [
        sweep(nested, images, labels, attack),
        sweep(independent, images, labels, attack, independent=True),
    ]
    for result in results:  # in the order that was asked for
        assert [(b.eps, b.correct) for b in result.budgets] == [(0.35, 0), (0.05, 6), (0.25, 2), (0.15, 4)]
        assert [int(robust.sum()) for robust in result.robust] == [0, 6, 2, 4]
        assert [len(e.clean) for e in result.examples] == [6, 0, 4, 2]
    assert nested.shown == 40 * (6 + 6 + 4 + 2)
    assert independent.shown == 40 * 4 * 6


def test_a_larger_budget_never_gives_back_what_a_smaller_one_broke():
    class LostWhenLarge(PGD):
        def perturb(self, model, images, labels, eps):
            return super().perturb(model, images, labels, eps) if eps < 0.2 else images

    images, labels = grey(0.4, 0.3, 0.6)
    attack = LostWhenLarge(**PGD_OPTIONS | {"eps": [0.15, 0.3], "steps": 40})
    nested, independent = (sweep(Linear().eval(), images, labels, attack, independent=i) for i in (False, True))
    assert [b.correct for b in nested.budgets] == [1, 1]
    assert [b.correct for b in independent.budgets] == [1, 3]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.6)])
@pytest.mark.parametrize("name", ["autoattack", "square"])
def test_attacks_of_other_kinds_break_what_they_say_and_repeat(name, norm, eps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    images = torch.rand(12, 1, 8, 8)
    labels = model(images).argmax(-1)
    options = {"name": name, "norm": norm, "eps": [eps]}
    attack = (
        AutoAttack(**options, parts=["apgd-ce", "square"]) if name == "autoattack" else Square(**options, queries=100)
    )
    (first, again) = (sweep(model, images, labels, attack, seed=1) for _ in range(2))
    assert first.budgets == again.budgets
    assert torch.equal(first.examples[0].adversarial, again.examples[0].adversarial)
    assert first.budgets[0].discarded == 0
    assert 0 < first.budgets[0].correct < 12
    if name == "autoattack":
        (pgd,) = sweep(model, images, labels, PGD(**options, steps=40, step_size=eps / 4)).budgets
        assert first.budgets[0].correct <= pgd.correct


def test_l2_attack_of_a_linear_model_is_known_and_stays_in_its_ball():
    images, labels = grey(0.4, 0.3)  # 16 pixels: ℓ2 distance 4·|mean - 0.5| = 0.4 and 0.8
    attack = PGD(name="l2", norm="l2", eps=[0.3, 0.6, 0.9], steps=40, step_size=0.1)
    result = sweep(Linear().eval(), images, labels, attack)
    assert [b.correct for b in result.budgets] == [2, 1, 0]
    assert all(b.discarded == 0 for b in result.budgets)
    adversarial = attack.perturb(Linear(), images, labels, 0.3)
    assert (distances(images, adversarial, "l2") <= 0.3 + 1e-5).all()


def test_only_correct_images_are_attacked_and_both_conventions_reported():
    images, labels = grey(0.4, 0.3, 0.8)
    labels[0] = 1  # the model errs on it
    result = sweep(Linear().eval(), images, labels, PGD(**PGD_OPTIONS | {"eps": [0.25], "steps": 40}))
    (budget,) = result.budgets
    assert (budget.attacked, budget.correct, budget.images) == (2, 1, 3)
    assert budget.share_of_attacked == 0.5
    assert budget.robust_accuracy == pytest.approx(1 / 3)


def test_a_model_that_is_never_right_has_no_share_of_attacked():
    images, labels = grey(0.4)
    result = sweep(Linear().eval(), images, 1 - labels, PGD(**PGD_OPTIONS))
    assert result.budgets[0].share_of_attacked is None
    assert result.budgets[0].robust_accuracy == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_without_survivors_and_budgets_without_correct_images_have_nothing_to_attack(norm):
    images, labels = grey(0.4, 0.6)
    attack = PGD(name="pgd", norm=norm, eps=[4], steps=5, step_size=2, restarts=3)
    assert sweep(Linear().eval(), images, labels, attack).budgets[0].correct == 0
    assert sweep(Linear().eval(), images, 1 - labels, attack).budgets[0].attacked == 0


def test_budget_zero_changes_nothing():
    images, labels = grey(0.4, 0.7)
    for attack in (
        PGD(**PGD_OPTIONS | {"eps": [0]}),
        PGD(**PGD_OPTIONS | {"eps": [0], "norm": "l2"}),
        FGSM(name="f", eps=[0]),
    ):
        (budget,) = sweep(Linear().eval(), images, labels, attack).budgets
        assert budget.correct == 2


class Cheat(PGD):
    """Returns images outside the ball, or outside [0, 1]."""

    def perturb(self, model, images, labels, eps):
        return torch.where(images < 0.5, 2.0, 0.0) if eps < 0.5 else images + 0.9


@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_examples_outside_the_ball_or_the_pixel_range_break_nothing(eps):
    images, labels = grey(0.4, 0.3)
    (budget,) = sweep(Linear().eval(), images, labels, Cheat(**PGD_OPTIONS | {"eps": [eps]})).budgets
    assert (budget.correct, budget.discarded) == (2, 2)


class Lottery(PGD):
    """Breaks each image with probability one half, and remembers how many it was given."""

    seen: list[int] = []  # noqa: RUF012

    def perturb(self, model, images, labels, eps):
        self.seen.append(len(images))
        lucky = torch.rand(len(images)) < 0.5
        return torch.where(lucky[:, None, None, None], 1 - images, images)


def test_restarts_meet_only_the_survivors():
    images, labels = grey(*[0.4] * 400)
    Lottery.seen.clear()
    attack = Lottery(**PGD_OPTIONS | {"eps": [0.5], "restarts": 3, "batch_size": 1000})
    (budget,) = sweep(Linear().eval(), images, labels, attack).budgets
    assert Lottery.seen[0] == 400
    assert Lottery.seen == sorted(Lottery.seen, reverse=True)
    assert 70 < Lottery.seen[2] < 130
    assert 30 < budget.correct < 70


def test_the_global_random_stream_is_left_alone_and_the_seed_decides():
    images, labels = grey(*torch.linspace(0.47, 0.499, 50).tolist())
    attack = PGD(**PGD_OPTIONS | {"steps": 1, "step_size": 0.001})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (sweep(Linear().eval(), images, labels, attack, seed=seed, examples=50) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert first.budgets == again.budgets
    assert torch.equal(first.examples[0].adversarial, again.examples[0].adversarial)
    assert not torch.equal(first.examples[0].adversarial[:1], other.examples[0].adversarial[:1])


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = Linear()
    model.train()
    model.dropout.eval()
    images, labels = grey(0.4)
    PGD(**PGD_OPTIONS).perturb(model, images, labels, 0.1)

    class Broken(Linear):
        def forward(self, images):
            raise RuntimeError("out of memory")

    broken = Broken()
    broken.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        PGD(**PGD_OPTIONS).perturb(broken, images, labels, 0.1)
    for m in (model, broken):
        assert m.training
        assert m.scale.requires_grad
    assert not model.dropout.training
    assert model.scale.grad is None


def test_attacks_work_inside_inference_mode():
    images, labels = grey(0.45)
    model = Linear().eval()
    with torch.inference_mode():
        adversarial = PGD(**PGD_OPTIONS).perturb(model, images, labels, 0.1)
    assert model(adversarial).argmax(1) != labels


def test_pixels_outside_the_unit_interval_are_refused():
    images, labels = grey(0.4)
    with pytest.raises(UserError, match=r"pixels in \[-1, -1\]; it needs \[0, 1\]"):
        PGD(**PGD_OPTIONS).perturb(Linear(), images * 0 - 1, labels, 0.1)
    with pytest.raises(UserError, match="pixels"):
        PGD(**PGD_OPTIONS).perturb(Linear(), images * torch.nan, labels, 0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"eps": [-0.1]},
        {"eps": []},
        {"eps": ["x"]},
        {"steps": 0},
        {"step_size": 0},
        {"restarts": 0},
        {"norm": "l7"},
        {"speed": 1},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        PGD(**PGD_OPTIONS | options)


def test_one_budget_needs_no_list():
    assert PGD(**PGD_OPTIONS | {"eps": 0.2}).eps == (0.2,)

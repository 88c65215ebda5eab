import copy
import io
from dataclasses import replace

import pyautoattack
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from jacobian_robust.attacks import (
    FAB,
    FGSM,
    PGD,
    Attack,
    AutoAttack,
    GaussianNoise,
    Library,
    Square,
    Transfer,
    UniformNoise,
    distances,
)
from jacobian_robust.errors import UserError
from jacobian_robust.reporting.console import print_results
from jacobian_robust.robustness.budgets import attack_standing, sweep
from jacobian_robust.robustness.results import model_results, results_of

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
    result = sweep(Linear().eval(), images, labels, [attack])
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
        sweep(nested, images, labels, [attack]),
        sweep(independent, images, labels, [attack], independent=True),
    ]
    for result in results:  # in ascending order
        assert [(b.eps, b.correct) for b in result.budgets] == [(0.05, 6), (0.15, 4), (0.25, 2), (0.35, 0)]
        assert [int(robust.sum()) for robust in result.robust] == [6, 4, 2, 0]
        assert [len(e.clean) for e in result.examples] == [0, 2, 4, 6]
        assert [b.attacks[0].met for b in result.budgets] == ([6, 6, 4, 2] if result is results[0] else [6] * 4)
    # All 40 steps for those that stand at last, fewer for those that fall.
    assert 40 * (6 + 4 + 2) < nested.shown < independent.shown < 40 * 4 * 6


def test_a_larger_budget_never_gives_back_what_a_smaller_one_broke():
    class LostWhenLarge(PGD):
        def perturb(self, model, images, labels, eps):
            return super().perturb(model, images, labels, eps) if eps < 0.2 else images

    images, labels = grey(0.4, 0.3, 0.6)
    attack = LostWhenLarge(**PGD_OPTIONS | {"eps": [0.15, 0.3], "steps": 40})
    nested, independent = (sweep(Linear().eval(), images, labels, [attack], independent=i) for i in (False, True))
    assert [b.correct for b in nested.budgets] == [1, 1]
    assert [b.correct for b in independent.budgets] == [1, 3]


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("autoattack", "linf", 0.1),
        pytest.param("autoattack", "l2", 0.6, marks=pytest.mark.slow),
        ("square", "linf", 0.1),
        ("square", "l2", 0.6),
    ],
)
def test_attacks_of_other_kinds_break_what_they_say_and_repeat(name, norm, eps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    images = torch.rand(12, 1, 8, 8)
    labels = model(images).argmax(-1)
    options = {"name": name, "norm": norm, "eps": [eps]}
    attack = (
        AutoAttack(**options, parts=["apgd-ce", "square"]) if name == "autoattack" else Square(**options, queries=100)
    )
    (first, again) = (sweep(model, images, labels, [attack], seed=1) for _ in range(2))
    assert first.budgets == again.budgets
    assert torch.equal(first.examples[0].adversarial, again.examples[0].adversarial)
    assert first.budgets[0].discarded == 0
    assert 0 < first.budgets[0].correct < 12
    if name == "autoattack":
        (pgd,) = sweep(model, images, labels, [PGD(**options, steps=40, step_size=eps / 4)]).budgets
        assert first.budgets[0].correct <= pgd.correct


def test_l2_attack_of_a_linear_model_is_known_and_stays_in_its_ball():
    images, labels = grey(0.4, 0.3)  # 16 pixels: ℓ2 distance 4·|mean - 0.5| = 0.4 and 0.8
    attack = PGD(name="l2", norm="l2", eps=[0.3, 0.6, 0.9], steps=40, step_size=0.1)
    result = sweep(Linear().eval(), images, labels, [attack])
    assert [b.correct for b in result.budgets] == [2, 1, 0]
    assert all(b.discarded == 0 for b in result.budgets)
    adversarial = attack.perturb(Linear(), images, labels, 0.3)
    assert (distances(images, adversarial, "l2") <= 0.3 + 1e-5).all()


def test_only_correct_images_are_attacked_and_both_conventions_reported():
    images, labels = grey(0.4, 0.3, 0.8)
    labels[0] = 1  # the model errs on it
    result = sweep(Linear().eval(), images, labels, [PGD(**PGD_OPTIONS | {"eps": [0.25], "steps": 40})])
    (budget,) = result.budgets
    assert (budget.attacked, budget.correct, budget.images) == (2, 1, 3)
    assert budget.share_of_attacked == 0.5
    assert budget.robust_accuracy == pytest.approx(1 / 3)


def test_an_image_whose_logits_are_nan_is_not_right():
    """The largest of them would be the nan itself, always in the same place: a class that no attack can change."""

    class Undefined(Linear):
        def forward(self, images):
            return super().forward(images) * torch.nan

    images, labels = grey(0.4, 0.3)
    result = sweep(Undefined().eval(), images, labels, [PGD(**PGD_OPTIONS)])
    assert (result.clean_correct, result.budgets[0].correct) == (0, 0)
    assert result.predicted.tolist() == [-1, -1]


def test_a_model_that_is_never_right_has_no_share_of_attacked():
    images, labels = grey(0.4)
    result = sweep(Linear().eval(), images, 1 - labels, [PGD(**PGD_OPTIONS)])
    assert result.budgets[0].share_of_attacked is None
    assert result.budgets[0].robust_accuracy == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_without_survivors_and_budgets_without_correct_images_have_nothing_to_attack(norm):
    images, labels = grey(0.4, 0.6)
    attack = PGD(name="pgd", norm=norm, eps=[4], steps=5, step_size=2, restarts=3)
    assert sweep(Linear().eval(), images, labels, [attack]).budgets[0].correct == 0
    assert sweep(Linear().eval(), images, 1 - labels, [attack]).budgets[0].attacked == 0


def test_budget_zero_changes_nothing():
    images, labels = grey(0.4, 0.7)
    for attack in (
        PGD(**PGD_OPTIONS | {"eps": [0]}),
        PGD(**PGD_OPTIONS | {"eps": [0], "norm": "l2"}),
        FGSM(name="f", eps=[0]),
    ):
        (budget,) = sweep(Linear().eval(), images, labels, [attack]).budgets
        assert budget.correct == 2


class Cheat(PGD):
    """Returns images outside the ball, or outside [0, 1]."""

    def perturb(self, model, images, labels, eps):
        return torch.where(images < 0.5, 2.0, 0.0) if eps < 0.5 else images + 0.9


@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_examples_outside_the_ball_or_the_pixel_range_break_nothing(eps):
    images, labels = grey(0.4, 0.3)
    (budget,) = sweep(Linear().eval(), images, labels, [Cheat(**PGD_OPTIONS | {"eps": [eps]})]).budgets
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
    (budget,) = sweep(Linear().eval(), images, labels, [attack]).budgets
    assert Lottery.seen[0] == 400
    assert Lottery.seen == sorted(Lottery.seen, reverse=True)
    assert 70 < Lottery.seen[2] < 130
    assert 30 < budget.correct < 70


def test_the_global_random_stream_is_left_alone_and_the_seed_decides():
    images, labels = grey(*torch.linspace(0.47, 0.499, 50).tolist())
    attack = PGD(**PGD_OPTIONS | {"steps": 1, "step_size": 0.001})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (
        sweep(Linear().eval(), images, labels, [attack], seed=seed, examples=50) for seed in (0, 0, 1)
    )
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


def network(classes=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, classes)).eval()


def labelled(model, n=40, seed=1):
    images = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return images, model(images).argmax(-1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_pgd_climbs_the_loss_that_was_asked_for(loss, norm):
    """One step from the image itself is along the loss's own gradient, which is computed here by its definition."""
    model = network()
    images, labels = labelled(model)
    attack = PGD(name="p", norm=norm, eps=1.0, steps=1, step_size=0.01, random_start=False, early_stop=False, loss=loss)
    inputs = images.clone().requires_grad_()
    logits = model(inputs)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    best_other = logits.scatter(1, labels[:, None], -torch.inf).amax(-1)
    top = logits.sort(descending=True).values
    value = (best_other - own) / (top[:, 0] - top[:, 2] if loss == "dlr" else 1)
    (gradient,) = torch.autograd.grad(value.sum(), inputs)
    length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
    direction = gradient / length if norm == "l2" else gradient.sign()
    expected = (images + 0.01 * direction).clamp(0, 1)
    torch.testing.assert_close(attack.perturb(model, images, labels, 1.0), expected, atol=1e-5, rtol=0)


def test_the_margin_breaks_a_saturated_model_of_which_cross_entropy_sees_no_gradient():
    images, labels = grey(0.4, 0.3)
    options = PGD_OPTIONS | {"eps": [0.25], "steps": 40}
    saturated = Linear(scale=1e5).eval()
    assert sweep(saturated, images, labels, [PGD(**options)]).budgets[0].correct == 2
    assert sweep(saturated, images, labels, [PGD(**options, loss="margin")]).budgets[0].correct == 0
    with pytest.raises(UserError, match="at least 3 classes"):
        sweep(saturated, images, labels, [PGD(**options, loss="dlr")])


def test_the_first_iterate_that_breaks_counts_and_the_image_is_not_shown_again():
    model = Counting().eval()
    images, labels = grey(0.49, 0.47)
    attack = PGD(**PGD_OPTIONS | {"steps": 40, "step_size": 0.005, "random_start": False})
    adversarial = attack.perturb(model, images, labels, 0.3)
    torch.testing.assert_close(
        adversarial - images, torch.tensor([0.015, 0.035])[:, None, None, None].expand(2, 1, 4, 4)
    )
    # The third step broke the first image, the seventh the second, which the next passes see.
    assert model.shown == (3 + 1) + (7 + 1)
    whole = PGD(**PGD_OPTIONS | {"steps": 40, "step_size": 0.005, "random_start": False, "early_stop": False})
    torch.testing.assert_close(whole.perturb(model, images, labels, 0.15) - images, torch.full_like(images, 0.15))


def test_early_stop_never_breaks_fewer():
    model = network()
    images, labels = labelled(model, 200)
    options = PGD_OPTIONS | {"eps": [0.02, 0.05, 0.1], "steps": 20}
    stopped, whole = (sweep(model, images, labels, [PGD(**options, early_stop=stop)]) for stop in (True, False))
    assert all(a.correct <= b.correct for a, b in zip(stopped.budgets, whole.budgets, strict=True))


def test_fab_finds_the_distance_to_a_plane():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    images = 0.45 + 0.1 * torch.rand(10, 1, 4, 4)
    logits = model(images)
    labels = logits.argmax(-1)
    normal = model[1].weight[0] - model[1].weight[1]
    distance = ((logits[:, 0] - logits[:, 1]) / normal.norm()).abs()
    swept = sweep(model, images, labels, [FAB(name="fab", norm="l2", eps=4.0, steps=20)])
    # It steps 5% beyond where it takes the boundary to be (its η), and comes back on the way.
    torch.testing.assert_close(swept.smallest, distance.detach(), rtol=5e-2, atol=0)
    assert (swept.smallest >= distance - 1e-5).all()  # nothing nearer than the plane breaks it
    nearer = float(distance.median())
    (budget,) = sweep(model, images, labels, [FAB(name="fab", norm="l2", eps=0.9 * nearer, steps=20)]).budgets
    assert budget.correct >= int((distance > 0.9 * nearer).sum())


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", 1)])
def test_fab_tries_every_target_and_keeps_the_nearest(norm, order):
    """The likeliest other class is far, as its logit hardly changes; the boundary to the third is near."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(16), torch.full((16,), 0.1), torch.linspace(-1, 1, 16)]))
        model[1].bias.copy_(torch.tensor([1.0, -0.3, 0.0]))
    images, labels = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, dtype=torch.long)
    logits = model(images)[0]
    assert logits.argsort(descending=True).tolist() == [0, 1, 2]
    lengths = [(logits[0] - logits[k]) / torch.linalg.vector_norm(model[1].weight[k], ord=order) for k in (1, 2)]
    assert lengths[1] < lengths[0]
    (found,) = sweep(model, images, labels, [FAB(name="fab", norm=norm, eps=4.0, steps=20)]).smallest
    assert float(found) == pytest.approx(float(lengths[1]), rel=5e-2)


def test_noise_has_the_length_that_was_asked_for():
    images = torch.full((50, 1, 8, 8), 0.5)
    labels = torch.zeros(50, dtype=torch.long)
    uniform = UniformNoise(name="u", eps=0.1).perturb(Linear(), images, labels, 0.1) - images
    assert uniform.abs().max() <= 0.1
    assert float(uniform.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)
    gaussian = GaussianNoise(name="g", eps=0.1).perturb(Linear(), images, labels, 0.1) - images
    assert float(gaussian.std()) == pytest.approx(0.1, rel=0.05)
    assert distances(images, images + gaussian, "gaussian").mean() == pytest.approx(0.1, rel=0.05)


def test_gaussian_noise_is_counted_by_its_strength():
    images, labels = grey(*[0.45] * 200)
    result = sweep(Linear().eval(), images, labels, [GaussianNoise(name="g", eps=[0.01, 0.2], restarts=3)])
    assert result.norm == "gaussian"
    assert result.budgets[0].correct == 200  # the mean of 16 pixels moves by a fifth of what would be needed
    # Each draw moves the mean beyond by 0.05 with probability P(z > 1) = 0.16.
    assert 0.45 < result.budgets[1].correct / 200 < 0.73


def test_attacks_share_their_survivors_and_the_worst_case_counts():
    model = network()
    images, labels = labelled(model, 60)
    weak = FGSM(name="weak", eps=[0.02, 0.06])
    strong = PGD(**PGD_OPTIONS | {"name": "strong", "eps": [0.02, 0.04, 0.06], "steps": 20, "step_size": 0.01})
    both = sweep(model, images, labels, [weak, strong])
    assert [[a.attack for a in b.attacks] for b in both.budgets] == [["weak", "strong"], ["strong"], ["weak", "strong"]]
    stood = 60
    for budget in both.budgets:
        for outcome in budget.attacks:
            assert outcome.met == stood
            stood -= outcome.broken
        assert budget.correct == stood
    alone = [sweep(model, images, labels, [attack]) for attack in (weak, strong)]
    for budget in both.budgets:
        for other in alone:
            found = [b.correct for b in other.budgets if b.eps == budget.eps]
            assert all(budget.correct <= correct for correct in found)


def test_the_smallest_change_is_remembered_over_attacks_and_budgets():
    images, labels = grey(0.4, 0.3, 0.05)
    attacks = [
        PGD(**PGD_OPTIONS | {"name": "coarse", "eps": [0.25], "steps": 40}),
        PGD(
            **PGD_OPTIONS
            | {"name": "fine", "eps": [0.11, 0.25], "steps": 200, "step_size": 0.001, "random_start": False}
        ),
    ]
    smallest = sweep(Linear().eval(), images, labels, attacks).smallest
    assert smallest[0] == pytest.approx(0.101, abs=2e-3)
    assert 0.2 < smallest[1] <= 0.25
    assert smallest[2] == torch.inf


class Patient(Attack):
    """Finds nothing in a small ball, and in a large one what lies in the small one."""

    def _library_attack(self, model, eps):
        return lambda images, labels: images + (0.15 if eps > 0.3 else 0.0)


def test_an_example_of_a_larger_budget_counts_in_the_smaller_ball_that_holds_it():
    images, labels = grey(0.4, 0.2)
    attack = Patient(name="patient", norm="linf", eps=[0.1, 0.2, 0.35])
    result = sweep(Linear().eval(), images, labels, [attack])
    assert [budget.correct for budget in result.budgets] == [2, 1, 1]
    alone = sweep(Linear().eval(), images, labels, [attack], independent=True)
    assert [budget.correct for budget in alone.budgets] == [2, 2, 1]


def test_any_attack_of_the_library_serves_by_its_name():
    images, labels = grey(0.4, 0.3, 0.2, 0.6, 0.7, 0.8)
    arguments = {"steps": 40, "alpha": 0.02}
    attack = Library(name="mi", attack="MIFGSM", norm="linf", eps=[0.05, 0.15, 0.25], arguments=arguments)
    assert [budget.correct for budget in sweep(Linear().eval(), images, labels, [attack]).budgets] == [6, 4, 2]
    for wrong, said in (
        ({"attack": "MIFGSN"}, "no attack of that name"),
        ({"attack": "torch"}, "no attack of that name"),
        ({"attack": "AutoAttack"}, "not the reference"),
        ({"arguments": {"stepz": 1}}, "arguments of MIFGSM.*stepz"),
    ):
        with pytest.raises(ValidationError, match=said):
            replace(attack, **wrong)


def test_an_attack_of_the_library_that_seeds_itself_starts_elsewhere_each_time():
    images, labels = grey(0.4, 0.3, 0.2, 0.6, 0.7, 0.8)
    attack = Library(name="s", attack="Square", norm="linf", eps=[0.1], arguments={"n_queries": 1})
    starts = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        starts.append(attack.perturb(Linear().eval(), images, labels, 0.1))
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(starts[1], starts[2])


def test_an_attack_that_cannot_be_is_told_before_the_first_is_made():
    images, labels = grey(0.4, 0.3)
    wrong = PGD(**PGD_OPTIONS | {"name": "wrong", "loss": "dlr"})

    class Untouched(Patient):
        def perturb(self, *_):
            raise AssertionError

    first = Untouched(name="first", norm="linf", eps=[0.1])
    two_classes = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 2)).eval()
    with pytest.raises(UserError, match=r"attack.wrong.loss=dlr needs at least 3 classes, and there are 2"):
        sweep(two_classes, images, labels, [first, wrong])


def test_transferred_examples_follow_the_other_model_and_are_judged_by_this_one():
    model, other = network(), network(seed=0)
    with torch.no_grad():
        other[1].weight += 0.15 * torch.randn(24, 16)
    images, labels = labelled(model, 60)
    attack = Transfer(name="t", norm="linf", eps=0.1, steps=20, step_size=0.02, loss="margin")
    (budget,) = sweep(model, images, labels, [attack], surrogates={"t": [other]}).budgets
    (white,) = sweep(model, images, labels, [PGD(**PGD_OPTIONS | {"steps": 20, "loss": "margin"})]).budgets
    assert white.correct < budget.correct < 60
    assert [o.met for o in sweep(model, images, labels, [attack], surrogates={"t": []}).budgets[0].attacks] == [60]
    assert sweep(model, images, labels, [attack], surrogates={"t": []}).budgets[0].correct == 60


class Interrupted(Exception):
    pass


class Memory:
    """A journal that fails after some saves, and keeps what was saved as a file would."""

    def __init__(self, saves):
        self.saves, self.state = saves, None

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state())
        self.saves -= 1
        if not self.saves:
            raise Interrupted


@pytest.mark.parametrize("saves", [1, 2, 5, 9, 14])
def test_a_resumed_sweep_is_the_same_as_an_uninterrupted_one(saves, tmp_path):
    model = network()
    images, labels = labelled(model, 60)
    attacks = [
        UniformNoise(name="noise", eps=[0.03, 0.08], restarts=2, batch_size=25),
        PGD(**PGD_OPTIONS | {"eps": [0.03, 0.08], "restarts": 2, "batch_size": 20, "steps": 3}),
    ]
    whole = sweep(model, images, labels, attacks, seed=2)
    journal = Memory(saves)
    with pytest.raises(Interrupted):
        sweep(model, images, labels, attacks, seed=2, journal=journal)
    torch.save(journal.state, tmp_path / "state.pt")
    journal.state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = sweep(model, images, labels, attacks, seed=2, journal=journal)
    assert resumed.budgets == whole.budgets
    assert torch.equal(resumed.smallest, whole.smallest)
    for a, b in zip(resumed.examples, whole.examples, strict=True):
        assert torch.equal(a.adversarial, b.adversarial)


def test_attack_standing_goes_on_where_it_was():
    model = network()
    images, labels = labelled(model, 30)
    attack = UniformNoise(name="noise", eps=0.1, restarts=3, batch_size=10)
    whole, parted = torch.ones(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)
    made = [batch.adversarial for batch in attack_standing(model, images, labels, whole, attack, 0.1)]
    first = []
    for batch in attack_standing(model, images, labels, parted, attack, 0.1):
        first.append(batch.adversarial)
        if len(first) == 4:
            break
    rest = [b.adversarial for b in attack_standing(model, images, labels, parted, attack, 0.1, after=batch.position)]
    assert torch.equal(whole, parted)
    assert len(made) == len(first + rest)
    assert all(torch.equal(a, b) for a, b in zip(made, first + rest, strict=True))


def test_a_sweep_is_of_one_norm():
    images, labels = grey(0.4)
    with pytest.raises(ValueError, match="one norm"):
        sweep(Linear().eval(), images, labels, [PGD(**PGD_OPTIONS), PGD(**PGD_OPTIONS | {"norm": "l2"})])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_standard_autoattack_is_the_references_own(whole, request):
    """Where it is shortened, it is so in the reference itself."""
    if not whole:
        request.getfixturevalue("short_autoattack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    images = torch.rand(6, 1, 8, 8)
    labels = model(images).argmax(-1)
    attack = AutoAttack(name="aa", norm="linf", eps=[0.02], parts=None)
    torch.manual_seed(5)
    ours = attack.perturb(model, images, labels, 0.02)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31, ()))
    direct = pyautoattack.AutoAttack(model, eps=0.02, norm="Linf", seed=seed, version="standard")
    theirs, _ = direct.run_standard_evaluation(images, labels, batch_size=6)
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize("parts", [None, ["fab-t"]], ids=["standard", "custom"])
def test_autoattack_has_no_more_targets_than_there_are_other_classes(parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    images = torch.rand(6, 1, 8, 8)
    result = sweep(
        model, images, model(images).argmax(-1), [AutoAttack(name="aa", norm="linf", eps=[1e-4, 0.3], parts=parts)]
    )
    assert result.clean_correct == 6
    assert result.budgets[0].correct > result.budgets[1].correct == 0


L2 = {"name": "pgd_l2", "norm": "l2", "steps": 3, "step_size": 0.5}


def test_an_l2_budget_from_an_linf_one_holds_its_whole_ball():
    attack = PGD(**L2, eps_linf=[0.1, 0.02])
    made = attack.for_images((3, 5, 7))
    assert made.eps == (round(0.1 * 105**0.5, 11), round(0.02 * 105**0.5, 12))
    assert made.for_images((3, 5, 7)) == made
    corner = torch.zeros(1, 3, 5, 7) + 0.1  # of the ℓ∞ ball around a black image
    torch.testing.assert_close(corner.norm().item(), made.eps[0])
    assert PGD(**L2, eps=[0.5]).for_images((3, 5, 7)).eps == (0.5,)


def test_the_budgets_of_linf_are_named_beside_those_of_l2():
    images, labels = torch.full((4, 1, 4, 4), 0.4), torch.zeros(4, dtype=torch.long)
    attack = PGD(**L2, eps=[9.0], eps_linf=[0.05])
    assert [budget.eps for budget in sweep(Linear().eval(), images, labels, [attack]).budgets] == [0.2]
    attack = attack.for_images((1, 4, 4))
    swept = sweep(Linear().eval(), images, labels, [attack])
    model = model_results("m", labels, [swept], [], classes=2, data="given")
    results = results_of([model], [attack], seed=0, device="cpu")
    assert results.attacks["pgd_l2"]["eps_linf"] == [0.05]
    assert results.budget("l2", 0.2) == "0.2 (√n·0.05)"
    assert results.budget("l2", 0.3) == "0.3"
    printed = io.StringIO()
    print_results(results, [], Console(file=printed, width=200))
    assert "ε = 0.2 (√n·0.05)" in printed.getvalue()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({**L2}, "eps is missing"),
        ({**L2, "eps_linf": [-0.1]}, "greater than or equal to 0"),
        ({**L2, "norm": "linf", "eps_linf": [0.1]}, "eps_linf is for attacks in ℓ2, and this one is in linf"),
    ],
)
def test_wrong_budgets_are_refused(options, why):
    with pytest.raises(ValidationError, match=why):
        PGD(**options)

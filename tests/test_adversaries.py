import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from jacobian_robust.adversaries import FGSM, PGD, TRADES, Free, Noise, Steepest
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import Gaussian
from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.models import LeNet
from jacobian_robust.penalties import Frobenius, Margin
from jacobian_robust.training.module import RobustClassifier

PENALTY = Margin(eps=2.0)


def classifier(adversary, penalty=None, *, eta=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 4))
    module = RobustClassifier(model, lambda p: torch.optim.SGD(p, lr=0.1), penalty, adversary=adversary)
    module.eta = eta
    return module.train()


def a_batch(size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 1, 4, 4, generator=generator), torch.arange(size) % 4


def cross_entropy(model, images, labels):
    return nn.functional.cross_entropy(model(images), labels)


BALLS = [
    *(Noise(eps=0.1), Steepest(eps=0.1, samples=2)),
    *(FGSM(eps=0.1), PGD(eps=0.1, steps=5), TRADES(eps=0.1, steps=5, beta=1)),
]


@pytest.mark.parametrize("adversary", BALLS, ids=lambda adversary: type(adversary).__name__)
def test_the_displaced_images_are_in_the_ball_and_in_the_range_and_the_model_is_left_alone(adversary):
    module, (images, labels) = classifier(adversary), a_batch()
    images[0] = 0
    before = copy.deepcopy(module.model.state_dict())
    displaced = adversary.perturb(module.model, images, labels)
    change = (displaced - images).abs()
    assert 0.05 < change.max() <= 0.1 + 1e-6
    assert displaced.min() >= 0
    assert displaced.max() <= 1
    assert not displaced.requires_grad
    assert all(submodule.training for submodule in module.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


def test_an_l2_adversary_stays_in_its_ball():
    module, (images, labels) = classifier(None), a_batch()
    displaced = PGD(eps=0.3, norm="l2", steps=5).perturb(module.model, images, labels)
    lengths = (displaced - images).flatten(1).norm(dim=1)
    assert 0.1 < lengths.max() <= 0.3 + 1e-5


def test_each_adversary_climbs_higher_than_the_weaker_one():
    module, (images, labels) = classifier(None), a_batch(60)
    losses = [
        cross_entropy(module.model, adversary.perturb(module.model, images, labels), labels).item()
        for adversary in (Noise(eps=0.1), FGSM(eps=0.1), PGD(eps=0.1, steps=20))
    ]
    assert cross_entropy(module.model, images, labels).item() + 0.01 < losses[1]
    assert losses[0] < losses[1] <= losses[2] + 1e-4


def test_a_steeper_point_is_found_by_samples_and_a_steeper_one_by_steps():
    module, (images, labels) = classifier(None), a_batch(60)

    def norms(**options):
        torch.manual_seed(0)
        points = Steepest(eps=0.2, probes=None, **options).perturb(module.model, images, labels).requires_grad_()
        return frobenius_norm(module(points), points)

    noise, sampled, climbed = norms(steps=0), norms(steps=0, samples=8), norms(steps=5)
    assert (sampled >= noise).all()
    assert noise.mean() < sampled.mean() < climbed.mean()
    assert (climbed > noise).all()


def test_where_the_norm_has_no_slope_a_point_stays():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    adversary = Steepest(eps=0.1, family=Gaussian(sigma=1.0, tolerance=1.0))
    images, labels = a_batch()
    torch.manual_seed(0)
    moved = adversary.perturb(linear, images, labels)
    torch.manual_seed(0)
    assert torch.equal(moved, Noise(eps=0.1).perturb(linear, images, labels))


def test_fgsm_with_a_random_start_is_its_formula():
    model, (images, labels) = classifier(None).model.eval(), a_batch()
    torch.manual_seed(3)
    displaced = FGSM(eps=0.1).perturb(model, images, labels)
    torch.manual_seed(3)
    start = (images + torch.empty_like(images).uniform_(-0.1, 0.1)).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model, start, labels), start)
    moved = (start.detach() + 0.125 * gradient.sign()).clamp(images - 0.1, images + 0.1).clamp(0, 1)
    torch.testing.assert_close(displaced, moved)


@pytest.mark.parametrize("fit_at", ["clean", "adversary"])
@pytest.mark.parametrize("penalty_at", ["clean", "adversary"])
@pytest.mark.parametrize("penalised", [None, 4])
def test_the_loss_takes_each_part_where_it_is_told(fit_at, penalty_at, penalised):
    adversary = Noise(eps=0.3, fit_at=fit_at, penalty_at=penalty_at)
    module, (images, labels) = classifier(adversary, PENALTY), a_batch()
    torch.manual_seed(3)
    places = {"clean": images, "adversary": adversary.perturb(module.model, images, labels)}
    at = places[penalty_at][:penalised].clone().requires_grad_()
    alpha = PENALTY(module(at), at, labels[:penalised]).mean()
    expected = 0.7 * cross_entropy(module, places[fit_at], labels) + 0.3 * 2 * alpha
    torch.manual_seed(3)
    terms = module.loss_terms((images, labels), weight=2, penalised=penalised, attacked=True)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.logits, module(places[fit_at]))
    parameters = list(module.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (terms.loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_without_an_attack_the_loss_is_that_of_the_clean_images():
    with_adversary, without = classifier(PGD(eps=0.1, steps=3), PENALTY), classifier(None, PENALTY)
    assert torch.equal(with_adversary.loss_terms(a_batch()).loss, without.loss_terms(a_batch()).loss)


def test_trades_is_its_formula_and_without_weight_it_is_plain_training():
    images, labels = a_batch()
    module = classifier(TRADES(eps=0.2, steps=4, beta=3))
    torch.manual_seed(3)
    terms = module.loss_terms((images, labels), attacked=True)
    torch.manual_seed(3)
    displaced = module.adversary.perturb(module.model, images, labels)
    theta, attacked = (module(x).softmax(-1) for x in (images, displaced))
    divergence = (theta * (theta / attacked).log()).sum(-1).mean()
    plain = cross_entropy(module, images, labels)
    assert divergence > 1e-3
    torch.testing.assert_close(terms.loss, plain + 3 * divergence)
    torch.testing.assert_close(terms.cross_entropy, plain)
    none = classifier(TRADES(eps=0.2, steps=4, beta=0)).loss_terms((images, labels), attacked=True)
    torch.testing.assert_close(none.loss, plain)


def test_trades_climbs_the_divergence_and_needs_no_labels():
    module, (images, labels) = classifier(None), a_batch(40)
    clean = module(images).log_softmax(-1).detach()

    def divergence(adversary):
        torch.manual_seed(3)
        displaced = adversary.perturb(module.model, images, labels)
        return nn.functional.kl_div(module(displaced).log_softmax(-1), clean, reduction="batchmean", log_target=True)

    assert divergence(TRADES(eps=0.1, steps=10, beta=1)) > 2 * divergence(Noise(eps=0.1))
    adversary = TRADES(eps=0.1, steps=10, beta=1)
    outcomes = []
    for given in (labels, labels.flip(0)):
        torch.manual_seed(3)
        outcomes.append(adversary.perturb(module.model, images, given))
    assert torch.equal(*outcomes)


def step(module, batch, optimizer):
    batch = module.adversary.next_batch(batch)
    optimizer.zero_grad()
    module.backward(module.loss_terms(batch, attacked=True).loss)
    optimizer.step()
    return batch


@pytest.mark.parametrize("penalty", [None, PENALTY])
def test_free_replays_a_batch_and_moves_weights_and_images_each_time(penalty):
    """Against the loop of the paper's algorithm 1, with a batch of another size in between."""
    batches = [a_batch(6, 1), a_batch(4, 2), a_batch(6, 3)]
    adversary = Free(eps=0.1, replays=3, penalty_at="adversary")
    module = classifier(adversary, penalty)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    theirs = classifier(None, penalty)
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    noise = torch.zeros(6, 1, 4, 4)
    due = iter(batch for batch in batches for _ in range(3))
    weights = [theirs.model[1].weight.clone()]
    for images, labels in batches:
        for _ in range(3):
            # The loader goes on to other batches; those that fall on a replay are not used.
            handed = next(due) if adversary._count % 3 == 0 else a_batch(5, 9)
            if adversary._count % 3:
                next(due)
            used = step(module, handed, optimizer)
            assert torch.equal(used[0], images)
            displaced = (images + noise[: len(images)]).clamp(0, 1).requires_grad_()
            logits = theirs(displaced)
            loss = nn.functional.cross_entropy(logits, labels)
            if penalty is not None:
                loss = 0.7 * loss + 0.3 * penalty(logits, displaced, labels).mean()
            their_optimizer.zero_grad()
            loss.backward()
            their_optimizer.step()
            noise[: len(images)] += 0.1 * displaced.grad.sign()
            noise.clamp_(-0.1, 0.1)
            torch.testing.assert_close(adversary._displacement[: len(noise)], noise)
            weights.append(theirs.model[1].weight.clone())
            torch.testing.assert_close(module.model[1].weight, weights[-1])
    assert len({weight.sum().item() for weight in weights}) == 10
    assert noise.abs().max() == pytest.approx(0.1)


def test_a_free_adversary_goes_on_from_its_state():
    first, batches = classifier(Free(eps=0.1, replays=3)), [a_batch(6, seed) for seed in range(8)]
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    for batch in batches[:4]:
        step(first, batch, optimizer)
    second = classifier(Free(eps=0.1, replays=3))
    second.load_state_dict(first.state_dict())
    second.adversary.load_state_dict(copy.deepcopy(first.adversary.state_dict()))
    other = torch.optim.SGD(second.parameters(), lr=0.1)
    for batch in batches[4:]:
        step(first, batch, optimizer)
        step(second, batch, other)
    assert torch.equal(first.model[1].weight, second.model[1].weight)


def test_a_penalty_at_clean_images_needs_only_their_jacobian():
    """The displaced images of a free adversary keep their own gradient beside it."""
    module = classifier(Free(eps=0.1, replays=2), Frobenius(eps=1.0))
    images, labels = module.adversary.next_batch(a_batch())
    module.backward(module.loss_terms((images, labels), attacked=True).loss)
    assert module.adversary._displacement.abs().min() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("adversary", "options", "message"),
    [
        (PGD, {"eps": 0, "steps": 3}, "greater than 0"),
        (PGD, {"eps": 0.1, "steps": 0}, "greater than 0"),
        (PGD, {"eps": 0.1, "steps": 3, "norm": "l1"}, "'linf' or 'l2'"),
        (FGSM, {"eps": 0.1, "steps": 2}, "steps"),
        (Noise, {"eps": math.inf}, "finite"),
        (TRADES, {"eps": 0.1, "steps": 3, "beta": -1}, "greater than or equal to 0"),
        (TRADES, {"eps": 0.1, "steps": 3, "beta": 1, "fit_at": "adversary"}, "fit_at"),
        (Free, {"eps": 0.1, "replays": 0}, "greater than 0"),
        (Free, {"eps": 0.1, "replays": 2, "fit_at": "clean"}, "fit_at"),
    ],
)
def test_wrong_options_are_refused(adversary, options, message):
    with pytest.raises(ValidationError, match=message):
        adversary(**options)


@pytest.mark.parametrize(
    "adversary", [*BALLS, Free(eps=0.1, replays=2)], ids=lambda adversary: type(adversary).__name__
)
def test_pixels_outside_the_range_are_refused(adversary):
    with pytest.raises(UserError, match=r"needs \[0, 1\]"):
        adversary.perturb(LeNet(), 2 * torch.ones(2, 1, 28, 28), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("adversary", "penalised", "idle"),
    [
        (Noise(eps=0.1), False, False),
        (Noise(eps=0.1, fit_at="clean"), True, True),
        (Noise(eps=0.1, fit_at="clean", penalty_at="adversary"), True, False),
        (Noise(eps=0.1, fit_at="clean", penalty_at="adversary"), False, True),
        (TRADES(eps=0.1, steps=1, beta=1), False, False),
    ],
)
def test_an_adversary_that_changes_nothing_is_idle(adversary, penalised, idle):
    assert adversary.idle(penalised=penalised) == idle

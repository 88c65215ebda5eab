"""Which images an evaluation keeps to be looked at."""

import torch
from torch import nn

from jacobian_robust.attacks import PGD
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.robustness.examples import in_turn, sample_order


def test_the_order_is_random_and_takes_the_classes_in_turn():
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 3)
    order = sample_order(labels, seed=0)
    assert order.sort().values.tolist() == list(range(103))
    in_turn = labels[order.argsort()]
    assert in_turn[:9].tolist() == [0, 1, 2] * 3
    assert in_turn[9:13].tolist() == [0, 1] * 2
    first = order.argsort()[:9]
    assert not torch.equal(first, sample_order(labels, seed=1).argsort()[:9])
    torch.manual_seed(1)
    assert torch.equal(sample_order(labels, seed=0), order)


def test_of_some_images_the_classes_come_in_turn_too():
    """Those that an attack broke are mostly of one class, which an order of all images does not know."""
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 50)
    order = sample_order(labels, seed=0)
    chosen = [*range(40), 60, 61, 149]
    taken = [chosen[place] for place in in_turn(chosen, order=order, labels=labels)]
    assert sorted(taken) == chosen
    assert labels[taken][:6].tolist() == [0, 1, 2, 0, 1, 0]
    of_class = [image for image in taken if image < 40]
    assert of_class == sorted(of_class, key=lambda image: int(order[image]))


class Brightness(nn.Module):
    """Of two classes the second for images brighter than a half."""

    def forward(self, images):
        brightness = 40 * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-brightness, brightness], dim=1)


def test_broken_robust_and_misclassified_images_are_kept_with_their_classes_and_numbers():
    levels = torch.tensor([0.45, 0.55, 0.46, 0.56, 0.1, 0.9, 0.2, 0.8, 0.7, 0.44])
    images = levels[:, None, None, None].expand(-1, 1, 3, 3).contiguous()
    labels = (levels > 0.5).long()
    labels[8] = 0  # which the model gets wrong
    attack = PGD(name="pgd", norm="linf", eps=(0.1,), steps=5, step_size=0.05, batch_size=3)
    result = sweep(Brightness(), images, labels, [attack], examples=4)
    (broken,) = result.examples
    assert set(broken.index.tolist()) <= {0, 1, 2, 3, 9}
    assert len(broken.index) == 4
    assert broken.true_class.tolist() == labels[broken.index].tolist()
    order = sample_order(labels, seed=0)
    chosen = [0, 1, 2, 3, 9]
    assert broken.index.tolist() == [chosen[place] for place in in_turn(chosen, order=order, labels=labels)][:4]
    assert set(result.robust_examples.index.tolist()) == {4, 5, 6, 7}
    assert torch.equal(result.robust_examples.adversarial, result.robust_examples.clean)
    assert result.wrong_examples.index.tolist() == [8]
    assert (result.wrong_examples.true_class.item(), result.wrong_examples.clean_class.item()) == (0, 1)

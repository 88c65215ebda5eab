import math

import torch

from jacobian_robust.models import LeNet


def test_the_double_softmax_returns_the_probabilities_and_bounds_the_loss_from_below():
    torch.manual_seed(0)
    plain = LeNet()
    double = LeNet(double_softmax=True)
    double.load_state_dict(plain.state_dict())
    images = torch.rand(16, 1, 28, 28)
    torch.testing.assert_close(double(images), plain(images).softmax(-1))
    # However the weights are chosen: each output is a probability, and the best is to be certain and right.
    losses = torch.nn.functional.cross_entropy(double(images), torch.arange(16) % 10, reduction="none")
    assert (losses > math.log(1 + 9 / math.e)).all()

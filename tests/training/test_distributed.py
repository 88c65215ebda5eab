"""Two processes with gloo: the penalty's double backward under DistributedDataParallel."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from jacobian_robust.models import LeNet
from jacobian_robust.penalties import Frobenius, Lagrangian, Margin, Penalty, Spectral
from jacobian_robust.training.module import RobustClassifier

PENALTIES = {
    "frobenius": Frobenius(delta_over_eps=1e-3, chart="sphere"),
    "lagrangian": Lagrangian(penalty=Margin(eps=1.0), tolerance=0.1, rate=0.5, damping=2.0),
    "spectral": Spectral(delta_over_eps=1e-3, chart="sphere", columns=2),
}


class Loss(nn.Module):
    """The whole loss in one forward pass, as DistributedDataParallel wants it."""

    def __init__(self, penalty: Penalty) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = RobustClassifier(LeNet(image_size=8), lambda p: torch.optim.SGD(p, lr=0.1), penalty)
        self.classifier.eta = 0.2

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.classifier.loss_terms((images, labels)).loss


def a_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 0, 2, 1, 1])


def one_of_two(rank: int, directory: Path, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    loss = Loss(PENALTIES[name])
    images, labels = a_batch()
    wrapped = DistributedDataParallel(loss)
    wrapped(images[rank::2], labels[rank::2]).backward()
    torch.save([parameter.grad for parameter in loss.parameters()], directory / f"gradients{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # end_to_end/test_devices.py has torchrun in the ordinary run
@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_of_two_processes_are_those_of_one_on_the_same_batch(tmp_path, name):
    spawn(one_of_two, (tmp_path, name), nprocs=2)
    loss = Loss(PENALTIES[name])
    loss(*a_batch()).backward()
    both = [torch.load(tmp_path / f"gradients{rank}.pt") for rank in range(2)]
    for first, second, parameter in zip(*both, loss.parameters(), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, parameter.grad, rtol=1e-4, atol=1e-6)

"""A penalty in a plain PyTorch loop, and a constraint whose weight is learned."""

import torch
from torch import nn

from jacobian_robust.penalties import Lagrangian, LinearMargin, Margin, Penalty

generator = torch.Generator().manual_seed(0)
images = torch.rand(256, 1, 8, 8, generator=generator)
labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long()


def train(penalty: Penalty, weight: float, steps: int = 60) -> float:
    """Return the mean penalty after training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    value = torch.zeros(())
    for _ in range(steps):
        inputs = images.clone().requires_grad_()  # the penalty differentiates the logits with respect to them
        logits = model(inputs)
        value = penalty(logits, inputs, labels, generator=generator).mean()
        loss = nn.functional.cross_entropy(logits, labels) + weight * value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalty.step()  # multipliers climb; other penalties have no state
    return value.item()


margin = LinearMargin(eps=0.05, norm="linf")
print(f"mean penalty without it in the loss {train(margin, 0.0):.3f}, with it {train(margin, 1.0):.3f}")
constraint = Lagrangian(penalty=Margin(eps=0.5), tolerance=0.1, rate=0.1, damping=1.0)
train(constraint, 1.0)
print(f"learned mean multiplier {constraint.multiplier:.3f}")

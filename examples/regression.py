"""The norm and a penalty of a regression network in a plain loop: where does a bright bar stand in an image?"""

import torch
from torch import Tensor, nn

import jacobian_robust as jr

TOLERANCE, EPS = 1.0, 0.05  # pixels that a prediction may be off; ℓ∞ radius of the ball, in grey values
family = jr.Gaussian(sigma=0.5, tolerance=TOLERANCE)


def bars(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy images 8×16 and the positions of their bars, in pixels."""
    generator = torch.Generator().manual_seed(seed)
    places = 2 + 11 * torch.rand(number, 1, generator=generator)
    bar = (-(torch.arange(16) - places).square() / 2).exp()
    noise = 0.3 * torch.rand(number, 8, 16, generator=generator)
    return (0.5 * bar[:, None] + noise).clamp(0, 1), places


def train(penalty: jr.Penalty | None, weight: float = 0.5, steps: int = 400) -> nn.Module:
    """Return a network that minimises the family's loss and the penalty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))
    nn.init.constant_(model[-1].bias, 7.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        images, places = bars(64, seed=step)
        inputs = images.requires_grad_()
        outputs = model(inputs)  # the means; any shape will do
        loss = family.loss(outputs, places)
        if penalty is not None:
            loss = (1 - weight) * loss + weight * penalty(outputs, inputs, places).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


for name, penalty in (("plain", None), ("penalised", jr.LinearMargin(eps=EPS, norm="linf", family=family))):
    model = train(penalty)
    images, places = bars(500, seed=10**6)
    inputs = images.requires_grad_()
    outputs = model(inputs)
    norm = jr.frobenius_norm(outputs, inputs, family=family, probes=1)  # one product, however many outputs
    right = family.right(outputs, places)
    # One step against the loss: a lower bound of what an attack does.
    (gradient,) = torch.autograd.grad(family.loss(outputs, places), inputs)
    attacked = (inputs + EPS * gradient.sign()).clamp(0, 1)
    robust = right & family.right(model(attacked), places)
    print(f"{name}: norm {norm.mean():.3f}, within {right.float().mean():.3f}, attacked {robust.float().mean():.3f}")

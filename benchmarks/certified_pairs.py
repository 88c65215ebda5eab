"""Whether attacks break certified images: ``python benchmarks/certified_pairs.py RUN``, a network trained to certify.

A pair is an image that a certificate covers at a budget and one start of projected gradient ascent in that ball: of
``--steps`` steps of the sign (ℓ∞) or of the direction (ℓ2) of the margin's gradient. It is broken if the image is
misclassified at any of the iterates, in the network's own precision.
"""

import argparse

import torch
from torch import Tensor, nn

from jacobian_robust.checkpoints import find_checkpoints, load_checkpoint
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.robustness.certificates import IntervalBounds, Lipschitz, certify


def move(images: Tensor, points: Tensor, step: Tensor, eps: Tensor, norm: str) -> Tensor:
    """Return the points after a step, projected to the balls and to [0, 1]."""
    if norm == "linf":
        change = (points + step * eps - images).clamp(-eps, eps)
    else:
        length = lambda x: x.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)  # noqa: E731
        change = points + eps * step / length(step) - images
        change = change * (eps / length(change)).clamp_max(1)
    return (images + change).clamp(0, 1)


def broken(model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, norm: str, steps: int) -> Tensor:
    """Return which images one start breaks at any of its iterates."""
    radius = eps.view(-1, 1, 1, 1)
    start = 2 * torch.rand_like(images) - 1 if norm == "linf" else torch.randn_like(images)
    points, found = move(images, images, start, radius, norm), torch.zeros_like(labels, dtype=torch.bool)
    for index in range(steps + 1):
        points.requires_grad_()
        logits = model(points)
        found |= logits.argmax(-1) != labels
        if index == steps:
            break
        own = nn.functional.one_hot(labels, logits.shape[-1]).bool()
        margin = logits.masked_fill(own, -torch.inf).amax(-1) - logits[own]
        (gradient,) = torch.autograd.grad(margin.sum(), points)
        step = 2.5 / steps * (gradient.sign() if norm == "linf" else gradient)
        points = move(images, points.detach(), step, radius, norm).detach()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a run directory or a file")
    parser.add_argument(
        "--eps", type=float, nargs="+", default=[0.02, 0.04, 0.06, 0.08, 0.1], help="of interval bounds"
    )
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    checkpoint = load_checkpoint(find_checkpoints([arguments.checkpoint])[0])
    model, datamodule = checkpoint.model(), checkpoint.datamodule()
    datamodule.prepare_data()
    datamodule.setup("test")
    images, labels = datamodule.split("test").first(arguments.images)
    interval = certify(model, images, labels, IntervalBounds(name="interval"), arguments.eps).bounded
    lipschitz = certify(model, images, labels, Lipschitz(name="lipschitz"), [0.0]).bounded
    cases = [
        ("interval", "linf", interval.certified[:, i], torch.full((len(labels),), eps))
        for i, eps in enumerate(sorted(arguments.eps))
    ]
    cases.append(("lipschitz, at its own radius", "l2", lipschitz.radius > 0, lipschitz.radius.float() * (1 - 1e-4)))
    tried, lost = 0, 0
    for name, norm, covered, eps in cases:
        chosen = covered.nonzero().flatten()
        count = 0
        for _ in range(arguments.starts):
            for part in chosen.split(500):
                count += int(broken(model, images[part], labels[part], eps[part], norm, arguments.steps).sum())
        pairs = arguments.starts * len(chosen)
        print(f"{name}, {norm} {eps[chosen].median():.3g}: {pairs} pairs, {count} broken", flush=True)
        tried, lost = tried + pairs, lost + count
    print(f"{tried} pairs tried, {lost} broken")


if __name__ == "__main__":
    main()

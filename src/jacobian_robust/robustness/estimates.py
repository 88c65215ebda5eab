"""Estimates of the distance to the nearest ℓ2 adversarial example by the geometry at a few points, not promises."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobian_robust.geometry import distance_to_boundary, fisher_rao_distance
from jacobian_robust.jacobian import jacobian_norms, worst_direction

__all__ = ["ESTIMATES", "Prediction", "linearised_radius", "path_radius", "sampled_radius"]

Prediction = Literal["first_order", "path", "sampled", "linearised"]
"""How the distance to the nearest adversarial example is estimated."""


def linearised_radius(
    model: nn.Module, images: Float[Tensor, "images *shape"], *, steps: int = 3
) -> Float[Tensor, "images"]:
    """Return the ℓ2 distance, within [0, 1], to the decision boundary of the logits linearised near it.

    A linear model of ``μ`` fails at a confident prediction, where ``μ`` is nearly constant. The logits are the natural
    parameters of the output's family, in which the boundary between two classes is a hyperplane. The first step
    linearises them at the image; each further one at the nearest point of the last step's boundary. The cost is a
    forward and ``classes`` backward passes a step. Infinite where no class's boundary meets the box.

    Raises:
        ValueError: if ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"prediction: steps must be positive, not {steps}")
    at, radius = images, images.new_full((len(images),), torch.inf)
    own: Tensor | None = None
    for _ in range(steps):
        logits, slopes = _logits_and_slopes(model, at)
        own = logits.argmax(-1) if own is None else own
        rows = torch.arange(len(images), device=images.device)
        slopes = slopes - slopes[rows, own][:, None]
        flat = images.flatten(1)
        # How much s_j − s_y, linearised at `at`, is below 0 at the image.
        needed = logits[rows, own][:, None] - logits + (slopes @ (at - images).flatten(1)[..., None]).squeeze(-1)
        moved, lengths = _nearest_in_box(flat, slopes, needed)
        lengths[rows, own] = torch.inf
        nearest = lengths.min(-1)
        found = nearest.values.isfinite()
        radius = torch.where(found, nearest.values, radius)
        at = torch.where(found[:, None], moved[rows, nearest.indices], flat).view_as(images)
    return radius


def _logits_and_slopes(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and their Jacobian, (images, classes, inputs), without a graph."""
    inputs = images.clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        logits = model(inputs)
        slopes = [torch.autograd.grad(column.sum(), inputs, retain_graph=True)[0] for column in logits.unbind(-1)]
    return logits.detach(), torch.stack([slope.flatten(1) for slope in slopes], 1)


def _nearest_in_box(point: Tensor, normals: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points of [0, 1] nearest to a point with ``normal · (x − point) ≥ needed``, and their distances.

    The nearest is ``clip(point + λ normal)`` (Karush–Kuhn–Tucker); bisection finds the least ``λ``.
    """
    start = point[:, None]

    def gained(multiplier: Tensor) -> tuple[Tensor, Tensor]:
        moved = (start + multiplier[..., None] * normals).clamp(0, 1)
        return moved, (normals * (moved - start)).sum(-1)

    low = torch.zeros_like(needed)
    high = needed.clamp_min(0) / normals.square().sum(-1).clamp_min(torch.finfo(needed.dtype).tiny)
    for _ in range(20):  # each image's own multiplier, from that without a box
        high = torch.where(gained(high)[1] < needed, 2 * high, high)
    reachable = gained(high)[1] >= needed
    for _ in range(25):
        middle = (low + high) / 2
        enough = gained(middle)[1] >= needed
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    moved, _ = gained(high)
    return moved, torch.where(reachable, (moved - start).norm(dim=-1), torch.inf)


def path_radius(
    model: nn.Module, images: Float[Tensor, "images *shape"], *, step: float = 0.25, steps: int = 24
) -> Float[Tensor, "images"]:
    """Return the ℓ2 length of the steepest path, within [0, 1], whose Fisher–Rao length reaches ``d_B``.

    From the image the path follows the top right singular vector of ``J_μ``, turned each time so that ``d_B`` falls,
    ``step`` at a time; its Fisher–Rao length is the sum of the distances between its predictions. The last step is
    interpolated. A step costs a forward and ``classes`` backward passes. Infinite where ``steps`` do not suffice.
    """
    at, gone = images, images.new_zeros(len(images), dtype=torch.float64)
    radius = images.new_full((len(images),), torch.inf)
    goal: Tensor | None = None
    shape = (-1, *[1] * (images.dim() - 1))
    for number in range(steps):
        inputs = at.clone().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            logits = model(inputs)
            direction = worst_direction(logits, inputs)
            top = logits.topk(2).values
            (slope,) = torch.autograd.grad((top[:, 1] - top[:, 0]).sum(), inputs)
        theta = logits.detach().double().softmax(-1)
        if goal is None:
            goal = distance_to_boundary(theta)
        downhill = (direction * slope).flatten(1).sum(-1).sign()
        at = (at + step * downhill.view(shape) * direction).clamp(0, 1)
        with torch.no_grad():
            after = model(at).double().softmax(-1)
        length = fisher_rao_distance(theta, after)
        share = ((goal - gone) / length.clamp_min(1e-300)).clamp(0, 1)
        arrived = (gone + length >= goal) & radius.isinf()
        radius = torch.where(arrived, (step * (number + share)).to(radius), radius)
        gone = gone + length
        if bool(radius.isfinite().all()):
            break
    return radius


RADII = [0.1 * 1.3**k for k in range(17)]
"""The radii at which :func:`sampled_radius` looks, in units of the inputs: 0.1 to 6.7."""


def sampled_radius(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    *,
    points: int = 4,
    radii: Sequence[float] = RADII,
    seed: int = 0,
) -> Float[Tensor, "images"]:
    """Return the largest ``r`` of ``radii`` with ``r · max ‖J_μ‖₂ ≤ d_B``, the maximum over points of the ball.

    CLEVER (Weng et al., 2018) in the Fisher metric. The points on each sphere are ``points`` random ones, of which no
    direction leads to the boundary, and the one along the steepest descent of the logits' margin. Each costs a forward
    and ``classes`` backward passes. 0 where the smallest radius is too long already.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    logits, slopes = _logits_and_slopes(model, images)
    first = logits.topk(2).indices
    rows = torch.arange(len(images), device=images.device)
    descent = slopes[rows, first[:, 1]] - slopes[rows, first[:, 0]]
    goal = distance_to_boundary(logits.double().softmax(-1))
    steepest = goal.new_zeros(len(images))
    radius, standing = images.new_zeros(len(images)), torch.ones_like(first[:, 0], dtype=torch.bool)
    for length in radii:
        for number in range(points + 1):
            noise = torch.randn(descent.shape, generator=generator, device=images.device, dtype=images.dtype)
            direction = nn.functional.normalize(descent if number == 0 else noise, dim=-1)
            at = (images + length * direction.view_as(images)).clamp(0, 1).requires_grad_()
            with torch.inference_mode(False), torch.enable_grad():
                steepest = torch.maximum(steepest, jacobian_norms(model(at), at)[1].detach().double())
        standing &= length * steepest <= goal
        radius = torch.where(standing, length, radius)
        if not bool(standing.any()):
            break
    return radius


ESTIMATES: dict[Prediction, Callable[[nn.Module, Tensor], Tensor]] = {
    "path": path_radius,
    "sampled": sampled_radius,
    "linearised": linearised_radius,
}
"""By name; ``first_order`` is ``Radii``'s own."""

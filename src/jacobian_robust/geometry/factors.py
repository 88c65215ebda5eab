"""The Fisher factor: the derivative of ``μ = 2√softmax(s)`` with respect to the logits ``s``, as a linear operator.

For probabilities ``θ`` the Fisher metric in the logits is ``Σ = diag(θ) - θθᵀ`` (method: ``J_μᵀ J_μ = J_sᵀ Σ J_s``).
``L = diag(√θ) - θ√θᵀ`` is a factor of it, ``L Lᵀ = Σ``, and ``Lᵀ J_s = J_μ``: its columns belong to the coordinates of
the sphere embedding ``μ``. The sphere's normal at ``μ`` is ``√θ``, and ``L √θ = 0``. An orthonormal basis of the
remaining ``classes - 1`` tangent directions therefore gives the whole norm.

A good basis puts the likeliest classes first. Its first direction is ``√q e_k - √θ_k √c``: the likeliest class ``k``
against all others, with ``q = 1 - θ_k`` and ``c`` the distribution of the other classes given not ``k``. The same
split of the rest gives the next direction. The columns ``L w`` of this basis are those of the closed-form Cholesky
factor of a multinomial covariance (Tanabe & Sagae, JRSS B 54, 1992).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from jacobian_robust.randomness import drawn

__all__ = ["FisherFactor", "random_signs", "tangent_directions"]


class FisherFactor:
    """``L = diag(√θ) - θ√θᵀ`` for each sample, with ``L Lᵀ = diag(θ) - θθᵀ``, in ``O(classes)`` memory.

    Only ``√θ = exp(log_softmax(s)/2)`` is formed, so nothing overflows and nothing is divided. A class whose logit is
    ``-inf`` contributes nothing.

    Args:
        logits: ``(batch, classes)``; half precision is computed in float32.
        dim: the axis of the classes. Of pixels they come first: with the last one the softmax would take 20 times as
            long, since PyTorch goes through its short rows one by one.
    """

    def __init__(self, logits: Float[Tensor, "batch *shape"], dim: int = -1) -> None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        self.dim = dim
        self.root = (logits.log_softmax(dim, dtype=dtype) / 2).exp()
        """``√θ``, differentiable with respect to the logits."""

    def __matmul__(self, w: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
        """Return ``L w``, one vector a sample: what to multiply the logits' Jacobian with from the left."""
        return self.root * (w - self.root * (self.root * w).sum(self.dim, keepdim=True))

    def transposed(self, v: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return ``Lᵀ v``, one vector a sample."""
        return self.root * (v - (self.root.square() * v).sum(self.dim, keepdim=True))


def tangent_directions(
    logits: Float[Tensor, "batch *shape"], size: int, signs: Float[Tensor, "batch *shape"] | None = None, dim: int = -1
) -> list[Float[Tensor, "batch *shape"]]:
    """Return orthonormal tangent directions at ``√θ`` of the likeliest classes, and a random one of the rest.

    They are constants, and the derivative of ``Σ_w ‖(L w)ᵀ J_s‖²`` is right all the same: for a basis of the tangent
    space at ``√θ₀`` the sum differs from ``tr(J_sᵀ L Lᵀ J_s)`` by ``‖(L √θ₀)ᵀ J_s‖²``. That is zero at ``θ₀``, and so
    is its first derivative, since ``L √θ₀`` is zero there.

    Args:
        logits: the point; no graph is made.
        size: number of directions, from 0 to ``classes - 1``. All of them are a basis.
        signs: independent signs ``±1``. With them one more direction follows, the projection of the signs onto the
            tangent directions that are left. It has the mean square of that projection: the estimate is unbiased. With
            ``size=0`` that is everything but for the first direction, which gets a sign of its own: variance is
            smallest there.
        dim: the axis of the classes; the logits are ``(batch, classes)`` with the last one.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.detach().log_softmax(dim, dtype=dtype)
    directions: list[Tensor] = []
    first = 1 if size == 0 and signs is not None else 0
    for _ in range(size + first):
        top, likeliest = log_p.max(dim, keepdim=True)
        rest = log_p.scatter(dim, likeliest, -torch.inf)
        log_q = rest.logsumexp(dim, keepdim=True)
        # A rest without probability has no distribution: its classes are left out.
        log_p = (rest - log_q).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        direction = -((top + log_p) / 2).exp()
        directions.append(direction.scatter(dim, likeliest, (log_q / 2).exp()))
    if signs is None:
        return directions
    root = (log_p / 2).exp()
    signs = signs.to(dtype)
    left = (signs * root.sign()) - root * (root * signs).sum(dim, keepdim=True)
    if first:
        left = left + directions.pop() * signs.gather(dim, likeliest)
    return [*directions, left]


def random_signs(
    samples: int,
    columns: int,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
) -> Float[Tensor, "batch columns"]:
    """Return independent, equally likely ``±1.0``, drawn on the generator's device (the CPU by default).

    Args:
        samples: rows.
        columns: signs of a row.
        generator: source of the signs; by default torch's global one.
        device: to which they are brought; where they are drawn by default.
    """
    place = generator.device if generator is not None else None
    bits = drawn(lambda: torch.randint(0, 2, (samples, columns), generator=generator, device=place), generator)
    return bits.to(device).mul_(2).sub_(1).float()

"""Frobenius norms of the input–output Jacobian of a classifier, in the Fisher metric of its prediction.

For logits ``s(x)`` and probabilities ``θ = softmax(s)`` the sphere embedding is ``μ = 2√θ``. The pull-back of the
Fisher metric to the input is ``G = J_μᵀ J_μ = J_sᵀ (diag(θ) - θθᵀ) J_s``. Only vector–Jacobian products of
the logits are needed, and nothing is divided by ``√θ``: see :mod:`jacobian_robust.jacobian.factors`.

The functions need only the logits and the inputs they were computed from::

    inputs.requires_grad_()
    logits = model(inputs)
    norm = frobenius_norm(logits, inputs, create_graph=True)  # (batch,)

The samples of a batch must not influence each other (batch normalisation in training mode couples them).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from jacobian_robust.jacobian.factors import FisherFactor, random_signs, tangent_directions
from jacobian_robust.jacobian.products import check_graph, finite_part, leading_rows, vjps

__all__ = ["frobenius_norm", "gram_matrix", "jacobian_norms"]


def frobenius_norm(
    logits: Float[Tensor, "batch classes"],
    inputs: Float[Tensor, "batch *shape"],
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    batched: bool | None = None,
) -> Float[Tensor, "batch"]:
    """Return ``‖J_μ‖_F`` of each sample, exactly or estimated with a few random probes.

    ``J_μ`` is the Jacobian of ``2·√softmax(logits)`` with respect to the inputs; its Frobenius norm is ``ρ`` times that
    of the note's ``J̃`` (eq. 13). The exact norm takes ``classes - 1`` vector–Jacobian products. With ``probes=K`` it
    takes ``K``: ``K - 1`` exact ones, for the likeliest classes, and one in a random direction of the rest. The square
    is an unbiased estimate of ``‖J_μ‖_F²``, and its gradient is unbiased, too.

    Args:
        logits: the model's outputs before the softmax, with a graph to ``inputs``, which is kept.
        inputs: what the model was given, with ``requires_grad`` set before the forward pass.
        probes: number of vector–Jacobian products, at least 1; ``None``, or ``classes - 1`` and more, is exact.
        generator: source of the random signs; by default torch's global one.
        create_graph: make the norm differentiable with respect to the model's parameters.
        batched: take all products in one batched pass, by ``torch.vmap``'s rules for the model's layers; ``None`` does
            so on a GPU, where single ones of a small batch are bound by kernel launches, if the layers allow it.

    Raises:
        ValueError: if ``probes`` is below 1, the shapes do not match, or the logits do not depend on the inputs.
    """
    check_graph(logits, inputs)
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact norm, not {probes}")
    columns = logits.shape[-1] - 1
    if probes is None or probes >= columns:
        directions = tangent_directions(logits, columns)
    else:
        signs = random_signs(len(logits), columns + 1, generator, device=logits.device)
        directions = tangent_directions(logits, probes - 1, signs)
    factor = FisherFactor(logits if create_graph else logits.detach())
    vectors = [factor @ direction for direction in directions]
    products = vjps(logits, inputs, vectors, create_graph=create_graph, batched=batched)
    if create_graph:
        rows = list(products)
        return torch.linalg.vector_norm(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0], dim=-1)
    rows = [torch.linalg.vector_norm(row, dim=-1) for row in products]  # none of which is kept
    return torch.linalg.vector_norm(torch.stack(rows), dim=0)


def gram_matrix(
    logits: Float[Tensor, "batch classes"],
    inputs: Float[Tensor, "batch *shape"],
    *,
    create_graph: bool = False,
    batched: bool | None = None,
) -> Float[Tensor, "batch m m"]:
    """Return ``Wᵀ J_μ J_μᵀ W`` of each sample, with an orthonormal basis ``W`` of the sphere's tangent space.

    Its eigenvalues are the squared singular values of ``J_μ``. ``J_μ J_μᵀ`` has one more, which is zero: ``μ`` stays
    on its sphere. It takes ``m = classes - 1`` vector–Jacobian products.

    Args:
        logits: the model's outputs before the softmax, with a graph to ``inputs``, which is kept.
        inputs: what the model was given, with ``requires_grad`` set before the forward pass.
        create_graph: make the matrix differentiable with respect to the model's parameters.
        batched: as in :func:`frobenius_norm`.

    Raises:
        ValueError: if the shapes do not match, or the logits do not depend on the inputs.
    """
    check_graph(logits, inputs)
    factor = FisherFactor(logits if create_graph else logits.detach())
    directions = tangent_directions(logits, logits.shape[-1] - 1)
    rows = leading_rows(logits, inputs, factor, directions, create_graph=create_graph, batched=batched)
    return rows @ rows.mT


def jacobian_norms(
    logits: Float[Tensor, "batch classes"], inputs: Float[Tensor, "batch *shape"]
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Return ``‖J_μ‖_F`` and ``‖J_μ‖₂`` of each sample, exact and without a graph, for the price of one of them.

    Raises:
        ValueError: if the shapes do not match or the logits do not depend on the inputs.
    """
    gram, unusable = finite_part(gram_matrix(logits, inputs))
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
    return eigenvalues.sum(-1).sqrt() + unusable, eigenvalues[:, -1].sqrt() + unusable

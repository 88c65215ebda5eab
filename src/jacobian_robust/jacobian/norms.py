"""Frobenius norms of the input–output Jacobian, in the Fisher metric of the prediction.

For logits ``s(x)`` and probabilities ``θ = softmax(s)`` the sphere embedding is ``μ = 2√θ``. The pull-back of the
Fisher metric to the input is ``G = J_μᵀ J_μ = J_sᵀ (diag(θ) - θθᵀ) J_s``. Only vector–Jacobian products of
the logits are needed, and nothing is divided by ``√θ``: see :mod:`jacobian_robust.geometry.factors`.

The functions need only the logits and the inputs they were computed from::

    inputs.requires_grad_()
    logits = model(inputs)
    norm = frobenius_norm(logits, inputs, create_graph=True)  # (batch,)

With a ``family`` the outputs are the parameters ``s`` of another distribution than the categorical one, in any shape
that the family takes (:mod:`jacobian_robust.geometry.families`), and the norms are those of ``Lᵀ J_s`` with
``L Lᵀ = I(s)``, its Fisher metric::

    norm = frobenius_norm(model(inputs), inputs, probes=1, family=Gaussian(sigma=5.0, tolerance=10.0))

The samples of a batch must not influence each other (batch normalisation in training mode couples them).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from jacobian_robust.geometry.factors import random_signs
from jacobian_robust.geometry.families import CATEGORICAL, Family, flat
from jacobian_robust.jacobian.products import check_graph, finite_part, leading_rows, vjps

__all__ = ["frobenius_norm", "gram_matrix", "jacobian_norms"]


def frobenius_norm(
    logits: Float[Tensor, "batch *outputs"],
    inputs: Float[Tensor, "batch *shape"],
    *,
    family: Family = CATEGORICAL,
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

    Of another family ``J_μ`` is ``Lᵀ J_s``. The exact norm takes :meth:`Family.rank` products, as many as there are
    outputs or nearly, a probe one, whatever their number.

    Args:
        logits: the model's outputs before the softmax, with a graph to ``inputs``, which is kept; or the parameters of
            the family.
        inputs: what the model was given, with ``requires_grad`` set before the forward pass.
        family: of the distribution that the outputs describe.
        probes: number of vector–Jacobian products, at least 1; ``None``, or ``classes - 1`` and more, is exact.
        generator: source of the random signs; by default torch's global one.
        create_graph: make the norm differentiable with respect to the model's parameters.
        batched: take all products in one batched pass, by ``torch.vmap``'s rules for the model's layers; ``None`` does
            so on a GPU, where single ones of a small batch are bound by kernel launches, if the layers allow it.

    Raises:
        ValueError: if ``probes`` is below 1, the shapes do not match, or the logits do not depend on the inputs.
    """
    check_graph(logits, inputs, family)
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact norm, not {probes}")
    rank, outputs = family.rank(logits), flat(logits)
    if probes is None or probes >= rank:
        directions = family.directions(logits, rank)
    else:
        signs = random_signs(len(outputs), outputs.shape[1], generator, device=logits.device)
        directions = family.probes(logits, probes, signs)
    factor = family.factor(logits if create_graph else logits.detach())
    vectors = (factor @ direction for direction in directions)
    products = vjps(outputs, inputs, vectors, create_graph=create_graph, batched=batched)
    if create_graph:
        rows = list(products)
        return torch.linalg.vector_norm(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0], dim=-1)
    rows = [torch.linalg.vector_norm(row, dim=-1) for row in products]  # none of which is kept
    return torch.linalg.vector_norm(torch.stack(rows), dim=0)


def gram_matrix(
    logits: Float[Tensor, "batch *outputs"],
    inputs: Float[Tensor, "batch *shape"],
    *,
    family: Family = CATEGORICAL,
    create_graph: bool = False,
    batched: bool | None = None,
) -> Float[Tensor, "batch m m"]:
    """Return ``Wᵀ J_μ J_μᵀ W`` of each sample, with an orthonormal basis ``W`` of the sphere's tangent space.

    Its eigenvalues are the squared singular values of ``J_μ``. ``J_μ J_μᵀ`` has one more, which is zero: ``μ`` stays
    on its sphere. It takes ``m = classes - 1`` vector–Jacobian products, of another family :meth:`Family.rank`.

    Args:
        logits: the model's outputs before the softmax, with a graph to ``inputs``, which is kept; or the parameters of
            the family.
        inputs: what the model was given, with ``requires_grad`` set before the forward pass.
        family: of the distribution that the outputs describe.
        create_graph: make the matrix differentiable with respect to the model's parameters.
        batched: as in :func:`frobenius_norm`.

    Raises:
        ValueError: if the shapes do not match, or the logits do not depend on the inputs.
    """
    check_graph(logits, inputs, family)
    factor = family.factor(logits if create_graph else logits.detach())
    directions = family.directions(logits, family.rank(logits))
    rows = leading_rows(flat(logits), inputs, factor, directions, create_graph=create_graph, batched=batched)
    return rows @ rows.mT


def jacobian_norms(
    logits: Float[Tensor, "batch *outputs"], inputs: Float[Tensor, "batch *shape"], *, family: Family = CATEGORICAL
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Return ``‖J_μ‖_F`` and ``‖J_μ‖₂`` of each sample, exact and without a graph, for the price of one of them.

    Raises:
        ValueError: if the shapes do not match or the logits do not depend on the inputs.
    """
    gram, unusable = finite_part(gram_matrix(logits, inputs, family=family))
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
    return eigenvalues.sum(-1).sqrt() + unusable, eigenvalues[:, -1].sqrt() + unusable

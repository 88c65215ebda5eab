"""Vector–Jacobian and Jacobian–vector products of a model's outputs, one vector a sample."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from jacobian_robust.geometry.families import CATEGORICAL, Factor, Family

__all__ = ["check_graph", "finite_part", "jvp_of", "leading_rows", "vjp", "vjps"]


_TOGETHER = 1024
"""So many products in one batched pass, at most."""


def check_graph(logits: Tensor, inputs: Tensor, family: Family = CATEGORICAL) -> None:
    """Raise a ValueError unless outputs that fit the family can be differentiated by inputs ``(batch, …)``."""
    if not family.fits(logits) or logits.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"expected {family.expects} of inputs (batch, …), "
            f"got shapes {tuple(logits.shape)} and {tuple(inputs.shape)}"
        )
    if not (inputs.requires_grad and logits.requires_grad):
        raise ValueError("the logits carry no graph to the inputs: call inputs.requires_grad_() before the model")


def vjp(logits: Tensor, inputs: Tensor, v: Tensor, *, create_graph: bool) -> Float[Tensor, "batch inputs"]:
    """Return ``vᵀ J_s`` for each sample, flattened, in at least float32."""
    (product,) = torch.autograd.grad(
        logits, inputs, v.to(logits.dtype), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    if product is None:
        raise ValueError("the logits do not depend on the inputs: differentiate with respect to what the model was fed")
    return product.flatten(1).to(v.dtype)


def vjps(
    logits: Tensor, inputs: Tensor, vectors: Iterable[Tensor], *, create_graph: bool, batched: bool | None
) -> Iterator[Float[Tensor, "batch inputs"]]:
    """Yield ``vᵀ J_s`` for each vector; one at a time they need the least memory, all at once the fewest kernels."""
    left = iter(vectors)
    together = batched or (batched is None and logits.is_cuda)
    while chunk := list(itertools.islice(left, _TOGETHER if together else 1)):
        products = None
        if together and (batched or len(chunk) > 1):
            try:
                (products,) = torch.autograd.grad(
                    logits,
                    inputs,
                    torch.stack(chunk).to(logits.dtype),
                    create_graph=create_graph,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            except RuntimeError:  # a layer without a rule for batches, or too little memory for them
                if batched:
                    raise
                together = False
        if products is not None:
            yield from products.flatten(2).to(chunk[0].dtype).unbind()
        else:
            yield from (vjp(logits, inputs, v, create_graph=create_graph) for v in chunk)


def leading_rows(
    logits: Tensor,
    inputs: Tensor,
    factor: Factor,
    directions: Iterable[Tensor],
    *,
    create_graph: bool = False,
    batched: bool | None = None,
) -> Float[Tensor, "batch size inputs"]:
    """Return the rows ``wᵀ J_μ`` of some directions."""
    vectors = (factor @ direction for direction in directions)
    return torch.stack(list(vjps(logits, inputs, vectors, create_graph=create_graph, batched=batched)), dim=1)


def jvp_of(logits: Tensor, inputs: Tensor) -> Callable[[Tensor], Float[Tensor, "batch classes"]]:
    """Return a function that maps ``g`` to ``J_s g``: the derivative of ``uᵀ J_s g`` with respect to ``u``."""
    u = torch.zeros_like(logits, requires_grad=True)
    (product,) = torch.autograd.grad(logits, inputs, u, create_graph=True)

    def jvp(g: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(product, u, g.view_as(product).to(product.dtype), retain_graph=True)
        return result.to(g.dtype)

    return jvp


def finite_part(gram: Float[Tensor, "batch n n"]) -> tuple[Float[Tensor, "batch n n"], Float[Tensor, "batch"]]:
    """Return the matrices fit for an eigenvalue solver, which raises an error for the whole batch if one is not finite.

    Also returns what to add to a sample's norm: 0, or nan where its matrix was not finite and is replaced by zeros.
    """
    finite = gram.isfinite().all(-1).all(-1)
    unusable = torch.zeros_like(gram[:, 0, 0]).masked_fill(~finite, torch.nan)
    return torch.where(finite[:, None, None], gram, 0), unusable

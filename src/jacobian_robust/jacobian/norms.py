"""Norms of the input–output Jacobian of a classifier, measured in the Fisher metric of its prediction.

For logits ``s(x)``, probabilities ``θ = softmax(s)`` and ``μ = 2√θ``, the sphere embedding, the pull-back of the Fisher
metric to the input is ``G = J_μᵀ J_μ = J_sᵀ Σ J_s`` with ``Σ = diag(θ) - θθᵀ``. With any factor ``Σ = L Lᵀ`` the norms
of ``J_μ`` are those of ``Lᵀ J_s``, whose rows are vector–Jacobian products of the logits: nothing is ever divided by
``√θ``, and a confident network is no special case. ``L`` is the closed-form Cholesky factor of a multinomial
covariance (Tanabe & Sagae, "An exact Cholesky decomposition and the generalized inverse of the variance-covariance
matrix of the multinomial distribution", JRSS B 54, 1992), taken in descending order of ``θ``.

The functions need only the logits and the inputs they were computed from, so they serve outside this project too::

    inputs.requires_grad_()
    logits = model(inputs)
    norm = frobenius_norm(logits, inputs, create_graph=True)  # (batch,)

The samples of a batch must not influence each other (batch normalisation in training mode couples them).
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from jacobian_robust.training.shares import drawn

__all__ = [
    "FisherFactor",
    "frobenius_norm",
    "gram_matrix",
    "jacobian_norms",
    "random_signs",
    "spectral_norm",
    "stretch",
    "worst_direction",
]


_CONFIRMATIONS = (
    2  # with none, 0.7% of random batches of five had a sample whose norm was too small; with 2, none of 3,394
)


def _sorted_log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities in descending order, the logarithms of their tail sums, and the order."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, order = logits.log_softmax(-1, dtype=dtype).sort(dim=-1, descending=True)
    return log_p, log_p.flip(-1).logcumsumexp(-1).flip(-1), order


def _unsorted(v: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(v).scatter(-1, order, v)


def _decayed_sums(x: Tensor, log_q: Tensor) -> Tensor:
    """Return ``Σ_{i≤k} x_i q_k / q_i`` for each ``k``, where ``q`` never grows, so that no ratio is above 1.

    It is the sum of the positive terms less that of the negative ones, each in log space to its end.
    """
    signed = torch.stack([x, -x]).clamp_min(torch.finfo(x.dtype).tiny)
    positive, negative = ((signed.log() - log_q).logcumsumexp(-1) + log_q).exp()
    return positive - negative


class _FactorProduct(torch.autograd.Function):
    """``L z`` as a function of the logits and ``z``, with its derivative written out: a third of autograd's operations.

    With ``a_k = θ_k / q_k``, ``R_1 = 0`` and ``R_{k+1} = (1 - a_k) R_k + L_kk z_k``, entry ``k`` is
    ``L_kk z_k - a_k R_k``. For a cotangent ``u`` that of ``R_k`` is minus the mean of ``u`` over the tail,
    ``E_k = Σ_{i≥k} θ_i u_i / q_k``; the rest is the chain rule for ``log θ_k``, ``log q_k`` and ``log q_{k+1}``. All
    sums over classes are decayed ones. The derivative is made of differentiable operations, so that it has its own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, z: Tensor) -> Tensor:
        log_p, log_tail, order = _sorted_log_probabilities(logits)
        diagonal, share, remainder = _FactorProduct._recurrence(log_p, log_tail, z)
        ctx.save_for_backward(logits, z, log_p, log_tail, order, diagonal, share, remainder)
        return _unsorted(pad(diagonal * z, (0, 1)) - share * remainder, order)

    @staticmethod
    def _recurrence(log_p: Tensor, log_tail: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``L_kk``, ``a_k`` and ``R_k``."""
        following = log_tail[:, 1:]
        diagonal = ((log_p[:, :-1] + following - log_tail[:, :-1]) / 2).exp()
        return diagonal, (log_p - log_tail).exp(), pad(_decayed_sums(diagonal * z, following), (1, 0))

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, z, log_p, log_tail, order, diagonal, share, remainder = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was kept has no graph
            log_p, log_tail, order = _sorted_log_probabilities(logits)
            diagonal, share, remainder = _FactorProduct._recurrence(log_p, log_tail, z)
        u = u.gather(-1, order)
        mean = _decayed_sums((share * u).flip(-1), -log_tail.flip(-1)).flip(-1)[:, 1:]
        to_z = diagonal * (u[:, :-1] - mean)
        if not ctx.needs_input_grad[0]:
            return None, to_z
        half = to_z * z / 2
        to_ratio = half - (log_tail[:, 1:] - log_tail[:, :-1]).exp() * remainder[:, :-1] * mean
        below = share * remainder * u
        to_tail = below - pad(to_ratio, (0, 1)) + pad(to_ratio, (1, 0))
        to_log_p = pad(half, (0, 1)) - below + share * _decayed_sums(to_tail, log_tail)
        to_logits = to_log_p - log_p.exp() * to_log_p.sum(-1, keepdim=True)
        return _unsorted(to_logits, order).to(logits.dtype), to_z if ctx.needs_input_grad[1] else None


class FisherFactor:
    """The Cholesky factor ``L`` of ``Σ = diag(θ) - θθᵀ`` as a linear operator, ``O(classes)`` memory per sample.

    ``L`` has ``classes - 1`` columns (the last one of the square factor is zero). Columns are ordered by descending
    probability: the first carries most of ``Σ`` for a confident prediction. With the tail sums ``q_k = Σ_{i≥k} θ_i``
    of the sorted probabilities, ``L_kk = √(θ_k q_{k+1} / q_k)`` and ``L_jk = -θ_j L_kk / q_{k+1}`` below the diagonal.
    All of it is computed from log-probabilities, as ratios of at most 1, and differentiable with respect to the logits.

    Args:
        logits: ``(batch, classes)``; half precision is computed in float32.
    """

    def __init__(self, logits: Float[Tensor, "batch classes"]) -> None:
        self._logits = logits
        self.columns = logits.shape[-1] - 1
        """Number of columns of ``L``."""

    @functools.cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        return _sorted_log_probabilities(self._logits)

    def leading_columns(self, size: int) -> Float[Tensor, "size batch classes"]:
        """Return the first ``size`` columns of ``L``, those of the likeliest classes, in the order of the logits.

        Args:
            size: from 1 to ``columns``.
        """
        log_p, log_tail, order = (x.unsqueeze(0) for x in self._sorted)
        following = log_tail[..., 1 : size + 1]
        diagonal = ((log_p[..., :size] + following - log_tail[..., :size]) / 2).exp().permute(2, 1, 0)
        on_it = torch.eye(size, log_p.shape[-1], dtype=log_p.dtype, device=log_p.device).unsqueeze(1)
        # Only below the diagonal are the ratios at most 1; the others could overflow.
        others = torch.ones_like(on_it[:, 0], dtype=torch.bool).tril().unsqueeze(1)
        below = (log_p - following.permute(2, 1, 0)).masked_fill(others, -torch.inf)
        return _unsorted(diagonal * (on_it - below.exp()), order.expand(size, -1, -1))

    def __matmul__(self, z: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch classes"]:
        """Return ``L z``, one vector a sample, in the order of the logits."""
        product: Tensor = _FactorProduct.apply(self._logits, z)
        return product

    def transposed(self, v: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch columns"]:
        """Return ``Lᵀ v``, one vector a sample, without a graph: the derivative of ``vᵀ L z`` with respect to ``z``."""
        with torch.enable_grad():
            z = torch.ones_like(v[:, 1:], requires_grad=True)
            (result,) = torch.autograd.grad(self @ z, z, v)
        return result


def _check(logits: Tensor, inputs: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[0] != inputs.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits (batch, classes ≥ 2) of inputs (batch, …), "
            f"got shapes {tuple(logits.shape)} and {tuple(inputs.shape)}"
        )
    if not (inputs.requires_grad and logits.requires_grad):
        raise ValueError("the logits carry no graph to the inputs: call inputs.requires_grad_() before the model")


def _vjp(logits: Tensor, inputs: Tensor, v: Tensor, *, create_graph: bool) -> Float[Tensor, "batch inputs"]:
    """Return ``vᵀ J_s`` for each sample, flattened, in at least float32."""
    (product,) = torch.autograd.grad(
        logits, inputs, v.to(logits.dtype), create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    if product is None:
        raise ValueError("the logits do not depend on the inputs: differentiate with respect to what the model was fed")
    return product.flatten(1).to(v.dtype)


def _vjps(
    logits: Tensor, inputs: Tensor, vectors: list[Tensor], *, create_graph: bool, batched: bool | None
) -> Iterable[Float[Tensor, "batch inputs"]]:
    """Return ``vᵀ J_s`` for each vector; one at a time they need the least memory, all at once the fewest kernels."""
    if batched or (batched is None and logits.is_cuda and len(vectors) > 1):
        try:
            (products,) = torch.autograd.grad(
                logits,
                inputs,
                torch.stack(vectors).to(logits.dtype),
                create_graph=create_graph,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        except RuntimeError:  # a layer without a rule for batches, or too little memory for them
            if batched:
                raise
        else:
            if products is not None:
                return products.flatten(2).to(vectors[0].dtype).unbind()
    return (_vjp(logits, inputs, v, create_graph=create_graph) for v in vectors)


def frobenius_norm(
    logits: Float[Tensor, "batch classes"],
    inputs: Float[Tensor, "batch *shape"],
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    batched: bool | None = None,
) -> Float[Tensor, "batch"]:
    """Return ``‖J_μ‖_F`` of each sample, exactly or estimated with a few Fisher-factor probes.

    ``J_μ`` is the Jacobian of ``2·√softmax(logits)`` with respect to the inputs; its Frobenius norm is ``ρ`` times that
    of the note's ``J̃`` (eq. 13). The exact norm takes ``classes - 1`` vector–Jacobian products, one for each column of
    the Fisher factor ``L``. With ``probes=K`` it takes ``K``: the first ``K - 1`` columns, of the likeliest classes,
    and one combination of all other columns with random signs. Its square is an unbiased estimate of ``‖J_μ‖_F²``,
    and so is its gradient.

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
    _check(logits, inputs)
    factor = FisherFactor(logits if create_graph else logits.detach())
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact norm, not {probes}")
    exact_columns = factor.columns if probes is None or probes >= factor.columns else probes - 1
    vectors = list(factor.leading_columns(exact_columns).unbind()) if exact_columns else []
    if exact_columns < factor.columns:
        signs = random_signs(logits.shape[0], factor.columns, generator, device=logits.device)
        if exact_columns:
            signs[:, :exact_columns] = 0
        vectors.append(factor @ signs)
    products = _vjps(logits, inputs, vectors, create_graph=create_graph, batched=batched)
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
    """Return ``Lᵀ J_s J_sᵀ L`` of each sample, whose eigenvalues are the squared singular values of ``J_μ``.

    ``J_μ J_μᵀ`` has the same and one more, which is zero: ``μ`` stays on its sphere. It takes ``m = classes - 1``
    vector–Jacobian products.

    Args:
        logits: the model's outputs before the softmax, with a graph to ``inputs``, which is kept.
        inputs: what the model was given, with ``requires_grad`` set before the forward pass.
        create_graph: make the matrix differentiable with respect to the model's parameters.
        batched: as in :func:`frobenius_norm`.

    Raises:
        ValueError: if the shapes do not match, or the logits do not depend on the inputs.
    """
    _check(logits, inputs)
    factor = FisherFactor(logits if create_graph else logits.detach())
    rows = _top_rows(logits, inputs, factor, factor.columns, create_graph=create_graph, batched=batched)
    return rows @ rows.mT


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

    def bits(samples: int) -> Tensor:
        return torch.randint(0, 2, (samples, columns), generator=generator, device=place)

    return drawn(bits, samples, generator).to(device).mul_(2).sub_(1).float()


def spectral_norm(
    logits: Float[Tensor, "batch classes"],
    inputs: Float[Tensor, "batch *shape"],
    *,
    columns: int | None = None,
    tolerance: float | None = None,
    create_graph: bool = False,
) -> Float[Tensor, "batch"]:
    """Return ``‖J_μ‖₂`` of each sample, exactly or from a small subspace of directions.

    The top left singular vector is sought among the combinations of the first ``columns`` columns of the Fisher factor,
    those of the likeliest classes (Rayleigh–Ritz: the largest singular value of these rows of ``Lᵀ J_s``). With a
    ``tolerance`` the subspace then grows by the residual, one direction at a time, until the residual says that a
    singular value is known to that relative accuracy for every sample, and two more directions show no larger one
    (Davidson's method, "The iterative calculation of a few of the lowest eigenvalues and corresponding eigenvectors of
    large real-symmetric matrices", J. Comput. Phys. 17, 1975). That it is the top one is then very likely, not proven.
    The estimate is never above the exact norm but by rounding.

    It takes one vector–Jacobian product for each column; each further direction takes another and a Jacobian–vector
    product. For the gradient the singular vector is a constant (envelope theorem), so that only one more
    vector–Jacobian product is differentiated. Where the top singular value is multiple the gradient is one of the
    subgradients.

    Args:
        logits: the model's outputs before the softmax, with a graph to ``inputs``, which is kept.
        inputs: what the model was given, with ``requires_grad`` set before the forward pass.
        columns: size of the first subspace, at least 1; ``None``, or ``classes - 1`` and more, is exact.
        tolerance: relative accuracy of the norm, above 0; ``None`` leaves it at the first subspace.
        create_graph: make the norm differentiable with respect to the model's parameters.

    Raises:
        ValueError: if ``columns`` or ``tolerance`` is out of range, the shapes do not match, or the logits do not
            depend on the inputs.
    """
    _check(logits, inputs)
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, or None for the exact norm, not {columns}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, or None, not {tolerance}")
    value, direction = _top_singular(logits, inputs, columns, tolerance)
    if not create_graph:
        return value
    top_row = _vjp(logits, inputs, FisherFactor(logits) @ direction, create_graph=True)
    return torch.linalg.vector_norm(top_row, dim=-1)


def _top_singular(
    logits: Tensor, inputs: Tensor, columns: int | None, tolerance: float | None
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch columns"]]:
    """Return the largest singular value of ``Lᵀ J_s`` that a subspace shows, and its left vector, without a graph."""
    factor = FisherFactor(logits.detach())
    size = factor.columns if columns is None else min(columns, factor.columns)
    rows = _top_rows(logits, inputs, factor, size)
    basis = torch.eye(factor.columns, dtype=rows.dtype, device=rows.device)[:size].expand(len(rows), -1, -1)

    def grown(basis: Tensor, rows: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        row = _vjp(logits, inputs, factor @ direction, create_graph=False)
        return torch.cat([basis, direction[:, None]], dim=1), torch.cat([rows, row[:, None]], dim=1)

    if tolerance is not None and size < factor.columns:
        # A little of everything else: where the top direction has no part in the subspace, no residual leads to it, and
        # another singular value would be taken for the top one. Always the same signs: the norm is a function.
        signs = random_signs(1, factor.columns, torch.Generator().manual_seed(0)).to(rows)
        signs[:, :size] = 0
        basis, rows = grown(basis, rows, torch.nn.functional.normalize(signs, dim=-1).expand(len(rows), -1))
    jvp, accepted, rank = None, None, 1
    while True:
        gram, unusable = _finite(rows @ rows.mT)
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
        value, combination = eigenvalues[:, -1].clamp_min(0), eigenvectors[:, None, :, -1]
        direction = (combination @ basis)[:, 0]
        if tolerance is None or basis.shape[1] == factor.columns:
            break
        jvp = jvp or _jvp_of(logits, inputs)
        residual = _outside(basis, factor.transposed(jvp((combination @ rows)[:, 0])))
        # An eigenvalue lies within this length of `value`; the norm is its root. Samples that are not finite stay so.
        if not (torch.linalg.vector_norm(residual, dim=-1) > 2 * tolerance * value).any():
            # It need not be the top one: it must outlast what the next Ritz vectors lead to.
            held = accepted is not None and not (value > accepted * (1 + tolerance)).any()
            rank = rank + 1 if held else 2
            if rank > min(1 + _CONFIRMATIONS, basis.shape[1]):
                break
            accepted = value
            following = (eigenvectors[:, None, :, -rank] @ rows)[:, 0]
            residual = _outside(basis, factor.transposed(jvp(following)))
        length = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        basis, rows = grown(basis, rows, residual / length.clamp_min(torch.finfo(length.dtype).tiny))
    return value.sqrt() + unusable, direction


def _outside(basis: Tensor, vector: Tensor) -> Tensor:
    """Return the part of a vector that is orthogonal to an orthonormal basis, one of each a sample."""
    for _ in range(2):  # once is not orthogonal enough in float32
        vector = vector - ((vector[:, None] @ basis.mT) @ basis)[:, 0]
    return vector


def _top_rows(
    logits: Tensor,
    inputs: Tensor,
    factor: FisherFactor,
    size: int,
    *,
    create_graph: bool = False,
    batched: bool | None = None,
) -> Float[Tensor, "batch size inputs"]:
    """Return the first rows of ``Lᵀ J_s``."""
    columns = list(factor.leading_columns(size).unbind())
    return torch.stack(list(_vjps(logits, inputs, columns, create_graph=create_graph, batched=batched)), dim=1)


def _jvp_of(logits: Tensor, inputs: Tensor) -> Callable[[Tensor], Float[Tensor, "batch classes"]]:
    """Return a function that maps ``g`` to ``J_s g``: the derivative of ``uᵀ J_s g`` with respect to ``u``."""
    u = torch.zeros_like(logits, requires_grad=True)
    (product,) = torch.autograd.grad(logits, inputs, u, create_graph=True)

    def jvp(g: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(product, u, g.view_as(product).to(product.dtype), retain_graph=True)
        return result.to(g.dtype)

    return jvp


def jacobian_norms(
    logits: Float[Tensor, "batch classes"], inputs: Float[Tensor, "batch *shape"]
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Return ``‖J_μ‖_F`` and ``‖J_μ‖₂`` of each sample, exact and without a graph, for the price of one of them.

    Raises:
        ValueError: if the shapes do not match or the logits do not depend on the inputs.
    """
    gram, unusable = _finite(gram_matrix(logits, inputs))
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
    return eigenvalues.sum(-1).sqrt() + unusable, eigenvalues[:, -1].sqrt() + unusable


def worst_direction(
    logits: Float[Tensor, "batch classes"], inputs: Float[Tensor, "batch *shape"]
) -> Float[Tensor, "batch *shape"]:
    """Return the unit top right singular vector of ``J_μ``, exact and without a graph: the input's fastest direction.

    Its sign is arbitrary. It is zero where the Jacobian is, and nan where that is not finite.

    Raises:
        ValueError: if the shapes do not match or the logits do not depend on the inputs.
    """
    _check(logits, inputs)
    factor = FisherFactor(logits.detach())
    rows = _top_rows(logits, inputs, factor, factor.columns)
    # The squares of a confident prediction's entries are below float32's smallest number.
    rows = rows / rows.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    gram, unusable = _finite(rows @ rows.mT)
    combination = torch.linalg.eigh(gram).eigenvectors[:, None, :, -1]
    direction = (combination @ rows)[:, 0] + unusable[:, None]
    return torch.nn.functional.normalize(direction, dim=-1).view_as(inputs)


def stretch(
    logits: Float[Tensor, "batch classes"],
    inputs: Float[Tensor, "batch *shape"],
    directions: Float[Tensor, "batch *shape"],
) -> Float[Tensor, "batch"]:
    """Return ``‖J_μ v‖ = √(g̃(v, v))``, the length of a direction in the pulled-back metric (eq. 4), without a graph.

    Raises:
        ValueError: if the shapes do not match or the logits do not depend on the inputs.
    """
    _check(logits, inputs)
    factor = FisherFactor(logits.detach())
    rows = _top_rows(logits, inputs, factor, factor.columns)
    return torch.linalg.vector_norm(rows @ directions.flatten(1).to(rows.dtype)[..., None], dim=(-2, -1))


def _finite(gram: Float[Tensor, "batch n n"]) -> tuple[Float[Tensor, "batch n n"], Float[Tensor, "batch"]]:
    """Return the matrices fit for an eigenvalue solver, which raises an error for the whole batch if one is not finite.

    Also returns what to add to a sample's norm: 0, or nan where its matrix was not finite and is replaced by zeros.
    """
    finite = gram.isfinite().all(-1).all(-1)
    unusable = torch.zeros_like(gram[:, 0, 0]).masked_fill(~finite, torch.nan)
    return torch.where(finite[:, None, None], gram, 0), unusable

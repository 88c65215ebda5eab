"""Whether the gradient of a Jacobian's norm through a model is what it should be: found out before a long training."""

import copy
import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobian_robust.geometry.factors import random_signs
from jacobian_robust.geometry.families import CATEGORICAL, Family, flat
from jacobian_robust.jacobian.norms import frobenius_norm
from jacobian_robust.jacobian.products import vjp

__all__ = ["check_model", "remedy_of"]

_DIRECTIONS = 3
_STEP = 1e-8  # of the length of all parameters: small, so that piecewise-linear layers seldom meet a kink
_AGREEMENT = 0.05


def check_model(model: nn.Module, inputs: Float[Tensor, "batch *shape"], family: Family = CATEGORICAL) -> None:
    """Make sure that ``‖J_μ‖`` of each sample and its gradient are defined and right for a model, as it stands.

    Three things go wrong elsewhere, two of them silently: samples of a batch that influence each other; layers without
    a second derivative, as fused attention; and layers whose second derivative is not that of their first, as some
    custom ones. The last is found by finite differences on a float64 copy in evaluation mode; for models that do not
    compute in float64 a warning says that it was not. Another says where batch normalisation by the batch's own
    statistics is what couples the samples: the derivative of the batch's sum is then meant.

    Args:
        model: maps inputs to logits ``(batch, classes)``; in the mode, training or evaluation, that it is used in.
        inputs: at least two samples.
        family: of the distribution that the outputs describe.

    Raises:
        ValueError: if one of the three is found; the message names the cause and a remedy.
    """
    inputs = inputs.detach().requires_grad_()
    try:
        if _influence(model, inputs):
            _say_coupled(model, inputs)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = frobenius_norm(model(inputs), inputs, family=family, probes=1, create_graph=True)
        torch.autograd.grad(norm.sum(), parameters, allow_unused=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ValueError(f"a layer has no second derivative ({reason}); {remedy_of(reason)}") from error
    _check_second_derivative(model, inputs.detach(), family)


def _influence(model: nn.Module, inputs: Tensor) -> bool:
    """Return whether the first sample's logits depend on the others."""
    (gradient,) = torch.autograd.grad(model(inputs)[0].sum(), inputs)
    return bool(gradient[1:].abs().max() > 0)


def _say_coupled(model: nn.Module, inputs: Tensor) -> None:
    """Warn where batch statistics are all that couples the samples.

    Raises:
        ValueError: if something else does.
    """
    by_batch = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
    ]
    for _, module in by_batch:
        module.eval()
    try:
        elsewhere = _influence(model, inputs)
    finally:
        for _, module in by_batch:
            module.train()
    if elsewhere:
        raise ValueError(
            "the samples of a batch influence each other, through some layer: the Jacobian of one sample is then not "
            "defined; let each layer see one sample alone"
        )
    named = [f"{name} ({type(module).__name__})" for name, module in by_batch]
    if len(named) > 2:
        named[1:] = [f"{len(named) - 1} more"]
    warnings.warn(
        f"batch statistics couple the samples, through {', '.join(named)}: the derivative is that of the batch's "
        "sum, as in published gradient penalties; GroupNorm or LayerNorm see one sample alone",
        stacklevel=3,
    )


def remedy_of(reason: str) -> str:
    """Return what helps against an error of autograd."""
    if "checkpoint" in reason.lower():
        return "give torch.utils.checkpoint.checkpoint use_reentrant=False"
    if "aot_autograd" in reason or "compile" in reason:
        return "train the model uncompiled, without torch.compile"
    if "_cudnn_rnn" in reason or "rnn" in reason.lower():
        return "let torch.backends.cudnn.flags(enabled=False) be around the recurrent layer"
    return (
        "for attention choose the plain kernel: torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around it; an "
        "operation in place needs its other form"
    )


def _say_unchecked() -> None:
    warnings.warn(
        "the model does not compute in float64: that its second derivatives are those of its first was not checked",
        stacklevel=4,
    )


def _check_second_derivative(model: nn.Module, inputs: Tensor, family: Family) -> None:
    try:
        twin = copy.deepcopy(model).double().eval()
    except Exception:  # some cannot be copied, as under torch's older weight_norm
        warnings.warn("the model cannot be copied: that its second derivatives are right was not checked", stacklevel=3)
        return
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    x = inputs.double().requires_grad_()

    directions: list[Tensor] = []

    def norm(*, create_graph: bool) -> Tensor:
        logits = twin(x)
        if not directions:  # the same at each step of the finite differences
            generator = torch.Generator().manual_seed(0)
            signs = random_signs(len(logits), flat(logits).shape[1], generator, device=x.device)
            directions.extend(family.directions(logits, min(2, family.rank(logits)), signs))
        factor = family.factor(logits)
        rows = [vjp(flat(logits), x, factor @ direction, create_graph=create_graph) for direction in directions]
        return torch.linalg.vector_norm(torch.stack(rows), dim=(0, -1)).sum()

    try:
        value = norm(create_graph=True)
    except RuntimeError:  # something in the model insists on another precision
        _say_unchecked()
        return
    if value.dtype != torch.float64 and parameters:
        _say_unchecked()
    if value.dtype != torch.float64 or not parameters:
        return
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(0)
    length = torch.cat([parameter.detach().flatten() for parameter in parameters]).norm()
    for _ in range(_DIRECTIONS):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in parameters]
        scale = length / torch.cat([d.flatten() for d in direction]).norm()
        direction = [d * scale for d in direction]
        said = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
        values = []
        for step in (_STEP, -2 * _STEP):
            with torch.no_grad():
                for parameter, d in zip(parameters, direction, strict=True):
                    parameter.add_(d, alpha=step)
            values.append(norm(create_graph=False).item())
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=_STEP)
        seen = (values[0] - values[1]) / (2 * _STEP)
        # A kink between two steps spoils one direction, a wrong derivative all of them.
        if abs(said - seen) <= _AGREEMENT * max(abs(said), abs(seen)) + 1e-6 * value.item():
            return
    raise ValueError(
        f"the gradient of the Jacobian's norm is wrong in this model: along a random direction autograd says "
        f"{said:.3g}, finite differences {seen:.3g}; look for a custom layer whose backward pass is not differentiable"
    )

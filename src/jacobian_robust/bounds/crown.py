"""CROWN's backward linear bounds (Zhang et al., 2018) with interval bounds in between (CROWN-IBP, Zhang et al., 2020).

A linear bound of the margins is carried back through affine functions and ReLU; where another function made a value,
its interval closes the bound there. Every model with interval bounds has these, too. Sound over the reals.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobian_robust.bounds.interval import Interval, box, differences, margins_of, operation, propagate

__all__ = ["crown_margin_bounds"]

_AFFINE = frozenset(
    [
        "linear",
        "conv1d",
        "conv2d",
        "avg_pool1d",
        "avg_pool2d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "flatten",
        "reshape",
        "view",
        "mean",
        "dropout",
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "batch_norm",
        "contiguous",
    ]
)


def _order(output: Interval) -> list[Interval]:
    """Return all values that the output depends on, each after those that depend on it."""
    done: list[Interval] = []
    seen: set[int] = set()
    stack: list[tuple[Interval, bool]] = [(output, False)]
    while stack:
        value, expanded = stack.pop()
        if expanded:
            done.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack.append((value, True))
            stack.extend((parent, False) for parent in _parents(value))
    return done[::-1]


def _parents(value: Interval) -> list[Interval]:
    arguments = () if value.source is None else (*value.source[1], *value.source[2].values())
    return [argument for argument in arguments if isinstance(argument, Interval)]


def _concrete(a: Tensor, value: Interval) -> Tensor:
    center, radius = (value.lower + value.upper) / 2, (value.upper - value.lower) / 2
    return (a * center[:, None] + a.abs() * radius[:, None]).flatten(2).sum(-1)


def _through_relu(a: Tensor, x: Interval) -> tuple[Tensor, Tensor]:
    low, high = x.lower, x.upper
    crossing = (low < 0) & (high > 0)
    width = torch.where(crossing, high - low, torch.ones_like(low))
    active = (low >= 0).to(low)
    above = torch.where(crossing, high / width, active)
    below = torch.where(crossing, (high > -low).to(low), active)
    offset = torch.where(crossing, -low * high / width, torch.zeros_like(low))
    positive, negative = a.clamp_min(0), a.clamp_max(0)
    return positive * above[:, None] + negative * below[:, None], (positive * offset[:, None]).flatten(2).sum(-1)


def _through_affine(a: Tensor, value: Interval) -> tuple[list[Tensor], Tensor]:
    """Return the coefficients of the parents, the transposed map's, and what the map's value at 0 adds."""
    assert value.source is not None
    func, args, kwargs = value.source
    rows, zeros = a.shape[:2].numel(), []

    def zero(argument: Any) -> Any:
        if not isinstance(argument, Interval):
            return argument
        zeros.append(argument.lower.new_zeros(rows, *argument.lower.shape[1:]).requires_grad_())
        return zeros[-1]

    if func.__name__ in ("view", "reshape"):
        func, args, kwargs = torch.flatten, (args[0], 1), {}
        a = a.flatten(2)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        name = operation(func.__name__)
        plain: dict[str, Any] = {
            "add": torch.add,
            "sub": torch.sub,
            "rsub": torch.rsub,
            "mul": torch.mul,
            "div": torch.div,
        }
        constant = plain.get(name, func)(*map(zero, args), **{key: zero(item) for key, item in kwargs.items()})
        gradients = torch.autograd.grad(constant, zeros, a.flatten(0, 1), create_graph=graph, materialize_grads=True)
    coefficients = [gradient.reshape(*a.shape[:2], *gradient.shape[1:]) for gradient in gradients]
    added = (a.flatten(2) * constant.reshape(*a.shape[:2], -1)).sum(-1)
    return coefficients, added if graph else added.detach()


def _traversable(value: Interval) -> bool:
    if value.source is None:
        return False
    name, parents = operation(value.source[0].__name__), _parents(value)
    if name in ("mul", "div") and len(parents) > 1:
        return False
    batch = value.lower.shape[0]
    constants = [x for x in value.source[1] if isinstance(x, Tensor) and not isinstance(x, Interval)]
    if name in ("add", "sub", "rsub", "mul", "div") and any(x.dim() == value.lower.dim() for x in constants):
        return False  # it may differ from image to image
    return name in _AFFINE and all(parent.lower.shape[0] == batch for parent in parents)


def crown_margin_bounds(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, " batch"],
    eps: float,
    clip: tuple[float, float] | None = (0.0, 1.0),
    *,
    float64: bool = False,
) -> Float[Tensor, "batch classes"]:
    """Return ``u_j ≥ s_j(x') − s_y(x')`` as :func:`margin_bounds` does, and never above its values.

    Raises:
        ValueError: as :func:`margin_bounds`.
    """
    model, low, high = box(inputs, eps, clip, model, float64)
    output = propagate(model, low, high)
    pending = {id(output): differences(labels, output.lower.shape[-1], output.lower)}
    bound = torch.zeros_like(output.lower)
    for value in _order(output):
        a = pending.pop(id(value), None)
        if a is None:  # only behind values whose intervals closed the bound
            continue
        if value.source is not None and operation(value.source[0].__name__) == "relu":
            coefficients, added = _through_relu(a, value.source[1][0])
            passed = [coefficients]
        elif _traversable(value):
            passed, added = _through_affine(a, value)
        else:
            bound = bound + _concrete(a, value)
            continue
        bound = bound + added
        for parent, coefficient in zip(_parents(value), passed, strict=True):
            pending[id(parent)] = pending[id(parent)] + coefficient if id(parent) in pending else coefficient
    return torch.minimum(bound, margins_of(output, labels))

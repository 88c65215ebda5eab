"""Interval bound propagation (Gowal et al., 2018; Mirman et al., 2018).

The model runs on an :class:`Interval`, a tensor subclass that replaces each torch function by its rule. The bounds are
sound over the reals; rounding errors are not enclosed, and ``float64=True`` makes them negligible (about 1e-13,
relative), not zero. They are differentiable in the model's parameters.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Interval", "interval_bounds", "margin_bounds"]

Bounds = tuple[Tensor, Tensor]

MONOTONE = frozenset(
    [
        "relu",
        "relu_",
        "leaky_relu",
        "softplus",
        "tanh",
        "sigmoid",
        "max_pool1d",
        "max_pool2d",
        "avg_pool1d",
        "avg_pool2d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "flatten",
        "reshape",
        "view",
        "mean",
        "dropout",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "pad",
        "elu",
    ]
)
"""Non-decreasing in every input: the bounds are the images of the ends."""


class Traced(Tensor):
    """A tensor on which a model runs with each torch function replaced by a rule, that of a subclass."""

    @classmethod
    def rule(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function gives; raise ``ValueError`` with its name where there is no rule."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply the rule of ``func``."""
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name in ("__get__", "size", "dim", "ndimension", "numel", "is_floating_point", "__len__", "__hash__"):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                raise ValueError(f"bounds: a property that is a tensor (.T, .data, .grad) has no {cls.__name__} rule")
            return result
        in_place = bool(kwargs.pop("inplace", False)) or (name.endswith("_") and not name.endswith("__"))
        in_place = in_place or name in ("__iadd__", "__isub__", "__imul__", "__itruediv__")
        if not in_place:
            return cls.rule(name, func, args, kwargs)
        target = args[0]
        if not isinstance(target, Traced):
            raise ValueError(f"bounds: {name} writes an {cls.__name__} into an ordinary tensor")
        with torch._C.DisableTorchFunctionSubclass():
            before = target.detach().as_subclass(cls)
        before.__dict__.update(target.__dict__)
        target.__dict__.update(cls.rule(name, func, (before, *args[1:]), kwargs).__dict__)
        return target


class Interval(Traced):
    """A box of tensors, ``lower ≤ x ≤ upper``, with the function and arguments that it comes from (none: an input)."""

    lower: Tensor
    upper: Tensor
    source: tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]] | None

    @classmethod
    def rule(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Interval":
        """Return the interval of a function's values."""
        return wrap(*_apply(name, func, args, kwargs), (func, args, kwargs))


def wrap(lower: Tensor, upper: Tensor, source: Any = None) -> Interval:
    """Return the interval of two bounds."""
    interval = lower.detach().as_subclass(Interval)
    interval.lower, interval.upper, interval.source = lower, upper, source
    return interval


def operation(name: str) -> str:
    """Return the plain name of an operator: ``__radd__``, ``add_`` and ``add`` are one, ``__rsub__`` is ``rsub``."""
    plain = {"__iadd__": "add", "__radd__": "add", "__imul__": "mul", "__rmul__": "mul", "__isub__": "sub"}
    name = plain.get(name, name).strip("_")
    return {"itruediv": "div", "truediv": "div", "true_divide": "div"}.get(name, name)


def _apply(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bounds:
    plain = operation(name)
    if plain in ("add", "sub", "rsub", "mul", "div"):
        if set(kwargs) - {"other"} or len(args) + len(kwargs) != 2:
            raise ValueError(f"bounds: {name} with {', '.join(kwargs) or 'more arguments'} has no interval rule")
        return _arithmetic(plain, args[0], kwargs.get("other", args[-1]))
    if any(isinstance(value, Interval) for value in (*args[1:], *kwargs.values())):
        raise ValueError(f"bounds: {name} of several intervals has no interval rule")
    if plain in _RULES:
        return _RULES[plain](*args, **kwargs)
    if plain not in MONOTONE:
        raise ValueError(f"bounds: the layer {name} has no interval rule")
    if plain == "dropout" and (kwargs.get("training", True) and kwargs.get("p", 0.5) > 0):
        raise ValueError("bounds: dropout is in training mode; call model.eval()")
    if any(value < 0 for key, value in kwargs.items() if key in ("negative_slope", "alpha")):
        raise ValueError(f"bounds: {name} with a negative slope is not monotone and has no interval rule")
    if plain == "softplus" and kwargs.get("threshold", args[2] if len(args) > 2 else 20) < 20:
        raise ValueError("bounds: softplus with a threshold below 20 falls there and has no interval rule")
    func = F.relu if plain == "relu" else func  # not the one in place
    return func(args[0].lower, *args[1:], **kwargs), func(args[0].upper, *args[1:], **kwargs)


def _ends(value: Any) -> tuple[Any, Any]:
    return (value.lower, value.upper) if isinstance(value, Interval) else (value, value)


def _arithmetic(plain: str, first: Any, second: Any) -> Bounds:
    if plain == "rsub":
        plain, first, second = "sub", second, first
    if plain == "div":
        if isinstance(second, Interval):
            raise ValueError("bounds: division by an interval has no interval rule")
        plain, second = "mul", 1 / second
    (a, b), (c, d) = _ends(first), _ends(second)
    if plain == "add":
        return a + c, b + d
    if plain == "sub":
        return a - d, b - c
    corners = torch.stack(torch.broadcast_tensors(a * c, a * d, b * c, b * d))
    return corners.amin(0), corners.amax(0)


def _affine(func: Callable[..., Tensor]) -> Callable[..., Bounds]:
    def rule(x: Interval, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any) -> Bounds:
        center = func((x.lower + x.upper) / 2, weight, bias, *rest, **options)
        radius = func((x.upper - x.lower) / 2, weight.abs(), None, *rest, **options)
        return center - radius, center + radius

    return rule


def _batch_norm(
    x: Interval,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bounds:
    if training or running_mean is None or running_var is None:
        raise ValueError("bounds: BatchNorm is in training mode, where images influence each other; call model.eval()")
    shape = (1, -1, *[1] * (x.lower.dim() - 2))
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = -running_mean * scale + (0 if bias is None else bias)
    low, high = _arithmetic("mul", x, scale.view(shape))
    return low + shift.view(shape), high + shift.view(shape)


def _group_norm(
    x: Interval, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Bounds:
    """Bound ``(x − mean)/√(var + eps)``: the deviation is a seminorm, so it moves by at most that of the radius."""
    low, high = (end.reshape(end.shape[0], num_groups, -1) for end in (x.lower, x.upper))
    count = low.shape[-1]
    center, radius = (low + high) / 2, (high - low) / 2
    tiny = torch.finfo(low.dtype).tiny  # a larger floor would be a radius, which layers amplify
    deviation = center.var(-1, correction=0, keepdim=True).clamp_min(tiny).sqrt()
    slack = radius.square().mean(-1, keepdim=True).clamp_min(tiny).sqrt()
    fastest = ((deviation - slack).clamp_min(0).square() + eps).rsqrt()
    slowest = ((deviation + slack).square() + eps).rsqrt()
    spread = radius * (1 - 2 / count) + radius.mean(-1, keepdim=True)  # of x_i − mean: (1 − 1/n) r_i + Σ_{k≠i} r_k / n
    middle = center - center.mean(-1, keepdim=True)
    limit = max(count - 1, 0) ** 0.5  # no value deviates further
    ends = _arithmetic("mul", wrap(middle - spread, middle + spread), wrap(slowest, fastest))
    low, high = (end.clamp(-limit, limit).reshape(x.lower.shape) for end in ends)
    shape = (1, -1, *[1] * (x.lower.dim() - 2))
    if weight is not None:
        low, high = _arithmetic("mul", wrap(low, high), weight.view(shape))
    return (low, high) if bias is None else (low + bias.view(shape), high + bias.view(shape))


@functools.cache
def _stationary(func: Callable[..., Tensor], approximate: str | None) -> float:
    options = {} if approximate is None else {"approximate": approximate}
    value = lambda x: func(torch.tensor(float(x), dtype=torch.float64), **options).item()  # noqa: E731
    return float(minimize_scalar(value, bracket=(-2.0, -1.0, 0.0)).x)


def _unimodal(func: Callable[..., Tensor]) -> Callable[..., Bounds]:
    """The rule of a function that falls to its only minimum and rises from there: GELU, SiLU."""

    def rule(x: Interval, **options: Any) -> Bounds:
        at = torch.as_tensor(_stationary(func, options.get("approximate")), dtype=torch.float64).to(x.lower)
        left, right = func(x.lower, **options), func(x.upper, **options)
        inside = (x.lower <= at) & (at <= x.upper)
        return torch.where(inside, func(at, **options), torch.minimum(left, right)), torch.maximum(left, right)

    return rule


_RULES: dict[str, Callable[..., Bounds]] = {
    "linear": _affine(F.linear),
    "conv1d": _affine(F.conv1d),
    "conv2d": _affine(F.conv2d),
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "gelu": _unimodal(F.gelu),
    "silu": _unimodal(F.silu),
}


def propagate(model: nn.Module, lower: Tensor, upper: Tensor) -> Interval:
    """Return the model's output as an interval that knows its history."""
    if lower.shape != upper.shape:
        raise ValueError(f"bounds: lower has shape {tuple(lower.shape)}, upper {tuple(upper.shape)}")
    if not bool((lower <= upper).all()):
        raise ValueError("bounds: lower exceeds upper, or one is not a number")
    output = model(wrap(lower, upper))
    if not isinstance(output, Interval):
        raise ValueError(f"bounds: {type(model).__name__} returns no tensor that depends on its input")
    return output


def interval_bounds(
    model: nn.Module, lower: Float[Tensor, "batch *shape"], upper: Float[Tensor, "batch *shape"]
) -> tuple[Float[Tensor, "batch *out"], Float[Tensor, "batch *out"]]:
    """Return bounds of the model's outputs over the box ``lower ≤ x ≤ upper``, sound over the reals.

    Raises:
        ValueError: if the bounds are not ordered, a layer has no rule, or BatchNorm or dropout is in training mode.
    """
    output = propagate(model, lower, upper)
    return output.lower, output.upper


def box(
    inputs: Tensor, eps: float, clip: tuple[float, float] | None, model: nn.Module, float64: bool
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model, and the clipped box around the inputs, in double precision if asked for."""
    if not 0 <= eps < float("inf"):
        raise ValueError(f"bounds: eps must be a finite number of at least 0, not {eps}")
    if float64:
        model, inputs = copy.deepcopy(model).double(), inputs.double()
    low, high = inputs - eps, inputs + eps
    if clip is not None:
        if bool((inputs < clip[0]).any()) or bool((inputs > clip[1]).any()):
            raise ValueError(f"bounds: inputs lie outside {list(clip)}, to which the box is clipped")
        low, high = low.clamp_min(clip[0]), high.clamp_max(clip[1])
    return model, low, high


def differences(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return the matrices of ``s_j − s_y``, shape (batch, classes, classes); row ``y`` is 0."""
    eye = torch.eye(classes, dtype=like.dtype, device=like.device)
    return eye - eye[labels][:, None]


def margins_of(output: Interval, labels: Tensor) -> Tensor:
    """Return ``u_j``, with the last linear layer, if the output is one's, merged with the difference."""
    matrix = differences(labels, output.lower.shape[-1], output.lower)
    x, offset = output, None
    if output.source is not None and output.source[0] is F.linear and output.lower.dim() == 2:
        x, weight, *bias = output.source[1]
        matrix = matrix @ weight
        offset = (bias[0] if bias else output.source[2].get("bias"),)[0]
        offset = None if offset is None else offset - offset[labels][:, None]
    center, radius = (x.lower + x.upper) / 2, (x.upper - x.lower) / 2
    bound = (matrix @ center[..., None] + matrix.abs() @ radius[..., None]).squeeze(-1)
    return bound if offset is None else bound + offset


def margin_bounds(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, " batch"],
    eps: float,
    clip: tuple[float, float] | None = (0.0, 1.0),
    *,
    float64: bool = False,
) -> Float[Tensor, "batch classes"]:
    """Return ``u_j ≥ s_j(x') − s_y(x')`` for all ``x'`` with ``‖x' − x‖∞ ≤ eps`` in ``clip``; ``u_y = 0``.

    ``eps`` is in the inputs' units. With ``float64`` a copy of the model computes in double precision.

    Raises:
        ValueError: as :func:`interval_bounds`; for a negative ``eps``; for inputs outside ``clip``.
    """
    model, low, high = box(inputs, eps, clip, model, float64)
    return margins_of(propagate(model, low, high), labels)

"""Upper bounds of a network's l2 Lipschitz constant, and the pairwise margin certificate they give.

The model runs on a :class:`Stretched` tensor, which carries the constant from the inputs to where it stands: products
along a path, sums where paths meet. A certificate is never by power iteration, which bounds a norm from below.
Computed in float64; sound over the reals up to the rounding of an eigenvalue decomposition, for which each norm is
raised by 1e-9 of itself.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobian_robust.bounds.interval import Traced, operation

__all__ = ["PowerIteration", "lipschitz_constant", "lipschitz_margin", "pairwise_constants"]

_SLACK = 1 + 1e-9
_LARGEST_SPECTRUM = 2**30
"""Multiplications to which the matrices of one convolution's spectrum may amount; beyond, a coarser bound is taken."""

_MOVES = "flatten unflatten reshape view contiguous squeeze unsqueeze permute transpose clone dropout sort sorted_pairs"
_SLOPES = {"silu": 1.1, "gelu": 1.13, "sigmoid": 0.25} | dict.fromkeys(
    f"relu leaky_relu elu tanh softplus neg abs {_MOVES}".split(), 1.0
)
"""Bounds of the slope of functions of each number alone, and of those that only move numbers."""


Norms = Callable[[Callable[..., Tensor], Tensor, torch.Size, dict[str, Any]], Tensor]
"""Returns the spectral norm of ``x ↦ func(x, weight, None, **options)`` for ``x`` of a shape, a scalar."""


class Stretched(Traced):
    """A tensor with a bound of the l2 Lipschitz constant of what made it from the inputs.

    Attributes:
        value: the tensor.
        constant: the bound, a scalar.
        norms: says what the norm of a linear map is.
        linear: if a linear layer made it, the constant before the layer, and the layer's weight.
    """

    value: Tensor
    constant: Tensor
    norms: Norms
    linear: tuple[Tensor, Tensor] | None

    @classmethod
    def rule(cls, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of a function with its constant."""
        plain = operation(name)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Stretched)]
        if not given or (len(given) > 1 and plain not in ("add", "sub", "rsub")):
            raise ValueError(f"bounds: {name} of several tensors, or of a list, has no Lipschitz rule")
        if set(kwargs) - {"other"} if plain in _ARITHMETIC else not isinstance(args[0], Stretched):
            raise ValueError(f"bounds: {name} with such arguments has no Lipschitz rule")
        norms, bare = given[0].norms, [_value(x) for x in args]
        func = F.relu if plain == "relu" else _ARITHMETIC.get(plain, func)  # not those in place
        value = func(*bare, **{key: _value(x) for key, x in kwargs.items()})
        if plain in _ARITHMETIC:
            other = next((x for x in (*args[1:], *args[:1], *kwargs.values()) if not isinstance(x, Stretched)), None)
            if any(x.value.shape != value.shape for x in given):
                raise ValueError(f"bounds: {name} that repeats numbers has no Lipschitz rule")
            return stretched(value, _combined(plain, given, args, other), norms)
        if plain in ("linear", "conv1d", "conv2d"):
            weight, options = _weight_and_options(func, args, kwargs)
            constant = given[0].constant * norms(func, weight, given[0].value.shape, options)
            made = stretched(value, constant, norms)
            made.linear = (given[0].constant, weight) if plain == "linear" else None
            return made
        factor = _slope(plain, name, args, kwargs, given[0].value)
        if isinstance(value, tuple):  # sort's values, and its indices
            return type(value)((stretched(value[0], given[0].constant * factor, norms), *value[1:]))
        return stretched(value, given[0].constant * factor, norms)


_ARITHMETIC = {"add": torch.add, "sub": torch.sub, "rsub": torch.rsub, "mul": torch.mul, "div": torch.div}


def stretched(value: Tensor, constant: Tensor, norms: Norms) -> Stretched:
    """Return a tensor with its constant."""
    result = value.detach().as_subclass(Stretched)
    result.value, result.constant, result.norms, result.linear = value, constant, norms, None
    return result


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Stretched) else x


def _combined(plain: str, given: list[Stretched], args: tuple[Any, ...], other: Any) -> Tensor:
    if plain in ("add", "sub", "rsub"):
        return torch.stack([x.constant for x in given]).sum()
    if plain == "div" and not isinstance(args[0], Stretched):
        raise ValueError("bounds: division by a tensor that depends on the input has no Lipschitz rule")
    size = torch.as_tensor(other).detach().abs().to(given[0].constant)
    return given[0].constant * (size.max() if plain == "mul" else 1 / size.min())


def _weight_and_options(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the weight of a linear layer, and the other arguments but its bias by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    named = dict(zip(names, args, strict=False)) | kwargs
    return named["weight"], {name: named[name] for name in names[3:] if name in named}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _slope(plain: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> float | Tensor:
    """Return a bound of the slope of a function of one tensor."""
    if plain == "batch_norm":
        return _batch_norm(*args[1:], **kwargs)
    if plain in ("max_pool2d", "avg_pool2d"):
        return _pooling(plain, args, kwargs)
    if plain == "adaptive_avg_pool2d":
        sizes = list(zip(x.shape[-2:], _pair(args[1]), strict=True))
        if all(before % after == 0 for before, after in sizes):
            return math.prod(after / before for before, after in sizes) ** 0.5
    if plain not in _SLOPES:
        raise ValueError(f"bounds: the layer {name} has no Lipschitz rule")
    if plain == "dropout" and (kwargs.get("training", True) and kwargs.get("p", 0.5) > 0):
        raise ValueError("bounds: dropout is in training mode; call model.eval()")
    if plain == "softplus" and kwargs.get("threshold", args[2] if len(args) > 2 else 20) < 20:
        raise ValueError("bounds: softplus with a threshold below 20 falls there and has no Lipschitz rule")
    steeper = [abs(kwargs[key]) for key in ("negative_slope", "alpha") if key in kwargs]
    if plain in ("leaky_relu", "elu"):
        steeper += [abs(x) for x in args[1:2]]
    return max(_SLOPES[plain], *steeper) if steeper else _SLOPES[plain]


def _batch_norm(
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or variance is None:
        raise ValueError("bounds: BatchNorm is in training mode, where images influence each other; call model.eval()")
    scale = (variance + eps).rsqrt()
    return (scale if weight is None else scale * weight).abs().max()


def _pooling(plain: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the root of the number of windows a pixel lies in; of averages, over that of a window's pixels."""
    last = {
        "max_pool2d": ("dilation", "ceil_mode"),
        "avg_pool2d": ("ceil_mode", "count_include_pad", "divisor_override"),
    }
    names = ("input", "kernel_size", "stride", "padding", *last[plain])
    named = dict(zip(names, args, strict=False)) | kwargs
    size = _pair(named["kernel_size"])
    stride = size if named.get("stride") in (None, [], ()) else _pair(named["stride"])
    if _pair(named.get("dilation", 1)) != (1, 1) or named.get("divisor_override") is not None:
        raise ValueError(f"bounds: {plain} whose windows overlap, or weigh, otherwise has no Lipschitz rule")
    root = math.sqrt(math.prod(math.ceil(k / s) for k, s in zip(size, stride, strict=True)))
    if plain == "max_pool2d" or _pair(named.get("padding", 0)) != (0, 0) or named.get("ceil_mode"):
        return root
    return root / math.sqrt(math.prod(size))


def sound_norms(func: Callable[..., Tensor], weight: Tensor, shape: torch.Size, options: dict[str, Any]) -> Tensor:
    """Return an upper bound of the norm of a linear layer, that of a convolution for zero padding, or none."""
    if weight.dim() == 2:
        return torch.linalg.matrix_norm(weight, 2) * _SLACK
    groups = options.get("groups", 1)
    if isinstance(options.get("padding"), str):
        outputs = shape[2:]  # same, or fewer
    else:
        with torch.no_grad():
            outputs = func(weight.new_zeros(1, *shape[1:]), weight, None, **options).shape[2:]
    parts = weight.chunk(groups)
    return torch.stack([_convolution(part, outputs, options) for part in parts]).max() * _SLACK


def _convolution(weight: Tensor, outputs: torch.Size, options: dict[str, Any]) -> Tensor:
    """Return an upper bound of a convolution's norm, for so many outputs.

    With a stride the images' phases are channels of their own. The convolution is then a part of one on a torus that
    has room for the outputs and the kernel: its norm is the largest of the Fourier transform's matrices.
    """
    axes = weight.dim() - 2
    stride, dilation = (_each(options.get(name, 1), axes) for name in ("stride", "dilation"))
    for axis in range(axes):
        taps = (weight.shape[2 + axis] - 1) * dilation[axis] + 1
        spaced = weight.new_zeros(
            *weight.shape[: 2 + axis], -(-taps // stride[axis]) * stride[axis], *weight.shape[3 + axis :]
        )
        spaced.narrow(2 + axis, 0, taps).movedim(2 + axis, -1)[..., :: dilation[axis]] = weight.movedim(2 + axis, -1)
        weight = spaced
    for axis in range(axes):
        weight = weight.unflatten(2 + axis, (-1, stride[axis])).movedim(3 + axis, 1).flatten(1, 2)
    torus = [n + k - 1 for n, k in zip(outputs, weight.shape[2:], strict=True)]
    few, many = sorted(weight.shape[:2])
    if math.prod(torus) * few**2 * many > _LARGEST_SPECTRUM:
        taps = int(weight.flatten(2).any(0).any(0).sum())  # the most patches that a pixel lies in
        return taps**0.5 * torch.linalg.matrix_norm(weight.flatten(1), 2)
    spectrum = torch.fft.rfftn(weight, torus).flatten(2).movedim(-1, 0)  # the other half is its conjugate
    gram = spectrum @ spectrum.mH if weight.shape[0] == few else spectrum.mH @ spectrum
    return torch.linalg.eigvalsh(gram)[:, -1].max().sqrt()


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))


class PowerIteration:
    """Norms from below, differentiable in the weights: for training alone, never for a certificate.

    Args:
        iterations: products with the map and with its transpose, from a start that is drawn each time.
        draw: returns normal numbers of a shape.
    """

    def __init__(self, iterations: int, draw: Callable[[torch.Size], Tensor]) -> None:
        self.iterations = iterations
        self.draw = draw

    def __call__(
        self, func: Callable[..., Tensor], weight: Tensor, shape: torch.Size, options: dict[str, Any]
    ) -> Tensor:
        """See :class:`Norms`."""
        vector = self.draw(torch.Size([1, *shape[1:]])).to(weight)
        constant = weight.detach()
        for _ in range(self.iterations):
            with torch.enable_grad():
                image = func(vector.requires_grad_(), constant, None, **options)
                (vector,) = torch.autograd.grad(image, vector, image.detach())
            vector = F.normalize(vector.flatten(), dim=0).view_as(vector)
        return torch.linalg.vector_norm(func(vector, weight, None, **options))


def _run(model: Callable[[Tensor], Any], inputs: Tensor, norms: Norms) -> Stretched:
    output = model(stretched(inputs, inputs.new_ones(()), norms))
    if not isinstance(output, Stretched):
        raise ValueError(f"bounds: {type(model).__name__} returns no tensor that depends on its input")
    return output


def _pairwise(output: Stretched) -> Tensor:
    classes = output.value.shape[-1]
    if output.linear is None:
        return 2**0.5 * output.constant * (1 - torch.eye(classes).to(output.constant))
    before, weight = output.linear
    apart = (weight[:, None] - weight).square().sum(-1)
    own = torch.eye(classes, dtype=torch.bool, device=weight.device)
    return before * apart.masked_fill(own, 1.0).sqrt().masked_fill(own, 0.0)  # no root of 0, whose slope is infinite


def pairwise_constants(
    model: Callable[[Tensor], Any], inputs: Float[Tensor, "1 *shape"], norms: Norms = sound_norms
) -> Float[Tensor, "classes classes"]:
    """Return bounds ``K_ij`` of the Lipschitz constants of ``s_i − s_j``: ``‖W_i − W_j‖ L'``.

    ``W`` is the last layer's weight and ``L'`` the bound before it; ``√2 L`` where the last layer is not linear. With
    :class:`PowerIteration` they are no bounds, but have a gradient.

    Raises:
        ValueError: as :func:`lipschitz_constant`.
    """
    return _pairwise(_run(model, inputs, norms))


@torch.no_grad()
def lipschitz_constant(model: nn.Module, inputs: Float[Tensor, "batch *shape"]) -> float:
    """Return an upper bound of the model's l2 Lipschitz constant for inputs of this shape, of which one is looked at.

    Raises:
        ValueError: if a layer has no rule, which is named, or BatchNorm or dropout is in training mode.
    """
    return float(_run(copy.deepcopy(model).double(), inputs[:1].double(), sound_norms).constant)


@torch.no_grad()
def lipschitz_margin(
    model: nn.Module, inputs: Float[Tensor, "batch *shape"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return the certified l2 radius ``min_j (s_y − s_j)/(‖W_y − W_j‖ L')``, in float64; not positive: none.

    ``W`` is the last layer's weight, ``L'`` the bound of all before it; see :func:`pairwise_constants`.

    Raises:
        ValueError: as :func:`lipschitz_constant`.
    """
    output = _run(copy.deepcopy(model).double(), inputs.double(), sound_norms)
    logits = output.value
    gaps = logits.gather(1, labels[:, None]) - logits
    others = nn.functional.one_hot(labels, logits.shape[-1]) == 0
    radius = gaps / (_pairwise(output)[labels] * _SLACK)
    return radius.masked_fill(~others, torch.inf).amin(-1)

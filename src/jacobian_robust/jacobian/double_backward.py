"""Second derivatives of common layers at the price of the first ones, on a CPU.

The gradient of a Jacobian's norm differentiates the backward pass of every layer. PyTorch's own rules for that are
right but not cheap: the part of a convolution's weights is a convolution with a kernel of the size of the image, twice
the time of the ordinary weight gradient that it equals, and piecewise-linear layers add tensors of zeros for the second
derivatives that they do not have. Within :class:`FastDoubleBackward` the same functions are differentiated by maps that
are each other's derivatives, to any order, and that use the ordinary kernels (``benchmarks/step_cost.py``)::

    with FastDoubleBackward():
        logits = model(inputs)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FastDoubleBackward"]


def _asked_for(node: Any) -> list[bool]:
    """Return for each input of a node whether the running backward pass needs its gradient.

    ``ctx.needs_input_grad`` says only whether an input requires a gradient at all: with it, the pass to the inputs of
    the network would compute the gradients of all weights, and drop them.
    """

    def asked(function: Any) -> bool:
        try:
            return bool(torch._C._will_engine_execute_node(function))
        except (AttributeError, RuntimeError):  # not to be known for a leaf that autograd.grad was asked for
            return True

    return [needed and asked(edge[0]) for needed, edge in zip(node.needs_input_grad, node.next_functions, strict=False)]


class _Geometry(NamedTuple):
    """How a convolution's kernel moves."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def _input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
    """Return the gradient of a convolution's input, of the given shape."""
    if _few_channels(weight.shape, geometry):
        # A matrix product, no larger than the gradient, and its rows added where the kernel lay, take a third to two
        # thirds of the time of the ordinary kernel.
        stride, padding, dilation = map(tuple, geometry[:3])
        patches = torch.bmm(weight.flatten(1).t().expand(shape[0], -1, -1), gradient.flatten(2))
        return F.fold(patches, shape[2:], weight.shape[2:], dilation, padding, stride)
    shape_only = gradient.new_empty(1).expand(shape)
    result: Tensor = _backward(gradient, shape_only, weight, geometry, [True, False, False])[0]
    return result


def _weight_gradient(gradient: Tensor, x: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
    """Return the gradient of a convolution's weight, of the given shape."""
    if _few_channels(shape, geometry):
        # What lay under the kernel, copied, and a matrix product for each image take a third of the time.
        return _product_with_patches(gradient, _patches(x, shape, geometry), shape)
    shape_only = gradient.new_empty(1).expand(shape)
    result: Tensor = _backward(gradient, x, shape_only, geometry, [False, True, False])[1]
    return result


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, asked: list[bool]) -> tuple[Any, ...]:
    """Return the gradients of a convolution's input, weight and bias; None in place of those not asked for."""
    stride, padding, dilation, groups = geometry
    bias_sizes = [len(weight)] if asked[2] else None
    gradients: tuple[Any, ...] = torch.ops.aten.convolution_backward.default(
        gradient, x, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups, asked
    )
    return gradients


def _patches(x: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
    """Return what lies under a kernel of the given shape, a column for each of its places: (batch, kernel, places)."""
    (up, left), (down, right) = geometry.padding, geometry.stride
    lain = F.pad(x, (left, left, up, up)).unfold(2, shape[2], down).unfold(3, shape[3], right)
    return lain.permute(0, 1, 4, 5, 2, 3).reshape(len(x), shape[1:].numel(), -1)


def _product_with_patches(gradient: Tensor, patches: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient of a convolution's weight, of the given shape, from what lay under it."""
    return torch.bmm(gradient.flatten(2), patches.mT).sum(0).view(shape)


def _few_channels(shape: torch.Size, geometry: _Geometry) -> bool:
    """Return whether a kernel of the given shape sees an image's few channels, and gives more than it takes."""
    few = geometry.groups == 1 and shape[1] <= 3 and shape[1:].numel() <= shape[0]
    return few and geometry.dilation == [1, 1]


class _NoContext:
    """Stands for the context of a function whose derivative nobody will ask for."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep nothing."""


def _call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply a function, in the last derivative without the price of making a graph."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


class _Convolution(torch.autograd.Function):
    """The output of a convolution; with the two gradients below, one trilinear form seen from its three sides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return torch.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        asked = (*_asked_for(ctx), False)[:3]
        if not torch.is_grad_enabled() and not _few_channels(weight.shape, ctx.geometry):
            # The last derivative: all at once is cheaper.
            return *_backward(gradient, x, weight, ctx.geometry, list(asked)), None
        return (
            _call(_ConvolutionInput, gradient, weight, x.shape, ctx.geometry) if asked[0] else None,
            _call(_ConvolutionWeight, gradient, x, weight.shape, ctx.geometry) if asked[1] else None,
            gradient.sum((0, 2, 3)) if asked[2] else None,
            None,
        )


class _ConvolutionInput(torch.autograd.Function):
    """The gradient of a convolution's input."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.geometry = geometry
        return _input_gradient(gradient, weight, shape, geometry)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        asked = _asked_for(ctx)
        if not torch.is_grad_enabled() and all(asked[:2]) and _few_channels(weight.shape, ctx.geometry):
            # The last derivative: both of the same patches.
            patches = _patches(x, weight.shape, ctx.geometry)
            to_gradient = torch.bmm(weight.flatten(1).expand(len(x), -1, -1), patches).view_as(gradient)
            return to_gradient, _product_with_patches(gradient, patches, weight.shape), None, None
        return (
            _call(_Convolution, x, weight, None, ctx.geometry) if asked[0] else None,
            _call(_ConvolutionWeight, gradient, x, weight.shape, ctx.geometry) if asked[1] else None,
            None,
            None,
        )


class _ConvolutionWeight(torch.autograd.Function):
    """The gradient of a convolution's weight."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(gradient, x)
        ctx.geometry = geometry
        return _weight_gradient(gradient, x, shape, geometry)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x = ctx.saved_tensors
        asked = _asked_for(ctx)
        return (
            _call(_Convolution, x, weight, None, ctx.geometry) if asked[0] else None,
            _call(_ConvolutionInput, gradient, weight, x.shape, ctx.geometry) if asked[1] else None,
            None,
            None,
        )


_MANY = 2**16
"""Elements of a linear layer's weight from which collecting its gradient's factors takes less time than it saves."""


class _Factors:
    """The factors of a weight's gradient, those of the backward pass that runs."""

    def __init__(self) -> None:
        self._pass: int | None = None
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []

    def add(self, left: Tensor, right: Tensor) -> Tensor | None:
        """Return the gradient ``leftᵀ right`` if it is to be differentiated, and keep the factors if it is not."""
        if torch.is_grad_enabled():
            return left.t() @ right
        running = torch._C._current_graph_task_id()
        if running != self._pass:  # what is there was left by one that failed
            self._pass, self._left, self._right = running, [], []
        self._left.append(left)
        self._right.append(right)
        return None

    def product(self) -> Tensor | None:
        """Return the sum of all gradients, and forget them."""
        left, right = self._left, self._right
        current = self._pass == torch._C._current_graph_task_id()
        self._pass, self._left, self._right = None, [], []
        return torch.cat(left).t() @ torch.cat(right) if current else None


class _Weight(torch.autograd.Function):
    """A linear layer's weight, as all products of a forward pass and of its derivatives use it.

    In the last derivative they do not each make a gradient of its size and have it added to the others': they leave
    its two factors here, one matrix product for all. This node runs after all that lead to it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factors: _Factors) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.factors = factors
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        product = ctx.factors.product()
        return (gradient if product is None else product if gradient is None else gradient + product), None


class _Linear(torch.autograd.Function):
    """A linear layer's output for a matrix of inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factors: _Factors) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        asked = (*_asked_for(ctx), False)[:3]
        return (
            _call(_LinearInput, gradient, weight, ctx.factors) if asked[0] else None,
            ctx.factors.add(gradient, x) if asked[1] else None,
            gradient.sum(0) if asked[2] else None,
            None,
        )


class _LinearInput(torch.autograd.Function):
    """The gradient of a linear layer's input."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, factors: _Factors) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.factors = factors
        return gradient @ weight

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        asked = _asked_for(ctx)
        return (
            _call(_Linear, x, weight, None, ctx.factors) if asked[0] else None,
            ctx.factors.add(gradient, x) if asked[1] else None,
            None,
        )


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _call(_Masked, gradient, *ctx.saved_tensors)


class _Masked(torch.autograd.Function):
    """A gradient where the output of a ReLU is positive, a constant for all derivatives."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward.default(gradient, y, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        return _call(_Masked, gradient, *ctx.saved_tensors), None


class _Window(NamedTuple):
    """Where a pooling looks: the shape of its input, then the arguments of torch's operator."""

    shape: torch.Size
    arguments: tuple[list[int], list[int], list[int], list[int], bool]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Window) -> Tensor:
        y, index = torch.ops.aten.max_pool2d_with_indices.default(x, *window.arguments)
        ctx.save_for_backward(index)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        return _call(_Scattered, gradient, *ctx.saved_tensors, ctx.window), None


class _ReLUMaxPool(torch.autograd.Function):
    """Max pooling of a ReLU's output, as a function of its input: masks the few maxima, not all of the image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rectified: Tensor, window: _Window) -> Tensor:
        y, index = torch.ops.aten.max_pool2d_with_indices.default(rectified, *window.arguments)
        ctx.save_for_backward(y, index)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None, None]:
        y, index = ctx.saved_tensors
        return _call(_Scattered, _call(_Masked, gradient, y), index, ctx.window), None, None


class _Scattered(torch.autograd.Function):
    """What is given to each maximum, put where the maximum was; the transpose of :class:`_Gathered`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, index: Tensor, window: _Window) -> Tensor:
        ctx.save_for_backward(index)
        ctx.window = window
        shape_only = gradient.new_empty(1).expand(window.shape)
        backward = torch.ops.aten.max_pool2d_with_indices_backward.default
        return backward(gradient, shape_only, *window.arguments, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None, None]:
        return _call(_Gathered, gradient, *ctx.saved_tensors, ctx.window), None, None


class _Gathered(torch.autograd.Function):
    """What lies where each maximum was."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, window: _Window) -> Tensor:
        ctx.save_for_backward(index)
        ctx.window = window
        return x.flatten(-2).gather(-1, index.flatten(-2)).view_as(index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None, None]:
        return _call(_Scattered, gradient, *ctx.saved_tensors, ctx.window), None, None


def _pair(value: int | tuple[int, ...] | list[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = _Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    return _Convolution.apply(input, weight, bias, geometry)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim != 2 or weight.ndim != 2 or not weight.requires_grad or weight.numel() < _MANY:
        return F.linear(input, weight, bias)
    factors = _Factors()
    product: Tensor = _Linear.apply(input, _Weight.apply(weight, factors), bias, factors)
    return product


def _relu(input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return F.relu(input, inplace=True)
    y: Any = _ReLU.apply(input)
    y._rectified = input, y._version  # for a max pooling that follows
    return y


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices:
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    kernel = _pair(kernel_size)
    arguments = (kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode)
    window = _Window(input.shape, arguments)
    x, version = getattr(input, "_rectified", (None, None))
    if version == input._version:
        return _ReLUMaxPool.apply(x, input.detach(), window)
    return _MaxPool.apply(input, window)


_FAST: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: _conv2d,
    F.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.max_pool2d: _max_pool2d,
}


class FastDoubleBackward(TorchFunctionMode):
    """A context in which the layers of a forward pass are made so that their second derivatives are cheap.

    Two-dimensional convolutions, linear layers of many weights, ReLU and max pooling, in float32 and float64 on a CPU;
    everything else, and everything under autocast or :mod:`torch.func`, stays torch's own. Values and derivatives of
    any order are the same up to rounding; only the output of a ReLU that is pooled is no longer on the way from the
    pooled output to the input.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a fast version where there is one."""
        kwargs = kwargs or {}
        fast = _FAST.get(function)
        if fast is None or not self._applies(args[0] if args else kwargs.get("input")):
            return function(*args, **kwargs)
        return fast(*args, **kwargs)

    @staticmethod
    def _applies(x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._functorch.peek_interpreter_stack()
        )

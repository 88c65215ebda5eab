"""Upper bounds of a network's l2 Lipschitz constant, and the pairwise margin certificate they give.

Never by power iteration, which bounds the norm from below. Computed in float64; sound over the reals up to the
rounding of a singular value decomposition, for which each norm is raised by 1e-9 of itself.
"""

import copy
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["lipschitz_constant", "lipschitz_margin"]

_SLACK = 1 + 1e-9


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach(), 2)) * _SLACK


def _convolution(layer: nn.Conv2d) -> float:
    """Return the least of three bounds that hold for zero padding, or none, and any stride.

    ``√(‖T‖₁‖T‖∞)``; the sum of the norms of the kernel's taps; the norm of the kernel as a matrix of patches times the
    root of the number of patches a pixel lies in.
    """
    if layer.groups != 1 or layer.padding_mode != "zeros":
        raise ValueError("bounds: Conv2d with groups or another padding than zeros has no Lipschitz rule")
    weight = layer.weight
    absolute = weight.detach().abs().sum((2, 3))
    overlap = 1
    for kernel, stride, dilation in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True):
        overlap *= math.ceil(kernel / stride) if dilation == 1 else kernel
    taps = sum(_spectral(tap) for tap in weight.flatten(2).unbind(-1))
    rows = math.sqrt(float(absolute.sum(1).max() * absolute.sum(0).max())) * _SLACK
    return min(rows, taps, math.sqrt(overlap) * _spectral(weight.flatten(1)))


def _factor(layer: nn.Module) -> float:
    if isinstance(layer, nn.Linear):
        return _spectral(layer.weight)
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer)
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        if getattr(layer, "dilation", 1) not in (1, (1, 1)) or getattr(layer, "divisor_override", None) is not None:
            raise ValueError(f"bounds: {layer} has no Lipschitz rule: its windows overlap, or weigh, otherwise")
        size, stride = (v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride))
        return math.sqrt(math.prod(math.ceil(k / s) for k, s in zip(size, stride, strict=True)))
    if isinstance(layer, nn.LeakyReLU):
        return max(1.0, abs(layer.negative_slope))
    if isinstance(layer, nn.Softplus) and layer.threshold < 20:
        raise ValueError("bounds: Softplus with a threshold below 20 falls there and has no Lipschitz rule")
    if isinstance(layer, nn.ReLU | nn.Tanh | nn.Softplus | nn.Flatten | nn.Identity):
        return 1.0
    if isinstance(layer, nn.Sigmoid):
        return 0.25
    raise ValueError(f"bounds: the layer {type(layer).__name__} has no Lipschitz rule")


def _layers(model: nn.Module) -> list[nn.Module]:
    if type(model) is not nn.Sequential:
        return [model]
    return [layer for child in model for layer in _layers(child)]


def lipschitz_constant(model: nn.Module) -> float:
    """Return an upper bound of the l2 Lipschitz constant of an ``nn.Sequential``: the product of its layers' bounds.

    Raises:
        ValueError: if the model is no ``nn.Sequential`` of layers with a rule; the layer is named.
    """
    return math.prod(_factor(layer) for layer in _layers(copy.deepcopy(model).double()))


@torch.no_grad()
def lipschitz_margin(
    model: nn.Module, inputs: Float[Tensor, "batch *shape"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return the certified l2 radius ``min_j (s_y − s_j)/(‖W_y − W_j‖ L')``, in float64; not positive: none.

    ``W`` is the last layer's weight, ``L'`` the bound of all layers before it.

    Raises:
        ValueError: as :func:`lipschitz_constant`, and if the last layer is not linear.
    """
    layers = _layers(copy.deepcopy(model).double())
    last = layers[-1]
    if not isinstance(last, nn.Linear):
        raise ValueError("bounds: lipschitz_margin needs a last layer that is linear")
    logits = nn.Sequential(*layers)(inputs.double())
    gaps = logits.gather(1, labels[:, None]) - logits
    norms = (last.weight[labels][:, None] - last.weight).norm(dim=-1)
    others = nn.functional.one_hot(labels, logits.shape[-1]) == 0
    features = math.prod(map(_factor, layers[:-1]))
    radius = gaps / (norms * features * _SLACK)
    return radius.masked_fill(~others, torch.inf).amin(-1)

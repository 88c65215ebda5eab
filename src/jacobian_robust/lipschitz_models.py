"""Classifiers that are 1-Lipschitz in ℓ2 by construction, of orthogonal layers: pixels in [0, 1] in, logits out.

``orthogonium`` was taken, not ``deel-torchlip``, whose convolutions are divided by a bound of their norm and so shrink
distances; those of the first are orthogonal, also with a stride. ``certificate=lipschitz`` relies on neither: it bounds
the weights that a layer computes.
"""

import itertools
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, Strict, validate_call
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from jacobian_robust.errors import UserError
from jacobian_robust.options import STRICT

__all__ = ["LipschitzLeNet", "LipschitzMLP", "SortedPairs", "compute_orthogonal_weights_once"]


def sorted_pairs(inputs: Float[Tensor, "batch channels *rest"]) -> Float[Tensor, "batch channels *rest"]:
    """Return the larger ones of channels ``i`` and ``i + n/2``, then the smaller ones: a sort, so that no norm changes.

    MaxMin, by Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", 2019. Bounds know it by its name.
    """
    if has_torch_function_unary(inputs):
        result: Tensor = handle_torch_function(sorted_pairs, (inputs,), inputs)
        return result
    first, second = inputs.chunk(2, 1)
    return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], 1)


class SortedPairs(nn.Module):
    """:func:`sorted_pairs` as a layer."""

    def forward(self, inputs: Float[Tensor, "batch channels *rest"]) -> Float[Tensor, "batch channels *rest"]:
        """Return the sorted pairs."""
        return sorted_pairs(inputs)


class _Orthogonal:
    """Makes orthogonal layers of the library orthogonium (Boissin et al., 2025).

    Their weights are QR factors: the same at each pass, unlike the library's default, whose power iteration moves on
    with every one, in evaluation too.

    Raises:
        UserError: if the library is not installed.
    """

    def __init__(self) -> None:
        try:
            from orthogonium import layers, reparametrizers  # an extra
            from orthogonium.model_factory.classparam import ClassParam
        except ImportError as error:
            raise UserError(
                "model=lipschitz_lenet and lipschitz_mlp need the package orthogonium: pip install "
                "jacobian-robust[lipschitz]"
            ) from error
        self._layers = layers
        self._parameters = reparametrizers.OrthoParams(
            spectral_normalizer=ClassParam(reparametrizers.BatchedIdentity),
            orthogonalizer=ClassParam(reparametrizers.BatchedQROrthogonalization),
        )

    def linear(self, before: int, after: int) -> nn.Module:
        """Return a layer with orthonormal rows, or columns if these are fewer."""
        layer: nn.Module = self._layers.OrthoLinear(before, after, ortho_params=self._parameters)
        return layer

    def halving(self, before: int, after: int) -> nn.Module:
        """Return a convolution of 4×4 with stride 2, orthogonal but for its border of zeros."""
        options = {"kernel_size": 4, "stride": 2, "padding": 1, "padding_mode": "zeros"}
        layer: nn.Module = self._layers.AdaptiveOrthoConv2d(before, after, ortho_params=self._parameters, **options)
        return layer


Even = Annotated[int, Strict(), Field(gt=1, le=10**4, multiple_of=2)]


class LipschitzLeNet(nn.Module):
    """1-Lipschitz in ℓ2 by construction: two orthogonal strided convolutions, two orthogonal layers, sorted pairs.

    Args:
        classes: number of logits.
        channels: channels of the images.
        image_size: height and width of the images, in pixels, a multiple of 4.
        first: channels of the first convolution.
        second: and of the second, at least ``first``.
        hidden: width of the hidden layer.

    Raises:
        UserError: if the library orthogonium is not installed.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(10, ge=1, le=10**5),
        channels: int = Field(1, gt=0, le=10**4),
        image_size: int = Field(28, ge=4, le=256, multiple_of=4),
        *,
        first: Even = 32,
        second: Even = 64,
        hidden: Even = 128,
    ) -> None:
        super().__init__()
        made = _Orthogonal()
        self.layers = nn.Sequential(
            *(made.halving(channels, first), SortedPairs(), made.halving(first, second), SortedPairs(), nn.Flatten()),
            *(made.linear(second * (image_size // 4) ** 2, hidden), SortedPairs(), made.linear(hidden, classes)),
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.layers(images)
        return logits


class LipschitzMLP(nn.Module):
    """1-Lipschitz in ℓ2 by construction: orthogonal linear layers and sorted pairs.

    Args:
        classes: number of logits.
        inputs: numbers in an image.
        width: of the hidden layers.
        depth: number of hidden layers.

    Raises:
        UserError: if the library orthogonium is not installed.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(10, ge=1, le=10**5),
        inputs: int = Field(784, gt=0, le=10**6),
        width: Even = 256,
        depth: int = Field(3, gt=0, le=10**3),
    ) -> None:
        super().__init__()
        made, sizes = _Orthogonal(), [inputs, *[width] * depth]
        hidden = [
            layer
            for before, after in itertools.pairwise(sizes)
            for layer in (made.linear(before, after), SortedPairs())
        ]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, made.linear(width, classes))

    def forward(self, images: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.layers(images)
        return logits


def compute_orthogonal_weights_once(model: nn.Module) -> None:
    """Put torch's own layers in the place of orthonormal ones, with the weights that these compute at each pass."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            orthogonal = any(made.__module__.startswith("orthogonium") for made in type(child).__mro__)
            if orthogonal and isinstance(child, nn.Conv2d | nn.Linear):
                setattr(module, name, _plain(child))


def _plain(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Return torch's own layer with the weight that an orthogonal one computes."""
    made: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Linear):
        made = nn.Linear(layer.in_features, layer.out_features)
    else:
        sizes = (layer.kernel_size, layer.stride, layer.padding)
        made = nn.Conv2d(layer.in_channels, layer.out_channels, *sizes)  # type: ignore[arg-type]
    assert layer.bias is not None
    assert made.bias is not None
    with torch.no_grad():
        made.weight.copy_(layer.weight)
        made.bias.copy_(layer.bias)
    return made.to(layer.bias.device, layer.bias.dtype).train(layer.training)

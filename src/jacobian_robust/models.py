"""Classifiers: pixels in [0, 1] in, logits out. A model that wants normalised pixels normalises them itself."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, validate_call
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jacobian_robust.errors import UserError, describe
from jacobian_robust.lipschitz_models import LipschitzLeNet, LipschitzMLP, compute_orthogonal_weights_once
from jacobian_robust.options import STRICT

__all__ = [
    "MLP",
    "ConvPixels",
    "ConvSmall",
    "LeNet",
    "LipschitzLeNet",
    "LipschitzMLP",
    "PixelInput",
    "ResNet18",
    "SinglePrecision",
    "Timm",
    "TorchVision",
]

Activation = Literal["relu", "elu", "gelu", "silu", "softplus", "tanh"]

_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class _Orthonormal(nn.Module):
    """A weight's matrix, ``(out, …)`` flattened, with orthonormal rows, or columns if these are fewer: ``Q`` of its QR.

    A convolution's is divided by the root of its kernel's area, in so many patches a pixel lies: with stride one and no
    padding the layer is then 1-Lipschitz, as in Parseval networks (Cisse et al., 2017). torch's own
    ``parametrizations.orthogonal`` multiplies Householder reflections, whose gradient takes minutes for LeNet's 128 ×
    9216.
    """

    def forward(self, weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
        matrix = weight.flatten(1)
        wide = matrix.shape[0] < matrix.shape[1]
        q, r = torch.linalg.qr(matrix.mT if wide else matrix)
        q = torch.where(r.diagonal() < 0, -q, q)  # the one factor that is continuous in the weight
        return (q.mT if wide else q).reshape(weight.shape) / weight[0, 0].numel() ** 0.5


def compute_orthonormal_weights_once(model: nn.Module) -> None:
    """Store the weights that :class:`_Orthonormal` computes: the same bits, without a QR at each pass.

    Other parametrizations are left alone: torch's spectral norm, for one, would compute another weight here.
    """
    compute_orthogonal_weights_once(model)
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            (*made_by,) = layer.parametrizations["weight"]  # type: ignore[index]
            if all(isinstance(module, _Orthonormal) for module in made_by):
                parametrize.remove_parametrizations(layer, "weight")


class LeNet(nn.Module):
    """The note's LeNet: conv3×3(32)-ReLU-conv3×3(64)-ReLU-maxpool2-fc128-ReLU-fc10 (section 4.2).

    Args:
        classes: number of logits.
        channels: channels of the images.
        image_size: height and width of the images, in pixels.
        activation: what stands for ReLU; the others have a derivative everywhere, all but ELU infinitely many.
        pooling: of the 2×2 squares, their ``max`` or, which is smooth, their ``average``.
        orthogonal: keep the weights of all layers but the last, which is free to scale the logits, orthonormal: the map
            to what the last layer is given is then 1-Lipschitz, if the activation is (ELU, ReLU, softplus, tanh).
        double_softmax: return probabilities where logits belong. The note's published networks most likely did:
            cross-entropy and attacks then apply the softmax a second time, which holds the loss above
            ``-log(e / (e + 9)) = 1.461`` for ten classes and weakens the attacks' gradients. For reproduction only.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(10, ge=1, le=10**5),
        channels: int = Field(1, gt=0, le=10**4),
        image_size: int = Field(28, ge=6, le=256),
        *,
        activation: Activation = "relu",
        pooling: Literal["max", "average"] = "max",
        orthogonal: bool = False,
        double_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.double_softmax = double_softmax
        pooled = (image_size - 4) // 2
        activated = _ACTIVATIONS[activation]
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, kernel_size=3),
            activated(),
            nn.Conv2d(32, 64, kernel_size=3),
            activated(),
            nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * pooled**2, 128),
            activated(),
            nn.Linear(128, classes),
        )
        if orthogonal:
            for layer in self.layers[:-1]:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    parametrize.register_parametrization(layer, "weight", _Orthonormal())

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.layers(images)
        return logits.softmax(-1) if self.double_softmax else logits


class ConvSmall(nn.Module):
    """Strided and without pooling: conv5×5/2-ReLU-conv4×4/2-ReLU-fc-ReLU-fc. Interval bounds are tight on it.

    Args:
        classes: number of logits.
        channels: channels of the images.
        image_size: height and width of the images, in pixels.
        first: channels of the first convolution.
        second: and of the second.
        hidden: width of the hidden layer.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(10, ge=1, le=10**5),
        channels: int = Field(1, gt=0, le=10**4),
        image_size: int = Field(28, ge=11, le=256),
        *,
        first: int = Field(32, gt=0, le=10**4),
        second: int = Field(64, gt=0, le=10**4),
        hidden: int = Field(256, gt=0, le=10**4),
    ) -> None:
        super().__init__()
        size = ((image_size - 5) // 2 + 1 - 4) // 2 + 1
        self.layers = nn.Sequential(
            nn.Conv2d(channels, first, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=4, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * size**2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.layers(images)
        return logits


class ConvPixels(nn.Module):
    """Convolutions that keep the image's size, for a class of each pixel: four of 3×3, ever further apart, and one 1×1.

    A pixel's logits depend on the 17×17 pixels around it.

    Args:
        classes: number of logits of a pixel.
        channels: channels of the images, of any size.
        width: channels of the hidden layers.
        activation: what stands for ReLU.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(11, ge=2, le=10**5),
        channels: int = Field(1, gt=0, le=10**4),
        width: int = Field(32, gt=0, le=10**4),
        *,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, spacing in ((channels, 1), (width, 1), (width, 2), (width, 4)):
            layers += [nn.Conv2d(before, width, 3, padding=spacing, dilation=spacing), _ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, classes, 1))

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return the logits of each pixel of images with pixels in [0, 1]."""
        logits: Tensor = self.layers(images)
        return logits


class MLP(nn.Module):
    """A small network of infinitely differentiable layers, for which curvature is defined everywhere.

    Args:
        classes: number of logits.
        inputs: numbers in an image.
        width: of the hidden layers.
        depth: number of hidden layers.
        activation: ``tanh``, or ``softplus``.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(3, ge=1, le=10**5),
        inputs: int = Field(2, gt=0, le=10**6),
        width: int = Field(32, gt=0, le=10**4),
        depth: int = Field(2, gt=0, le=10**3),
        activation: Literal["tanh", "softplus"] = "tanh",
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        hidden = [
            layer
            for before, after in itertools.pairwise(sizes)
            for layer in (nn.Linear(before, after), _ACTIVATIONS[activation]())
        ]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))

    def forward(self, images: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1], which the network itself moves to [-3, 3]."""
        logits: Tensor = self.layers(6 * images - 3)
        return logits


class ResNet18(nn.Module):
    """torchvision's ResNet-18 (He et al., 2016) for images of few pixels: a 3×3 stem with stride 1 and no max pooling.

    Args:
        classes: number of logits.
        channels: channels of the images, of any size.
        norm: ``group``: group normalisation (Wu & He, 2018) in 32 groups, which sees one image alone; ``batch``: batch
            normalisation, whose statistics make the images of a training batch influence each other: a penalty on the
            Jacobian differentiates the batch's sum; ``none``: branches that begin at zero instead (Zhang et al., 2019,
            Fixup, without its scalars).
        activation: what stands for ReLU.
        width: channels of the first stage, an even number; 64 is ResNet-18's. Narrower ones have fewer groups.
        channels_last: let the convolutions have their channels last in memory, which GPUs are faster with in half
            precision.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        classes: int = Field(10, ge=1, le=10**5),
        channels: int = Field(3, gt=0, le=10**4),
        *,
        norm: Literal["group", "batch", "none"] = "group",
        activation: Activation = "relu",
        width: int = Field(64, ge=4, le=1024, multiple_of=2),
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        made: dict[str, Callable[[int], nn.Module]] = {
            "group": lambda of: nn.GroupNorm(math.gcd(32, width // 2), of),
            "batch": nn.BatchNorm2d,
            "none": nn.Identity,
        }
        from torchvision.models.resnet import BasicBlock, ResNet  # not at the top: it takes seconds

        class Narrow(ResNet):  # type: ignore[misc]  # torchvision has no types
            """As many times narrower as its first stage."""

            inplanes: int

            def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
                self.inplanes = width if planes == 64 else self.inplanes
                return super()._make_layer(block, planes * width // 64, *arguments, **options)

        self.layers = Narrow(BasicBlock, [2, 2, 2, 2], num_classes=classes, norm_layer=made[norm])
        self.layers.conv1 = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.layers.conv1.weight, mode="fan_out", nonlinearity="relu")  # as all others there
        self.layers.maxpool = nn.Identity()
        if width != 64:
            self.layers.bn1, self.layers.fc = made[norm](width), nn.Linear(8 * width, classes)
        blocks = [module for module in self.layers.modules() if isinstance(module, BasicBlock)]
        for module in (self.layers, *blocks):  # an operation in place leaves no room for a second derivative
            module.relu = _ACTIVATIONS[activation]()
        with torch.no_grad():
            for block in blocks if norm == "none" else ():
                block.conv1.weight.mul_(len(blocks) ** -0.5)
                block.conv2.weight.zero_()
        if channels_last:  # what a convolution returns follows its weight
            self.to(memory_format=torch.channels_last)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1], which the network itself moves to [-1, 1]."""
        logits: Tensor = self.layers(2 * images - 1)
        return logits


def _twice_differentiable(model: nn.Module) -> nn.Module:
    """Return a library's model without operations in place and fused attention, which have no second derivative."""
    for module in model.modules():
        for switch in ("inplace", "fused_attn"):
            if hasattr(module, switch):
                setattr(module, switch, False)
    return model


class Timm(nn.Module):
    """A classifier of the library ``timm`` by its name, with new weights.

    Args:
        name: as ``resnet18`` or ``vit_tiny_patch16_224``.
        classes: number of logits.
        in_chans: channels of the images.
        image_size: height and width of the images, for models that have to know it.

    Raises:
        UserError: if timm is not installed, or has no such model.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        name: str | None = Field(None, pattern=r"^\w+(\.\w+)?$"),  # no address: nothing is fetched on a file's word
        classes: int = Field(10, ge=2, le=10**5),
        in_chans: int = Field(3, gt=0, le=10**4),
        image_size: int | None = Field(None, gt=0, le=10**4),
    ) -> None:
        super().__init__()
        if name is None:
            raise UserError("model.name is missing: give model.name=NAME, one of timm's models, as resnet18")
        try:
            import timm  # an extra
        except ImportError as error:
            raise UserError("model=timm needs the package timm: pip install jacobian-robust[timm]") from error
        more = {} if image_size is None else {"img_size": image_size}
        try:
            made = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=in_chans, **more)
        except Exception as error:  # each of its models can fail in its own way
            raise UserError(f"model.name={name}: timm cannot make it ({describe(error)})") from error
        self.layers = _twice_differentiable(made)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1], which the network itself moves to [-1, 1]."""
        logits: Tensor = self.layers(2 * images - 1)
        return logits


class TorchVision(nn.Module):
    """A classifier of torchvision by its name, with new weights, for images in colour.

    Args:
        name: as ``resnet50`` or ``convnext_tiny``.
        classes: number of logits.

    Raises:
        UserError: if torchvision has no such model.
    """

    @validate_call(config=STRICT)
    def __init__(
        self, name: str | None = Field(None, pattern=r"^\w+$"), classes: int = Field(10, ge=2, le=10**5)
    ) -> None:
        super().__init__()
        if name is None:
            raise UserError("model.name is missing: give model.name=NAME, one of torchvision's models, as resnet50")
        from torchvision.models import get_model  # not at the top: it takes seconds

        try:
            self.layers = _twice_differentiable(get_model(name, weights=None, num_classes=classes))
        except Exception as error:  # each of its models can fail in its own way
            raise UserError(f"model.name={name}: torchvision cannot make it ({describe(error)})") from error

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """Return what the network does for images with pixels in [0, 1], which it is given in [-1, 1]."""
        return self.layers(2 * images - 1)


class PixelInput(nn.Module):
    """A classifier of pixels in [0, 1] around one of other numbers, ``(low + (high − low)·pixel − mean) / std``.

    Args:
        model: returns logits.
        low: what it was given for a pixel of 0.
        high: and for a pixel of 1, before the normalisation.
        mean: subtracted then, of each channel or of all.
        std: divided by then, of each channel or of all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        low: float = 0.0,
        high: float = 1.0,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.low, self.high = low, high
        self.mean, self.std = (nn.Buffer(torch.as_tensor(value).float().reshape(-1, 1, 1)) for value in (mean, std))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.model((self.low + (self.high - self.low) * images - self.mean) / self.std)
        return logits


class SinglePrecision(nn.Module):
    """A classifier whose logits are float32, which the attack libraries expect, around one with others.

    Args:
        model: returns logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with pixels in [0, 1]."""
        logits: Tensor = self.model(images)
        return logits.float()

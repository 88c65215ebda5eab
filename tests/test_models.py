import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from jacobian_robust.checkpoints import Checkpoint, export, load_checkpoint
from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.jacobian.checks import check_model
from jacobian_robust.models import LeNet, ResNet18


def test_the_double_softmax_returns_the_probabilities_and_bounds_the_loss_from_below():
    torch.manual_seed(0)
    plain = LeNet()
    double = LeNet(double_softmax=True)
    double.load_state_dict(plain.state_dict())
    images = torch.rand(16, 1, 28, 28)
    torch.testing.assert_close(double(images), plain(images).softmax(-1))
    # However the weights are chosen: each output is a probability, and the best is to be certain and right.
    losses = torch.nn.functional.cross_entropy(double(images), torch.arange(16) % 10, reduction="none")
    assert (losses > math.log(1 + 9 / math.e)).all()


SMOOTH = ["softplus", "silu", "gelu", "tanh"]


def small(**options):
    torch.manual_seed(0)
    return LeNet(image_size=8, **options).double()


def images(size=8, channels=1):
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("activation", [*SMOOTH, "elu", "relu"])
def test_of_the_activations_all_but_two_have_a_continuous_second_derivative(activation):
    """At 0, where the two have their kink, from its two sides: the slope of the derivative."""
    x = torch.tensor([-1e-9, 1e-9], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(small(activation=activation).layers[1](x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x) if slope.requires_grad else (torch.zeros(2),)
    jumps = (slope[0] - slope[1]).abs() > 1e-3, (curvature[0] - curvature[1]).abs() > 1e-3
    assert jumps == (activation == "relu", activation == "elu")


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("activation", ["relu", "elu", *SMOOTH])
def test_every_lenet_can_be_trained_with_a_penalty(activation, orthogonal, pooling):
    model = LeNet(image_size=8, activation=activation, orthogonal=orthogonal, pooling=pooling)
    check_model(model, images().float())  # raises no error
    x = images().float().requires_grad_()
    norm = frobenius_norm(model(x), x, create_graph=True).sum()
    gradients = torch.autograd.grad(norm, [weight for weight in model.parameters() if weight.ndim > 1])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def largest_stretch(function, x):
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: function(image[None])[0]))(x)
    return torch.linalg.matrix_norm(jacobian.flatten(2), 2).max().item()


@pytest.mark.parametrize("activation", ["relu", "elu", "softplus", "tanh"])
def test_orthonormal_layers_stretch_nothing(activation):
    model = small(orthogonal=True, activation=activation)
    with torch.no_grad():  # whatever an optimizer makes of them
        for parameter in model.parameters():
            parameter.copy_(10 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    assert 0 < largest_stretch(model.layers[:-1], images()) <= 1
    assert largest_stretch(small(activation=activation, orthogonal=False).layers[:-1], 50 * images()) > 0
    for layer in (model.layers[0], model.layers[2], model.layers[6]):
        matrix = layer.weight.flatten(1) * (3 if layer.weight.ndim == 4 else 1)
        singular = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(singular, torch.ones_like(singular))


def test_the_gradient_of_the_norm_goes_through_the_orthonormal_weights():
    """By finite differences of what the optimizer moves, in a smooth network."""
    model, x = small(orthogonal=True, activation="tanh", pooling="average"), images().requires_grad_()
    weight = model.layers[2].parametrizations.weight.original

    def norm():
        return frobenius_norm(model(x), x, create_graph=True).sum()

    (gradient,) = torch.autograd.grad(norm(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        values.append(norm().item())
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_orthonormal_weights_are_exported_and_read_back_as_what_they_are(tmp_path):
    torch.manual_seed(0)
    model = LeNet(image_size=8, orthogonal=True)
    config = {"model": {"_target_": "jacobian_robust.models.LeNet", "image_size": 8, "orthogonal": True}}
    export(Checkpoint(None, None, config, model.state_dict(), epochs=1), tmp_path / "model.safetensors")
    read = load_checkpoint(tmp_path / "model.safetensors").model()
    x = images().float()
    assert torch.equal(read(x), model(x))
    # Computed once, not at each of an attack's steps.
    assert not any(parametrize.is_parametrized(module) for module in read.modules())
    assert any(parametrize.is_parametrized(module) for module in model.modules())


def test_a_spectral_norm_is_loaded_as_it_was_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(64, 5)))
    trained = copy.deepcopy(model).eval()
    read = Checkpoint(Path("model.pt"), None, state_dict=trained.state_dict()).model(model)
    x = images().float()
    assert torch.equal(read(x), trained(x))


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_the_resnet_takes_small_images_and_keeps_their_size_through_its_stem(channels, size):
    torch.manual_seed(0)
    model = ResNet18(classes=7, channels=channels)
    x = images(size, channels).float()
    shapes = []
    model.layers.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert model(x).shape == (4, 7)
    assert shapes == [(4, 64, size, size)]
    # ResNet-18 for ImageNet has 11,689,512: this one a stem of 3×3, another head, and as many norms.
    stem, head = 64 * channels * 9 - 64 * 3 * 49, 513 * 7 - 513 * 1000
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512 + stem + head


def test_the_resnet_normalises_an_image_by_itself_unless_asked_to_by_the_batch():
    torch.manual_seed(0)
    x = images(8, 3).float()
    check_model(ResNet18(width=8), x)  # raises no error
    batched = ResNet18(norm="batch", width=8)
    with pytest.warns(UserWarning, match=r"layers\.bn1 \(BatchNorm2d\), 19 more: .*GroupNorm"):
        check_model(batched, x)
    check_model(batched.eval(), x)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_a_narrow_resnet_has_the_norm_and_activation_that_were_asked_for(norm, activation):
    torch.manual_seed(0)
    model = ResNet18(classes=5, norm=norm, activation=activation, width=8).double()
    x = images(8, 3)
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count({"group": "GroupNorm", "batch": "BatchNorm2d", "none": "Identity"}[norm]) == 20 + (
        norm == "none"
    )
    assert kinds.count({"relu": "ReLU", "gelu": "GELU", "silu": "SiLU"}[activation]) == 9
    assert model.layers.fc.weight.shape == (5, 64)
    logits = model.eval()(x)
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 10


def a_narrow_resnet(**options):
    torch.manual_seed(0)
    return ResNet18(classes=5, activation="gelu", width=8, **options)


def norm_and_gradient(model, x, *, half=False):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(x)
    norm = frobenius_norm(logits.float() if half else logits, x, create_graph=True)
    return norm.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(norm.sum(), list(model.parameters()))])


def test_channels_last_changes_the_order_in_memory_alone():
    plain, last = a_narrow_resnet().double(), a_narrow_resnet(channels_last=True).double()
    x = images(8, 3)
    assert last.layers.conv1(x).is_contiguous(memory_format=torch.channels_last)
    assert not plain.layers.conv1(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm_and_gradient(last, x), norm_and_gradient(plain, x))


def test_half_precision_keeps_the_digits_of_the_norm():
    x = images(8, 3).float()
    norm, _ = norm_and_gradient(a_narrow_resnet(), x)
    half, gradient = norm_and_gradient(a_narrow_resnet(channels_last=True), x, half=True)
    assert half.dtype == gradient.dtype == torch.float32
    assert ((half - norm).abs() / norm).max() < 0.03  # bfloat16 has a resolution of 0.008
    assert gradient.isfinite().all()

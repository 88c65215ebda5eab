import pytest
import torch
from torch import nn

from jacobian_robust.jacobian.checks import check_model
from jacobian_robust.models import LeNet


class Attention(nn.Module):
    """One token a pixel row."""

    def __init__(self, backend=None):
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(64, 5)
        self.backend = backend

    def forward(self, x):
        if self.backend is None:
            y = self.mix(x, x, x, need_weights=False)[0]
        else:
            with nn.attention.sdpa_kernel(self.backend):
                y = self.mix(x, x, x, need_weights=False)[0]
        return self.head(y.flatten(1))


class Detaching(torch.autograd.Function):
    """A square whose first derivative is right and whose second is forgotten."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 2 * x.detach()


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


COUPLING = Layer(lambda x: x - x.mean(0))


def perceptron(*middle):
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 5))


def inputs(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.Tanh(),
        nn.GELU(),
        nn.Softplus(),
        nn.Dropout(0.5),
        nn.LayerNorm(8),
        nn.BatchNorm1d(8).eval(),
        Layer(torch.square),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_models_that_work_pass_and_with_a_coupling_behind_them_do_not(layer):
    torch.manual_seed(0)
    check_model(perceptron(layer), inputs(4, 6))  # raises no error
    with pytest.raises(ValueError, match="influence each other"):
        check_model(perceptron(layer, COUPLING), inputs(4, 6))


def test_the_lenet_passes_and_behind_a_coupling_does_not():
    torch.manual_seed(0)
    check_model(LeNet(), inputs(4, 1, 28, 28))  # raises no error
    with pytest.raises(ValueError, match="influence each other"):
        check_model(nn.Sequential(COUPLING, LeNet()), inputs(4, 1, 28, 28))


def test_the_check_leaves_the_model_as_it_was():
    model = perceptron(nn.Tanh())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_model(model, inputs(4, 6))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_statistics_are_named():
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d\).*GroupNorm"):
        check_model(perceptron(nn.BatchNorm1d(8)), inputs(4, 6))


def test_coupling_by_any_layer_is_found():
    with pytest.raises(ValueError, match="some layer"):
        check_model(perceptron(COUPLING), inputs(4, 6))


def test_fused_attention_is_refused_and_the_plain_one_passes():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"no second derivative.*SDPBackend\.MATH"):
        check_model(Attention(nn.attention.SDPBackend.FLASH_ATTENTION), inputs(4, 8, 8))
    check_model(Attention(nn.attention.SDPBackend.MATH), inputs(4, 8, 8))


def test_a_forgotten_second_derivative_is_found():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="finite differences"):
        check_model(perceptron(Layer(Detaching.apply)), inputs(4, 6))


def test_a_layer_that_is_differentiable_once_is_found():
    class Once(Detaching):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient * 2 * x

    # torch marks the result, but nothing of the norm's gradient comes by the mark: it would be lost in silence.
    with pytest.raises(ValueError, match="finite differences"):
        check_model(perceptron(Layer(Once.apply)), inputs(4, 6))

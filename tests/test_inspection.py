from collections import namedtuple

import pytest
import torch
from torch import nn

from jacobian_robust.errors import UserError
from jacobian_robust.foreign import Logits, from_factory
from jacobian_robust.inspection import is_random, look_at
from jacobian_robust.jacobian.checks import check_model
from jacobian_robust.models import Timm, TorchVision

SHAPE = (1, 4, 5)


class Net(nn.Module):
    """Answers as a function of its logits, and of whether it is trained, says."""

    def __init__(self, answer=lambda logits, training: logits, outputs=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, outputs))
        self.answer = answer

    def forward(self, images):
        return self.answer(self.layers(images), self.training)


class InPlace(Net):
    def forward(self, images):
        return super().forward(images.sub_(0.5))


class Sized(Net):
    def forward(self, images):
        assert images.shape[-1] == 224, "wrong image width"


ModelOutput = namedtuple("ModelOutput", "loss logits")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Net(lambda logits, _: {"aux": 0, "logits": logits}), r"not a dict with aux, logits; .*model\.output="),
        (
            Net(lambda logits, training: (logits, None) if training else logits),
            r"in training mode: .* not a tuple",
        ),
        (Sized(), r"takes no batch of 3 images of the data's shape \(1, 4, 5\): wrong image width"),
        (InPlace(), r"changes the images that it is given.*images - mean"),
        (Net(outputs=7), r"not \(3, 7\) for a batch of 3; model\.classes=7, and the data has 3 classes"),
        (Net(lambda logits, _: logits.argmax(-1, keepdim=True).expand(-1, 3)), r"not numbers of type torch\.int64"),
        (Net(lambda logits, _: logits * torch.nan), r"returns nan"),
        (Net(lambda logits, _: logits.detach()), r"no gradient with respect to the image"),
    ],
)
def test_what_a_model_may_not_return_is_said_in_one_line(model, said):
    with pytest.raises(UserError, match=said):
        look_at(model, 3, SHAPE, training=[2], gradient=True)


def test_the_option_with_the_wrong_shape_is_named():
    with pytest.raises(UserError, match=r"give model\.channels=1 model\.image_size=5$"):
        look_at(Sized(), 3, SHAPE, options={"channels": 3, "image_size": 28, "inputs": 20})


def test_one_logit_of_two_classes_has_its_remedy():
    with pytest.raises(UserError, match=r"model\.binary=true"):
        look_at(Net(outputs=1), 2, SHAPE)


def test_a_look_leaves_the_model_and_the_random_stream_as_they_were():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(18, 3))
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    assert look_at(model.double().float(), 3, SHAPE, training=[2, 1], gradient=True) == torch.float32
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model[1].training


def test_a_network_that_draws_in_evaluation_mode_is_random():
    images = torch.rand(4, *SHAPE)
    assert not is_random(nn.Sequential(nn.Dropout(), Net()), images)
    assert is_random(Net(lambda logits, _: nn.functional.dropout(logits, 0.5)), images)


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (lambda logits, _: {"logits": logits, "aux": 0}, "logits"),
        (lambda logits, _: ModelOutput(0, logits), "logits"),
        (lambda logits, _: (0, logits), 1),
        (lambda logits, training: (logits, 0) if training else logits, 0),
    ],
)
def test_the_part_of_an_output_is_chosen(answer, output):
    net = Net(answer)
    images = torch.rand(4, *SHAPE)
    assert torch.equal(Logits(net, output)(images), net.layers(images))
    look_at(Logits(net, output), 3, SHAPE, training=[2], gradient=True)  # raises no error
    with pytest.raises(UserError, match=r"model\.output=9 is not in what the model returns"):
        look_at(Logits(net, 9), 3, SHAPE, training=[2])


def test_one_logit_becomes_two_of_the_same_probability():
    net = Net(outputs=1)
    images = torch.rand(4, *SHAPE)
    model = Logits(net, binary=True)
    torch.testing.assert_close(model(images).softmax(-1)[:, 1], net(images).sigmoid()[:, 0])
    look_at(model, 2, SHAPE, training=[2], gradient=True)  # raises no error


def test_a_factory_is_called_with_its_arguments_and_its_mistakes_are_told():
    made = from_factory("torch.nn.Linear", {"in_features": 3, "out_features": 2})
    assert made.weight.shape == (2, 3)
    assert isinstance(from_factory("torch.nn.Identity", output="logits"), Logits)
    for factory, said in [
        (None, "model.factory is missing"),
        ("nowhere.net", "model.factory=nowhere.net: No module"),
        ("torch.nn.Linear", "model.factory=torch.nn.Linear: .*in_features"),
        ("builtins.dict", "returns a dict"),
    ]:
        with pytest.raises(UserError, match=said):
            from_factory(factory)


def test_models_of_libraries_by_name(monkeypatch):
    model = TorchVision("resnet18", classes=4)
    assert look_at(model, 4, (3, 32, 32), gradient=True) == torch.float32
    check_model(model.eval(), torch.rand(2, 3, 32, 32))  # raises no error: no operation is left in place
    with pytest.raises(UserError, match=r"model\.name=resnet17: torchvision cannot make it"):
        TorchVision("resnet17")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"needs the package timm: pip install"):
        Timm("resnet18")
    with pytest.raises(ValueError, match="pattern"):
        Timm("hf_hub:somebody/model")


class WithoutASecond(torch.autograd.Function):
    """Says of its second derivative what cuDNN's recurrent layers say."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return WithoutAny.apply(gradient)


class WithoutAny(WithoutASecond):
    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError(
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported"
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=True), "use_reentrant=False"),
        (torch.compile(torch.tanh, backend="aot_eager"), "without torch.compile"),
        (WithoutASecond.apply, r"torch\.backends\.cudnn\.flags\(enabled=False\)"),
    ],
    ids=["reentrant checkpoints", "compiled", "cuDNN"],
)
def test_what_has_no_second_derivative_has_its_remedy(model, said):
    layers = nn.Sequential(nn.Flatten(), nn.Linear(20, 8), Function(model), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=said):
        check_model(layers, torch.rand(3, *SHAPE))


def test_what_has_no_first_derivative_has_its_remedy():
    reentrant = Function(lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=True))
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3), reentrant)
    assert look_at(model, 3, SHAPE) == torch.float32
    with pytest.raises(UserError, match=r"cannot be differentiated .*use_reentrant=False$"):
        look_at(model, 3, SHAPE, gradient=True)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_model_that_cannot_be_copied_is_looked_at_without():
    net = Net()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net.layers[1])
    net(torch.rand(2, *SHAPE))  # leaves a tensor that is no parameter
    with pytest.warns(UserWarning, match="cannot be copied"):
        check_model(net, torch.rand(3, *SHAPE))

"""Classifiers that this project did not train, by every way in which they come."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from jacobian_robust.checkpoints import export, load_checkpoint
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.models import PixelInput

from .conftest import composed
from .test_evaluation import ATTACK


def run(tmp_path, *overrides):
    return evaluate(composed("evaluate", *ATTACK, "logger=csv", f"output_dir={tmp_path}/results", *overrides))


@pytest.fixture(scope="module")
def classifier(trained):
    return load_checkpoint(trained.directory / "vanilla" / "checkpoints" / "last.ckpt").model()


@pytest.fixture(scope="module")
def threats(trained, tmp_path_factory):
    """What the classifier's own checkpoint comes out at."""
    directory = tmp_path_factory.mktemp("own")
    return run(directory, f"checkpoint={trained.directory}/vanilla").models[0].threats


def make(kind, classifier, path):
    if kind == "state dict":
        torch.save(classifier.state_dict(), path)
    elif kind == "wrapped state dict":
        torch.save({"epoch": 3, "model": classifier.state_dict()}, path)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(classifier.state_dict(), path)
    elif kind == "TorchScript":
        torch.jit.trace(classifier, torch.rand(2, 1, 28, 28)).save(path)
    elif kind == "torch.export":
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(classifier, (torch.rand(2, 1, 28, 28),), dynamic_shapes=shapes), path)
    else:
        torch.save(classifier, path)
    return path


NAMED = "model=lenet"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("state dict", [NAMED]),
        ("wrapped state dict", [NAMED]),
        ("safetensors", [NAMED]),
        ("TorchScript", ["trust=true"]),
        ("torch.export", ["trust=true"]),
        ("pickle", ["trust=true"]),
    ],
)
def test_every_kind_of_file_is_evaluated_as_the_checkpoint_is(kind, options, classifier, threats, tmp_path):
    path = make(kind, classifier, tmp_path / "theirs.pt2")
    (model,) = run(tmp_path, f"checkpoint={path}", "data=mnist", *options).models
    assert model.threats == threats
    assert model.name == "theirs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("kind", ["TorchScript", "torch.export"])
def test_the_geometry_and_the_rest_are_measured_through_a_program(kind, classifier, trained, tmp_path):
    path = make(kind, classifier, tmp_path / "theirs.pt2")
    rest = ["geometry_images=4", "reliability=true", "sanity_images=3", "limit=10"]
    (theirs,) = run(tmp_path, f"checkpoint={path}", "data=mnist", "trust=true", *rest).models
    (ours,) = run(tmp_path / "ours", f"checkpoint={trained.directory}/vanilla", *rest).models
    assert theirs.first_order.median_predicted == pytest.approx(ours.first_order.median_predicted, rel=1e-4)
    assert theirs.calibration.nll == pytest.approx(ours.calibration.nll, rel=1e-4)
    assert next(check.status for check in theirs.checks if check.name == "unseen images") == "skip"


def test_a_factory_is_enough(tmp_path):
    """It has no file, and may return other weights each time: an evaluation is of those that it met."""
    options = ["+model._target_=jacobian_robust.models.LeNet", "data=mnist", "limit=20"]
    torch.manual_seed(0)
    (model,) = run(tmp_path, *options).models
    assert (model.name, model.checkpoint) == ("model", None)
    torch.manual_seed(0)
    assert run(tmp_path, *options, "resume=true").models == [model]
    with pytest.raises(UserError, match="of other weights"):
        run(tmp_path, *options, "resume=true")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("state dict", ["data=mnist"], "name the classifier"),
        ("state dict", [NAMED], "data=mnist"),
        ("state dict", [NAMED, "model.classes=7", "data=mnist"], "another architecture"),
        ("TorchScript", ["data=mnist"], "trust=true"),
        ("torch.export", ["data=mnist"], "trust=true"),
        ("pickle", ["data=mnist"], "trust=true"),
    ],
)
def test_what_is_missing_is_said(kind, options, said, classifier, tmp_path):
    path = make(kind, classifier, tmp_path / "theirs.pt2")
    with pytest.raises(UserError, match=said):
        run(tmp_path, f"checkpoint={path}", *options)
    assert not (tmp_path / "results").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_model_of_something_else_is_refused_before_any_work(tmp_path):
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(784, 7)), tmp_path / "seven.pt")
    with pytest.raises(UserError, match=r"must return \(batch, 10\) logits, not \(3, 7\)"):
        run(tmp_path, f"checkpoint={tmp_path}/seven.pt", "data=mnist", "trust=true")
    torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(784, 7)), torch.rand(2, 1, 28, 28)).save(tmp_path / "7.pt")
    with pytest.raises(UserError, match=r"7.pt: must return \(batch, 10\) logits, not \(3, 7\)"):
        run(
            tmp_path,
            "+model._target_=jacobian_robust.models.LeNet",
            "attack=[pgd_linf,transfer]",
            f"attack.transfer.source={tmp_path}/7.pt",
            "data=mnist",
            "trust=true",
        )


@pytest.mark.parametrize(
    ("name", "said"), [("Detached", "no gradient with respect to the image"), ("Undefined", "nan")]
)
def test_a_model_that_no_attack_can_follow_is_refused_before_any_work(name, said, tmp_path):
    with pytest.raises(UserError, match=said):
        run(tmp_path, f"+model._target_=tests.end_to_end.models.{name}", "data=mnist")
    assert not (tmp_path / "results").exists()


def test_random_search_needs_no_gradient(tmp_path):
    options = ["attack=square", "attack.square.queries=2", "limit=5", "logger=csv", f"output_dir={tmp_path}/r"]
    options += ["sanity_images=0", "geometry_images=0", "+model._target_=tests.end_to_end.models.Detached"]
    with pytest.raises(UserError, match=r"no gradient with respect to the image.*diagnostics=null"):
        evaluate(composed("evaluate", *options, "data=mnist", "diagnostics=simplifications"))
    assert not (tmp_path / "r").exists()
    (model,) = evaluate(composed("evaluate", *options, "data=mnist")).models
    assert model.calibration is not None


def test_logits_in_double_precision_are_attacked_in_single(tmp_path):
    """The libraries' random search and FAB write them into float32 tensors."""
    rest = ["geometry_images=3", "reliability=true", "sanity_images=3", "limit=3"]
    (model,) = run(tmp_path, "+model._target_=tests.end_to_end.models.DoublePrecision", "data=mnist", *rest).models
    assert model.images == 3
    torch.save(nn.Linear(3, 10), tmp_path / "flat.pt")
    with pytest.raises(UserError, match="takes no batch of 3 images"):
        run(tmp_path, f"checkpoint={tmp_path}/flat.pt", "data=mnist", "trust=true")


def normalised(classifier, path):
    """Change the weights so that the model wants pixels in [-1, 1], less a mean, over a deviation; return options."""
    first = classifier.layers[0]
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    low, high, mean, std = -1.0, 1.0, 0.25, 0.5  # pixel = (std·y + mean - low) / (high - low)
    state["layers.0.weight"] = first.weight.detach() * std / (high - low)
    state["layers.0.bias"] = first.bias.detach() + first.weight.detach().sum((1, 2, 3)) * (mean - low) / (high - low)
    torch.save(state, path)
    return [f"input.low={low}", f"input.high={high}", f"input.mean={mean}", f"input.std=[{std}]"]


def test_a_model_of_normalised_pixels_is_given_them(classifier, threats, tmp_path):
    stated = normalised(classifier, tmp_path / "normalised.pt")
    (model,) = run(tmp_path, f"checkpoint={tmp_path}/normalised.pt", NAMED, "data=mnist", *stated).models
    assert [b.correct for b in model.threats[0].budgets] == pytest.approx(
        [b.correct for b in threats[0].budgets], abs=1
    )
    assert model.threats[0].budgets[0].correct == threats[0].budgets[0].correct


def test_the_source_of_a_transfer_is_read_as_the_evaluated_model_is(classifier, trained, tmp_path):
    """Both by their weights, which want normalised pixels; and a source of this project's, which wants them plain."""
    source = load_checkpoint(trained.directory / "frobenius" / "checkpoints" / "last.ckpt").model()
    stated = normalised(classifier, tmp_path / "evaluated.pt")
    normalised(source, tmp_path / "source.pt")

    def broken(name, checkpoint, of, *more):
        options = [f"checkpoint={checkpoint}", "data=mnist", "attack=transfer", f"attack.transfer.source={of}"]
        options += ["attack.transfer.eps=[0.2]", "attack.transfer.steps=5", "attack.transfer.step_size=0.08"]
        quick = ["limit=80", "sanity_images=0", "geometry_images=0", "reliability=false", "logger=csv"]
        (model,) = evaluate(composed("evaluate", *options, *quick, *more, f"output_dir={tmp_path}/{name}")).models
        return model.threats[0].budgets[0].attacks[0].broken

    ours = broken("ours", f"{trained.directory}/vanilla", f"{trained.directory}/frobenius")
    assert 5 < ours < 75
    theirs = [f"{tmp_path}/evaluated.pt", f"{tmp_path}/source.pt", NAMED, *stated]
    assert broken("theirs", *theirs) == pytest.approx(ours, abs=2)
    theirs[1] = f"{trained.directory}/frobenius"
    assert broken("mixed", *theirs) == pytest.approx(ours, abs=2)
    torch.save(source, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="trust=true"):
        broken("untrusted", f"{trained.directory}/vanilla", f"{tmp_path}/pickle.pt")
    assert broken("trusted", f"{trained.directory}/vanilla", f"{tmp_path}/pickle.pt", "trust=true") == ours


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("input.std=0", r"^input\.std: [^;]*greater than[^;]*$"),
        ("input.high=0", "high must be above low"),
        ("input.low=x", "input.low"),
    ],
)
def test_a_wrong_input_range_is_refused(option, said, trained, tmp_path):
    with pytest.raises(UserError, match=said):
        run(tmp_path, f"checkpoint={trained.directory}/vanilla", option)


def test_the_pixels_of_a_wrapped_model_are_normalised_by_channel():
    model = PixelInput(nn.Flatten(), mean=[0.1, 0.2], std=[0.5, 0.25])
    images = torch.rand(3, 2, 4, 4)
    expected = torch.stack([(images[:, 0] - 0.1) / 0.5, (images[:, 1] - 0.2) / 0.25], 1).flatten(1)
    torch.testing.assert_close(model(images), expected)


def test_the_exported_weights_of_a_training_are_evaluated_as_its_checkpoint_is(trained, threats, tmp_path):
    exported = trained.directory / "vanilla" / "model.safetensors"
    (model,) = run(tmp_path, f"checkpoint={exported}").models
    assert model.threats == threats
    assert (model.epochs, model.training_seed) == (2, 0)
    checkpoint = load_checkpoint(trained.directory / "vanilla" / "checkpoints" / "last.ckpt")
    export(checkpoint, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == exported.read_bytes()


def test_damaged_safetensors_are_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" * 50)
    with pytest.raises(UserError, match=r"bad.safetensors is damaged"):
        load_checkpoint(tmp_path / "bad.safetensors")

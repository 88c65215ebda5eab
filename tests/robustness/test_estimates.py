"""The estimates where the distance is known, and what they get wrong there."""

import pytest
import torch
from torch import nn

from jacobian_robust.geometry import distance_to_boundary
from jacobian_robust.robustness.estimates import ESTIMATES, linearised_radius, path_radius, sampled_radius
from jacobian_robust.robustness.prediction import radii


def linear(scale=1.0, offset=0.0):
    """Two classes; the boundary is a plane at the distance ``margin / ‖normal‖``."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.copy_(torch.tensor([offset, 0.0]))
    return model


IMAGES = 0.5 + 0.02 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def exact(model, images):
    normal = model[1].weight[0] - model[1].weight[1]
    with torch.no_grad():
        return ((model(images) @ torch.tensor([1.0, -1.0])).abs() / normal.norm()).detach()


def test_of_linear_logits_one_linearisation_is_exact_however_confident_and_the_first_order_radius_is_far_too_long():
    model = linear(scale=100, offset=30.0)
    distance = exact(model, IMAGES)
    torch.testing.assert_close(linearised_radius(model, IMAGES, steps=1), distance, rtol=1e-4, atol=1e-6)
    assert (radii(model, IMAGES).predicted > 3 * distance).all()


def test_the_path_of_a_line_has_the_length_of_the_line():
    model = linear(scale=10, offset=4.0)
    distance = exact(model, IMAGES)
    torch.testing.assert_close(path_radius(model, IMAGES, step=0.01, steps=200), distance, rtol=0.02, atol=1e-3)


def test_the_box_makes_the_distance_longer_as_an_independent_solver_finds():
    from scipy.optimize import minimize

    model = linear(scale=3, offset=-0.4)
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(3)).round()  # half is blocked
    weight = (model[1].weight[1] - model[1].weight[0]).double().detach().numpy()
    own = int(model(image).argmax())
    sign = 1.0 if own == 0 else -1.0
    with torch.no_grad():
        margin = float((model(image)[0, 0] - model(image)[0, 1]).double())
    start = image.flatten().double().numpy()
    found = minimize(
        lambda x: ((x - start) ** 2).sum(),
        start.clip(0.1, 0.9),
        method="SLSQP",
        bounds=[(0, 1)] * 16,
        constraints={"type": "ineq", "fun": lambda x: sign * (weight @ (x - start) - margin)},
        options={"maxiter": 500, "ftol": 1e-14},
    )
    assert found.success
    radius = float(linearised_radius(model, image, steps=1))
    assert radius == pytest.approx(found.fun**0.5, rel=1e-3)
    assert radius > 1.02 * float(exact(model, image))


def test_a_sampled_radius_keeps_to_its_condition_and_is_zero_where_the_first_is_too_long():
    model = linear(scale=10, offset=4.0)
    lengths = tuple(0.02 * 1.2**k for k in range(30))
    radius = sampled_radius(model, IMAGES, radii=lengths)
    norm = radii(model, IMAGES)
    assert (radius > 0).all()
    assert (radius * norm.spectral <= norm.boundary).all()
    assert (radius <= exact(model, IMAGES) + 1e-6).all()
    assert (sampled_radius(model, IMAGES, radii=(100.0,)) == 0).all()


@pytest.mark.parametrize("prediction", ESTIMATES)
def test_radii_hold_the_estimate_and_its_name(prediction):
    model = linear()
    found = radii(model, IMAGES, prediction=prediction)
    torch.testing.assert_close(found.predicted, ESTIMATES[prediction](model, IMAGES))
    assert found.prediction == prediction
    assert len(found.first(2).predicted) == 2
    torch.testing.assert_close(found.boundary, distance_to_boundary(model(IMAGES).double().softmax(-1)).float())


def test_no_class_within_the_box_is_infinitely_far_and_no_step_is_refused():
    assert linearised_radius(linear(offset=1000.0), IMAGES).isinf().all()
    with pytest.raises(ValueError, match="steps"):
        linearised_radius(linear(), IMAGES, steps=0)

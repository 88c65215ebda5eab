"""The measurements against counts by hand, closed forms and theorems; on images, and on points of the plane."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jacobian_robust.robustness.prediction import Nearest, Radii, Sample, radii
from jacobian_robust_studies.simplifications import __main__ as redraw
from jacobian_robust_studies.simplifications.measure import (
    PASSES,
    Displacements,
    agreements,
    directions,
    displacements,
    distribution,
    falls,
    off_by,
    study,
)
from jacobian_robust_studies.simplifications.report import fall_rows, image_rows, summary
from jacobian_robust_studies.simplifications.schema import Simplifications

SCHEMA = Path(__file__).parents[2] / "docs" / "simplifications.schema.json"


def network(inputs=9, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, classes)).eval()


def sample_of(model, images):
    """Images with the nearest misclassified point of a random search for an adversarial example."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        labels = model(images).argmax(-1)
        tried = torch.rand(400, *images.shape, generator=generator)
        wrong = torch.stack([model(points).argmax(-1) != labels for points in tried])
    length = (tried - images).flatten(2).norm(dim=-1).masked_fill(~wrong, torch.inf)
    smallest, which = length.min(0)
    found = smallest.isfinite().reshape(-1, *[1] * (images.ndim - 1))
    examples = torch.where(found, tried[which, torch.arange(len(images))], images)
    correct = torch.ones(len(images), dtype=torch.bool)
    return Sample(images, correct, radii(model, images), Nearest(smallest, examples), smallest)


def test_quantiles_are_of_the_finite_values():
    found = distribution(torch.tensor([3.0, torch.inf, 1.0, torch.nan, 2.0]))
    assert (found.images, found.smallest, found.median, found.largest) == (3, 1, 2, 3)
    assert found.q25 == 1.5
    assert distribution(torch.tensor([torch.inf])) is None


@given(st.integers(0, 2**16), st.floats(0.05, 20))
def test_every_image_agrees_or_satisfies_the_laxer_condition_alone(seed, eps):
    """d_B ≤ δ and ‖J‖₂ ≤ ‖J‖_F, so that d_B and Frobenius' norm are the stricter ones."""
    found = radii(network(seed=seed), torch.rand(20, 1, 3, 3, generator=torch.Generator().manual_seed(seed)))
    frobenius, spectral = agreements(found, [eps])
    for one in (frobenius, spectral):
        assert one.both + one.center_only + one.boundary_only + one.neither == 20
        assert one.boundary_only == 0
    assert frobenius.both <= spectral.both
    assert spectral.neither <= frobenius.neither


def test_displacements_are_the_first_order_at_small_radii_and_at_most_pi_at_large_ones():
    model = network()
    images = torch.rand(6, 1, 3, 3)
    sample = sample_of(model, images)
    worst, to_example, rate = directions(model.double(), Sample(*_double(sample)))
    small = [1e-3, 5e-4]
    moved = displacements(model, images.double(), worst, [*small, 1e6])
    error = [(moved[i] / (sample.radii.spectral.double() * r) - 1).abs() for i, r in enumerate(small)]
    assert (error[0] < 1e-2).all()
    assert (moved[2] <= math.pi + 1e-12).all()
    along = displacements(model, images.double(), to_example, small)
    torch.testing.assert_close(along[1], rate * small[1], rtol=1e-2, atol=0)
    assert (rate <= sample.radii.spectral * (1 + 1e-5)).all()


def _double(sample):
    nearest = Nearest(sample.nearest.length.double(), sample.nearest.examples.double())
    return sample.images.double(), sample.correct, sample.radii, nearest, sample.smallest.double()


def test_the_radius_at_which_the_first_order_is_off():
    r = [0.5, 1.0, 2.0, 4.0]
    grid = torch.tensor(r, dtype=torch.float64)
    ratio = torch.stack([1 + 0.08 * grid, 1 - 0.04 * grid, torch.ones(4), grid * 0 + 3, grid * torch.nan], dim=-1)
    radius, over = off_by(ratio, r)
    torch.testing.assert_close(
        radius, torch.tensor([1.25, 2.5, torch.inf, 0.5, torch.nan], dtype=torch.float64), equal_nan=True
    )
    assert over.tolist()[:4] == [True, False, False, True]


def test_falls_are_put_down_to_the_first_simplification_that_made_the_promise():
    """At ε = 1, image by image; δ = 3 and ‖J‖_F = 1.5 ‖J‖₂ everywhere."""
    spectral = torch.tensor([0.5, 0.5, 1.5, 1.5, 2.5, 2.5, 4.0, 4.0, 0.5])
    nearest = torch.tensor([2.0, 0.5, 2.0, 0.5, 2.0, 0.5, 2.0, 0.5, 0.5])
    sample = Sample(
        images=torch.zeros(9, 2),
        correct=torch.tensor([True] * 8 + [False]),
        radii=Radii(torch.full((9,), 3.0), torch.full((9,), 1.0), 1.5 * spectral, spectral),
        nearest=Nearest(nearest, torch.ones(9, 2)),
        smallest=nearest,
    )
    moved = torch.full((9,), 1.1, dtype=torch.float64)
    found = {
        (f.bound, f.norm): f
        for f in falls(sample, Displacements(moved, spectral.double() * nearest), [1.0], split="evaluated")
    }
    note = found["center", "frobenius"]  # images 0 to 3 satisfy it
    assert (note.images, note.fell, note.satisfied, note.satisfied_fell) == (8, 4, 4, 2)
    assert (note.by_center, note.by_center_alone, note.by_curvature) == (1, 0, 1)  # 0.75 is less than 1 / 1.1
    assert (note.violated_fell, note.violated_stood, note.strict_stood) == (2, 2, 1)
    laxest = found["center", "spectral"]  # images 0 to 5
    assert (laxest.satisfied, laxest.by_center, laxest.by_center_alone, laxest.by_curvature) == (6, 2, 1, 1)
    assert laxest.strict_stood == 0
    exact = found["boundary", "spectral"]  # images 0 and 1
    assert (exact.satisfied, exact.by_center, exact.by_curvature, exact.violated_fell) == (2, 0, 1, 3)
    assert exact.overshoot.median == pytest.approx(1.1 / 0.25)
    assert all(f.contradictions == 0 for f in found.values())


@pytest.mark.parametrize(("shape", "classes"), [((1, 3, 3), 4), ((2,), 3)], ids=["images", "plane"])
def test_a_study_adds_up_and_contradicts_no_theorem(shape, classes):
    model = network(math.prod(shape), classes, seed=3)
    model[1].weight.data *= 4
    evaluated, training = (sample_of(model, torch.rand(40, *shape)) for _ in range(2))
    done = []
    found = study(
        "toy",
        model,
        evaluated,
        training,
        budgets=[0.1, 0.3, 0.6],
        condition=(2.0, "center"),
        rows=[{"epoch": 1, "train_condition_satisfied": 0.25}, {"epoch": 2}],
        progress=done.append,
    )
    result = found.result
    assert sum(done) == PASSES * 40
    assert (result.images, result.training_images, result.condition_eps) == (40, 40, 2.0)
    assert [(epoch.epoch, epoch.train) for epoch in result.epochs] == [(1, 0.25)]
    assert result.center_over_boundary.smallest >= 1
    assert 1 - 1e-6 <= result.frobenius_over_spectral.smallest <= result.frobenius_over_spectral.largest
    assert result.frobenius_over_spectral.largest <= math.sqrt(min(classes - 1, math.prod(shape))) + 1e-6
    assert len(result.falls) == 2 * 3 * 4
    assert sum(fall.fell for fall in result.falls) > 0
    for fall in result.falls:
        assert fall.satisfied_fell == fall.by_center + fall.by_curvature
        assert fall.satisfied_fell + fall.violated_fell == fall.fell
        assert fall.satisfied + fall.violated_fell + fall.violated_stood == fall.images
        assert fall.contradictions == 0
        if fall.bound == "boundary":
            assert fall.by_center == 0
            assert fall.overshoot is None or fall.overshoot.smallest >= 1 - 1e-4
    shown = result.flatness
    assert [point.radius for point in shown.points] == sorted(point.radius for point in shown.points)
    assert shown.points[-1].radius == pytest.approx(min(4.0, math.sqrt(math.prod(shape))))
    assert shown.points[0].worst.median == pytest.approx(1, abs=0.2)
    assert shown.worst.over + shown.worst.under + shown.worst.never == shown.worst.images == 40
    assert shown.alignment.largest <= 1 + 1e-5
    assert [name[0] for name, _ in summary(result)] == list("123456")
    assert len(fall_rows(result.falls)) == 24
    rows = list(image_rows([found]))
    assert len(rows) == 81
    assert {len(row) for row in rows} == {len(rows[0])}


def test_a_model_of_which_nothing_is_known_can_be_studied():
    model = network()
    found = study("m", model, sample_of(model, torch.rand(4, 9)), None, budgets=[1.0], condition=None, rows=[]).result
    assert found.training_images is found.condition_eps is None
    assert {fall.split for fall in found.falls} == {"evaluated"}
    assert all(share.training is None for share in found.satisfied)
    assert summary(found)[5][1] == "not recorded in the checkpoint"


def test_a_model_whose_prediction_is_constant_can_be_studied():
    model = network()
    nn.init.zeros_(model[3].weight)
    found = study("m", model, sample_of(model, torch.rand(4, 9)), None, budgets=[1.0], condition=None, rows=[]).result
    assert found.frobenius_over_spectral is found.flatness.worst.radius is found.flatness.alignment is None
    assert all(fall.satisfied == fall.images == 4 for fall in found.falls)
    summary(found)


def test_the_committed_schema_is_the_codes_and_explains_every_field():
    """Written by: python -m jacobian_robust_studies.simplifications > docs/simplifications.schema.json."""
    schema = Simplifications.model_json_schema()
    assert json.loads(SCHEMA.read_text()) == schema
    for name, part in (schema["$defs"] | {"Simplifications": schema}).items():
        for field, described in part["properties"].items():
            assert described.get("description"), f"{name}.{field}"


def test_the_committed_figures_can_be_drawn_from_the_files_beside_them(monkeypatch):
    """Each image's radii are read again: the ratios have the quantiles that were measured."""
    drawn = {}
    monkeypatch.setattr(
        redraw, "six_simplifications", lambda model, radii, **_: drawn.update({model.name: (model, radii)})
    )
    monkeypatch.setattr(redraw, "write_picture", lambda figure, path, **_: None)
    redraw.draw(SCHEMA.parent / "results" / "simplifications" / "toy", "points")
    assert list(drawn) == ["vanilla", "frobenius"]
    for model, of in drawn.values():
        assert [len(found.center) for found in of.values()] == [model.images, model.training_images]
        ratio = of["evaluated"].center / of["evaluated"].boundary
        assert distribution(ratio).median == pytest.approx(model.center_over_boundary.median, rel=1e-4)

import json
import math
from pathlib import Path

import pytest

from jacobian_robust.robustness.schema import Budget, Calibration, Model, Results, Threat, groups, settings_hash

SCHEMA = Path(__file__).parents[2] / "docs" / "robustness.schema.json"


def model(name, seed, clean, robust, settings="abc"):
    budgets = [
        Budget(eps=0.1, attacked=90, correct=50, images=100, share_of_attacked=0.5, robust_accuracy=robust, attacks=[])
    ]
    return Model(
        name=name,
        checkpoint=None,
        sha256=None,
        training_seed=seed,
        settings=settings,
        epochs=None,
        seconds_per_epoch=None,
        wandb=None,
        data="MNIST test",
        verdict=None,
        checks=[],
        images=100,
        clean_correct=90,
        clean_accuracy=clean,
        threats=[Threat(norm="linf", budgets=budgets)],
        classes=[],
        first_order=None,
        calibration=None,
        noise=[],
        out_of_distribution=[],
    )


def test_the_committed_schema_is_the_codes():
    """Written by: python -m jacobian_robust.robustness.schema > docs/robustness.schema.json."""
    assert json.loads(SCHEMA.read_text()) == Results.model_json_schema()


def test_every_field_of_the_schema_is_explained():
    for name, part in (Results.model_json_schema()["$defs"] | {"Results": Results.model_json_schema()}).items():
        for field, described in part["properties"].items():
            assert described.get("description"), f"{name}.{field}"


@pytest.mark.parametrize("none", [math.inf, math.nan])
def test_what_is_no_number_is_a_null_that_the_schema_allows(none):
    calibration = Calibration(ece=0.1, nll=none, brier=0.2, bins=[])
    written = json.loads(calibration.model_dump_json())
    assert written == {"ece": 0.1, "nll": None, "brier": 0.2, "bins": []}
    allowed = {
        part["type"] for part in json.loads(SCHEMA.read_text())["$defs"]["Calibration"]["properties"]["nll"]["anyOf"]
    }
    assert allowed == {"number", "null"}
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


@pytest.mark.parametrize("string", ["Infinity", "NaN"])
def test_a_string_of_an_older_file_is_read_as_no_number(string):
    older = json.dumps({"ece": 0.1, "nll": string, "brier": 0.2, "bins": []})
    assert Calibration.model_validate_json(older).nll is None


def test_seeds_of_one_setting_are_a_group_with_mean_and_standard_deviation():
    models = [model("a/seed0", 0, 0.9, 0.5), model("a/seed1", 1, 0.8, 0.7), model("b", 0, 0.99, 0.1, settings="other")]
    (group,) = groups(models)
    assert (group.name, group.seeds) == ("a", [0, 1])
    assert group.clean == pytest.approx((0.85, math.sqrt(0.005)))
    ((eps, mean, spread),) = group.robust["linf"]
    assert (eps, mean, spread) == pytest.approx((0.1, 0.6, math.sqrt(0.02)))
    shares = [of.threats[0].budgets[0].share_of_attacked for of in models[:2]]
    assert group.of_correct["linf"] == [pytest.approx((sum(shares) / 2, abs(shares[0] - shares[1]) / math.sqrt(2)))]


def test_one_seed_twice_is_no_group():
    assert groups([model("a", 0, 0.9, 0.5), model("b", 0, 0.8, 0.7)]) == []
    assert groups([model("a", None, 0.9, 0.5, None), model("b", None, 0.8, 0.7, None)]) == []


def test_one_seed_twice_counts_once_in_a_group():
    once = [model("a/seed0", 0, 0.9, 0.5), model("a/seed1", 1, 0.8, 0.7)]
    (group,) = groups([*once, model("a/again", 0, 0.9, 0.5)])
    assert group == groups(once)[0]


def test_settings_are_the_same_for_another_seed_and_place_of_the_data():
    config = {"seed": 0, "data": {"root": "data", "batch_size": 32}, "optimizer": {"lr": 0.01}}
    assert settings_hash(config) == settings_hash(config | {"seed": 3, "data": {"root": "/x", "batch_size": 32}})
    assert settings_hash(config) != settings_hash(config | {"optimizer": {"lr": 0.02}})


def test_the_curve_of_a_model_begins_at_its_clean_accuracy():
    assert model("a", 0, 0.9, 0.5).accuracy("linf") == [(0.0, 0.9), (0.1, 0.5)]
    assert model("a", 0, 0.9, 0.5).accuracy("l2") == [(0.0, 0.9)]

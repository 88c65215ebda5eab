import json
import math
import subprocess
import sys

import pytest

from jacobian_robust import plots
from jacobian_robust.config import build
from jacobian_robust.defences import Method, Plan, Trial, best, read_plan, table
from jacobian_robust.errors import UserError
from jacobian_robust.regularizers import Penalty
from jacobian_robust.results import Results

from .end_to_end.conftest import ROOT, composed
from .test_results import model

PLAN = read_plan(ROOT / "conf" / "defences.yaml")


def trial(clean, robust):
    return Trial((), clean, robust)


def test_the_best_trial_is_the_most_robust_of_those_that_are_accurate_enough():
    sturdy, tuned, plain = trial(0.97, 0.9), trial(0.985, 0.8), trial(0.99, 0.5)
    assert best([sturdy, tuned, plain], 0.98) is tuned
    assert best([sturdy, trial(0.96, 0.95)], 0.98) is sturdy, "none is: the most accurate"


def test_a_trial_that_failed_is_never_the_best():
    failed = trial(math.nan, math.nan)
    assert best([failed, trial(0.5, 0.1)], 0.98).clean == 0.5
    with pytest.raises(UserError, match="all trials failed"):
        best([failed], 0.98)


def test_a_plan_gives_every_method_as_many_trials():
    stated = PLAN.model_dump()
    stated["methods"]["vanilla"]["tune"] = {"optimizer.lr": [0.1]}
    with pytest.raises(ValueError, match=r"methods.vanilla.tune: 1 combinations"):
        Plan.model_validate(stated)


@pytest.mark.parametrize(
    ("text", "said"), [("batches: 0", "batches"), ("a: [", "cannot be read"), ("extra: 1", "extra"), ("", "methods")]
)
def test_a_plan_that_is_none_is_one_line(tmp_path, text, said):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        read_plan(tmp_path / "plan.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", PLAN.methods)
def test_every_method_of_the_plan_can_be_made(name):
    method = PLAN.methods[name]
    first = [f"{option}={values[0]}" for option, values in method.tune.items()]
    cfg = composed("train", *PLAN.options, *method.options, *PLAN.tuning, *first, "output_dir=somewhere")
    assert isinstance(build(cfg, "regularizer", optional=True), Penalty | None)
    for evaluation in PLAN.evaluations.values():
        composed("evaluate", *evaluation.options, "output_dir=somewhere")


def test_the_table_has_the_mean_and_the_spread_of_the_seeds():
    both = [model("a", 0, 0.9, 0.5), model("b", 1, 0.8, 0.7)]
    made = Results(split="test", independent=False, seed=0, device="cpu", versions={}, attacks={"pgd": {}}, models=both)
    methods = {"pgd": Method(options=[], tune={"seed": [0]}, cost=1, adversarial=True)}
    assert "| pgd | yes | 2 | 85.0 ± 7.1 | 60.0 ± 14.1 | – |" in table(methods, {"pgd": made}).splitlines()


def test_the_line_of_a_method_goes_through_its_undominated_trials():
    axes = plots.fronts({"a": [(0.9, 0.5), (0.99, 0.1), (0.95, 0.05), (math.nan, math.nan)]}).axes[0]
    scattered, front = axes.lines
    assert len(scattered.get_xdata()) == 3
    assert list(zip(*front.get_data(), strict=True)) == [(0.99, 0.1), (0.9, 0.5)]


@pytest.mark.slow
def test_it_makes_what_is_missing_only_and_keeps_what_was_written_by_hand(tmp_path):
    evaluation = ["attack=pgd_linf", "limit=20", "sanity_images=0", "geometry_images=0", "reliability=false"]
    stated = {
        "options": ["monitor_images=0", "trainer.limit_val_batches=2", "trainer.enable_progress_bar=false"],
        **{"batches": 20, "trial_epochs": 1, "epochs": 1, "seeds": [0, 1], "trials": 2},
        "tuning": ["attack=pgd_linf", "attack.pgd_linf.eps=[0.1]", "limit=20"],
        **{"objective": "robust_accuracy_linf_0.1", "clean": 0.98, "evaluations": {"pgd": {"options": evaluation}}},
        "methods": {"vanilla": {"options": ["regularizer=none"], "cost": 1, "finalist": True}},
    }
    stated["methods"]["vanilla"]["tune"] = {"optimizer.lr": [0.01, 0.1]}
    (tmp_path / "plan.yaml").write_text(json.dumps(stated))

    def run():
        command = [sys.executable, "-m", "jacobian_robust.defences", "--plan", str(tmp_path / "plan.yaml")]
        places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
        done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    document = tmp_path / "results" / "defences.md"
    assert "+ python train.py -m" in run()
    written = document.read_text()
    assert "| vanilla | no | 2 |" in written
    document.write_text(f"{written}\nBy hand.\n")
    assert "+ python" not in run()
    assert document.read_text() == f"{written}\nBy hand.\n"

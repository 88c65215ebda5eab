"""The scripts in examples/ run, and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def output_of(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir())
    return [float(number) for number in re.findall(r"-?\d+\.\d+", ended.stdout)]


def test_all_examples_are_run_here():
    run = ["norm_of_your_model", "penalty_in_your_module", "plain_loop", "regression", "robustness_monitor"]
    assert [script.stem for script in SCRIPTS] == run


def test_norms_and_radii_are_positive(tmp_path):
    numbers = output_of("norm_of_your_model", tmp_path)
    assert len(numbers) == 16
    assert min(numbers) > 0


def test_a_plain_loop_lowers_the_penalty_and_learns_a_weight(tmp_path):
    without, with_it, multiplier = output_of("plain_loop", tmp_path)
    assert with_it < 0.8 * without
    assert multiplier > 0


def test_a_penalised_regression_has_a_smaller_norm_and_more_robust_predictions(tmp_path):
    norm, within, robust, penalised_norm, penalised_within, penalised_robust = output_of("regression", tmp_path)
    assert penalised_norm < norm
    assert penalised_robust > robust + 0.1
    assert within > 0.9
    assert penalised_within > 0.9


def test_the_penalty_falls_in_a_module_that_knows_nothing_of_it(tmp_path):
    (value,) = output_of("penalty_in_your_module", tmp_path)
    assert 0 < value < 0.5


def test_robust_accuracy_is_below_the_accuracy(tmp_path):
    accuracy, robust = output_of("robustness_monitor", tmp_path)
    assert robust < accuracy
    assert accuracy > 0.7

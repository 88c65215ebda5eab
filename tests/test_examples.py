"""The scripts in examples/ run, and say what they promise."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def output_of(tmp_path, monkeypatch, capsys):
    """Run an example in this process, in an empty directory, and return the numbers that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        assert not list(tmp_path.iterdir())
        return [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]

    return run


def test_all_examples_are_run_here():
    run = ["norm_of_your_model", "penalty_in_your_module", "plain_loop", "regression", "robustness_monitor"]
    run.append("wandb_workspace")
    assert [script.stem for script in SCRIPTS] == run


def test_norms_and_radii_are_positive(output_of):
    numbers = output_of("norm_of_your_model")
    assert len(numbers) == 16
    assert min(numbers) > 0


def test_a_plain_loop_lowers_the_penalty_and_learns_a_weight(output_of):
    without, with_it, multiplier = output_of("plain_loop")
    assert with_it < 0.8 * without
    assert multiplier > 0


def test_a_penalised_regression_has_a_smaller_norm_and_more_robust_predictions(output_of):
    norm, within, robust, penalised_norm, penalised_within, penalised_robust = output_of("regression")
    assert penalised_norm < norm
    assert penalised_robust > robust + 0.1
    assert within > 0.9
    assert penalised_within > 0.9


def test_the_penalty_falls_in_a_module_that_knows_nothing_of_it(output_of):
    (value,) = output_of("penalty_in_your_module")
    assert 0 < value < 0.5


def test_robust_accuracy_is_below_the_accuracy(output_of):
    accuracy, robust = output_of("robustness_monitor")
    assert robust < accuracy
    assert accuracy > 0.7


@pytest.mark.slow
def test_the_notebook_runs_and_its_penalised_network_is_certified_at_more_images(monkeypatch):
    notebook = json.loads((ROOT / "examples" / "own_model.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)  # its outputs are committed
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    at_a_tenth = [result.results.models[0].threats[0].budgets[2] for result in names["results"].values()]
    plain, penalised = (budget.certified_accuracy for budget in at_a_tenth)
    assert penalised > plain + 0.2
    assert all(budget.certified_accuracy <= budget.robust_accuracy for budget in at_a_tenth)


def test_the_wandb_workspace_has_panels_of_what_is_logged(output_of, monkeypatch):
    assert output_of("wandb_workspace") == []
    example = runpy.run_path(str(ROOT / "examples" / "wandb_workspace.py"))
    source = (ROOT / "src" / "jacobian_robust" / "reporting" / "wandb.py").read_text()
    for key in ("robustness/eps_", "robustness/accuracy_", '_key("figures"'):
        assert key in source
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit, match="pip install wandb-workspaces"):
        example["workspace"]("entity", "project")


def test_the_wandb_workspace_can_be_built():
    pytest.importorskip("wandb_workspaces")
    example = runpy.run_path(str(ROOT / "examples" / "wandb_workspace.py"))
    built = example["workspace"]("entity", "project")
    assert [section.name for section in built.sections] == list(example["PANELS"])
    assert [len(section.panels) for section in built.sections] == [len(panels) for panels in example["PANELS"].values()]

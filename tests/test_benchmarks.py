import runpy
from pathlib import Path

import pytest

from jacobian_robust.data import MNISTDataModule

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("penalty", [None, "frobenius, 1 probe"])
def test_the_overhead_benchmark_runs(penalty):
    benchmark = runpy.run_path(str(BENCHMARKS / "train_overhead.py"))
    datamodule = MNISTDataModule(validation_size=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    result = benchmark["measure"](penalty and benchmark["PENALTIES"][penalty], datamodule, steps=2, epochs=2)
    assert set(result) == {"bare_ms", "framework_ms", "ratio", "loading_share"}
    assert all(value > 0 for value in result.values())


def test_the_step_cost_benchmark_runs():
    benchmark = runpy.run_path(str(BENCHMARKS / "step_cost.py"))
    case = benchmark["random_case"](batch=4)
    steps = benchmark["compare"](case, seconds=0.0, peer=None)
    assert steps["plain"]["ratio"] == 1
    assert {"1 probe", "2 probes", "exact Frobenius", "exact spectral", "torch.func.jacrev"} <= steps.keys()
    errors = benchmark["errors"](case, draws=20)
    assert errors["1 probe"]["relative_variance"] > 0
    assert 0 <= errors["spectral, 1 column, to 2%"]["largest_error"] <= 0.02
    figure = benchmark["error_against_cost"]({"steps": steps, "errors": errors})
    assert len(figure.axes[0].texts) == len(benchmark["DRAWN"])
    assert benchmark["peak_memory"](benchmark["ours"](case, None)) > 0

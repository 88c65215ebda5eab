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

"""Tables of scikit-learn: scaled by the training rows, split by a seed."""

import sys
import types

import numpy as np
import pytest
import torch

from jacobian_robust.data import TabularDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import CATEGORICAL, BernoulliProduct, Gaussian, GaussianMeanScale

SIZES = {"diabetes": (442, 10, 1), "breast_cancer": (569, 30, 2), "wine": (178, 13, 3), "digits": (1797, 64, 10)}


def drawn(table):
    """A table of the right size, with one value far out and, of digits, a column that is constant."""
    rows, columns, classes = SIZES[table]
    generator = np.random.default_rng(0)
    values = 100 + 30 * generator.standard_normal((rows, columns))
    values[0, 0], values[:, -1] = 1e4, 7.0
    return values, 150 + 77 * generator.standard_normal(rows) if classes == 1 else np.arange(rows) % classes


@pytest.fixture
def scikit_learn(monkeypatch):
    """Scikit-learn's loaders, of drawn numbers."""
    datasets = types.ModuleType("sklearn.datasets")
    for table in SIZES:
        options = {"scaled": False} if table == "diabetes" else {}

        def load(return_X_y, _table=table, _options=options, **given):
            assert return_X_y
            assert given == _options
            return drawn(_table)

        setattr(datasets, f"load_{table}", load)
    package = types.ModuleType("sklearn")
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)


def read(table, family=CATEGORICAL, **options):
    _, inputs, outputs = SIZES[table]
    datamodule = TabularDataModule(table=table, inputs=inputs, **{"outputs": outputs} | options)
    datamodule.for_task(family)
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def of_all_rows(datamodule):
    """Return pixels and targets of the training, the held-out and the test rows."""
    return [datamodule.split(name).first(None) for name in ("train", "validation", "test")]


@pytest.mark.parametrize("table", SIZES)
def test_a_tenth_of_the_box_is_a_standard_deviation(table, scikit_learn):
    family = Gaussian(tolerance=0.5) if table == "diabetes" else CATEGORICAL
    datamodule = read(table, family)
    rows, columns, classes = SIZES[table]
    parts = of_all_rows(datamodule)
    assert [len(images) for images, _ in parts] == [rows - round(0.2 * rows) - 50, 50, round(0.2 * rows)]
    training = torch.cat([images for images, _ in parts[:2]]).view(-1, columns).double()
    assert training.min() >= 0
    assert training.max() <= 1
    ordinary = training[:, 1:-1]  # the first column has a value beyond the box, the last is constant
    assert torch.allclose(ordinary.mean(0), torch.tensor(0.5).double(), atol=1e-3)
    assert torch.allclose(ordinary.std(0), torch.tensor(0.1).double(), atol=1e-3)
    assert (training[:, -1] == 0.5).all()
    targets = torch.cat([of for _, of in parts[:2]])
    if classes == 1:
        assert targets.std() == pytest.approx(1, abs=1e-4)
        assert datamodule.output_shape == (1,)
    else:
        assert targets.unique().tolist() == list(range(classes))


def test_the_split_is_the_seeds(scikit_learn):
    first, again, other = (read("wine", data_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.split("test").images, again.split("test").images)
    assert not torch.equal(first.split("test").images, other.split("test").images)


@pytest.mark.parametrize("table", SIZES)
def test_the_tables_are_scikit_learns(table):
    pytest.importorskip("sklearn")
    datamodule = read(table, Gaussian(tolerance=0.5) if table == "diabetes" else CATEGORICAL)
    assert sum(len(images) for images, _ in of_all_rows(datamodule)) == SIZES[table][0]


@pytest.mark.parametrize(
    ("table", "family", "options", "message"),
    [
        ("wine", Gaussian(tolerance=1.0), {}, "wine has no targets for Gaussian; give task=classification"),
        ("diabetes", BernoulliProduct(), {}, "give task=regression or task=regression_scale"),
        ("diabetes", GaussianMeanScale(tolerance=1.0), {}, "give data.outputs=2"),
        ("wine", CATEGORICAL, {"inputs": 10}, "wine has 13 columns; give data.inputs=13"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(table, family, options, message):
    _, inputs, outputs = SIZES[table]
    with pytest.raises(UserError, match=message):
        TabularDataModule(table=table, **{"inputs": inputs, "outputs": outputs} | options).for_task(family)


def test_without_scikit_learn_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"pip install jacobian-robust\[tabular\]"):
        TabularDataModule().prepare_data()

"""Shapes and types of every call into the package are checked while the tests run."""

import gc
import hashlib
import importlib
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

# The workers share the processors: more threads than these wait for one another, in child processes too.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# The machine's speed is not what is tested. Each run draws other examples.
settings.register_profile("project", deadline=None, max_examples=50)
settings.load_profile("project")

install_import_hook("jacobian_robust", "beartype.beartype")


def pytest_collectstart() -> None:
    """Import what the package imports before the hook: within a module of the package it would be compiled anew."""
    for name in ("pytorch_lightning", "torchvision", "wandb", "matplotlib.pyplot", "scipy.stats", "jinja2"):
        importlib.import_module(name)


def pytest_collection_finish() -> None:
    """Leave the million objects of what was imported to themselves: each training would go through them once."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have AutoAttack's random search make 100 queries of its 5,000, which would be most of a test's time."""
    _shorten(monkeypatch, steps=100)


@pytest.fixture
def short_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and have its other parts make 10 steps of their 100."""
    _shorten(monkeypatch, steps=10)


def _shorten(monkeypatch: pytest.MonkeyPatch, *, steps: int) -> None:
    import pyautoattack

    evaluation = pyautoattack.AutoAttack.run_standard_evaluation

    def shortened(self: pyautoattack.AutoAttack, *arguments: Any, **options: Any) -> Any:
        self.square.n_queries = 100
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = steps
        return evaluation(self, *arguments, **options)

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", shortened)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an archive as CIFAR-10's own, of 300 + 60 images of noise, whose sums torchvision expects."""
    from torchvision import datasets  # not at the top: the process that hands out the tests has no need of torch

    cls = datasets.CIFAR10
    root = tmp_path / "cifar10"
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def written(name: str, content: dict[str, Any]) -> str:
        pickled = pickle.dumps(content)
        (folder / name).write_bytes(pickled)
        return hashlib.md5(pickled).hexdigest()

    def batches(files: list[list[str]]) -> list[list[str]]:
        pixels = [generator.integers(0, 256, (60, 3072), dtype=np.uint8) for _ in files]
        return [
            [name, written(name, {"data": data, "labels": [i % 10 for i in range(60)]})]
            for (name, _), data in zip(files, pixels, strict=True)
        ]

    monkeypatch.setattr(cls, "train_list", batches(cls.train_list))
    monkeypatch.setattr(cls, "test_list", batches(cls.test_list))
    md5 = written(cls.meta["filename"], {cls.meta["key"]: [str(i) for i in range(10)]})
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5})
    with tarfile.open(root / cls.filename, "w:gz") as archive:
        archive.add(folder, cls.base_folder)
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5((root / cls.filename).read_bytes()).hexdigest())
    shutil.rmtree(folder)
    return root

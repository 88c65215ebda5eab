"""Real training and a real attack on real MNIST images, once, for many tests to look at."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image

ROOT = Path(__file__).parents[2]

SHORT = ["trainer.enable_progress_bar=false", "data.validation_size=200", "monitor_images=50"]
"""Overrides that make a training a matter of seconds."""


def composed(config: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config, list(overrides))


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that a user's mistake ends in."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        assert "Traceback" not in self.stderr
        return lines[0]


Door = Callable[..., Result]


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Door:
    """Run ``train.py`` or ``evaluate.py`` with arguments, in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        status: Any = 0
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as exit_:
            status = exit_.code
        return Result(int(status or 0), *capfd.readouterr())

    return run


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures blank, but in tests marked ``drawn``: a third of a short training's time is drawing its curves."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: Image.new("RGB", (1, 1)).save(file, "png"))


@dataclass
class Trained:
    directory: Path
    metrics: dict[str, float]

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Trained:
    """A twin pair, trained for two short epochs with a strong penalty and attacked; its W&B runs are offline.

    The worker processes have one in common: the first trains it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    runs = base if worker_id == "master" else base.parent
    with FileLock(runs / "pair.lock"):
        if not (runs / "pair.json").is_file():
            (runs / "pair.json").write_text(json.dumps(_train_pair(runs / "pair")))
    return Trained(runs / "pair", json.loads((runs / "pair.json").read_text()))


def _train_pair(directory: Path) -> dict[str, float]:
    from jacobian_robust.training.train import train

    cfg = composed(
        "train",
        *SHORT,
        "twin=true",
        "evaluate=true",
        "limit=60",
        "sanity_images=10",
        "monitor_attack_images=20",
        "attack.pgd_linf.eps=[0.05,0.1]",
        "attack.pgd_linf.steps=5",
        "attack.pgd_linf.step_size=0.02",
        "geometry_images=10",
        "regularizer.probes=1",
        "regularizer.chart=sphere",
        "eta=constant",
        "eta.value=0.5",
        "optimizer.lr=0.1",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=60",
        f"output_dir={directory}",
    )
    return train(cfg)

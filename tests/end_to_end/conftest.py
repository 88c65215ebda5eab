"""Real training and a real attack on real MNIST images, once, for many tests to look at."""

import functools
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageColor

from jacobian_robust.cli.mistakes import MISTAKES, one_line
from jacobian_robust.robustness.sanity import balls

ROOT = Path(__file__).parents[2]

SHORT = ["trainer.enable_progress_bar=false", "data.validation_size=200", "monitor_images=50"]
"""Overrides that make a training a matter of seconds."""


TOY = ["data=toy", "model=mlp", "model.inputs=2", "model.classes=3"]
"""Points of the plane and a small network, where it does not matter what is learnt."""

FEW = 10
"""Queries of the sanity checks' random search, where a test does not ask for all."""


def composed_anew(config: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config, list(overrides))


@functools.cache
def _composed_once(config: str, *overrides: str) -> bytes:
    return pickle.dumps(composed_anew(config, *overrides))


def composed(config: str, *overrides: str) -> DictConfig:
    """Compose a config; values are set in a copy of one composed before: composing would be half of a short test."""
    parser = OverridesParser.create()
    choices = tuple(o for o in overrides if o[0] in "+~" or (ROOT / "conf" / o.partition("=")[0]).is_dir())
    values = [parser.parse_override(o) for o in overrides if o not in choices]
    cfg = pickle.loads(_composed_once(config, *choices))
    for value in values:
        if value.is_sweep_override() or not _holds(cfg, value.key_or_group):
            return composed_anew(config, *overrides)
        OmegaConf.update(cfg, value.key_or_group, value.value(), merge=False)
    return cfg


def _holds(cfg: DictConfig, name: str) -> bool:
    *places, last = name.split(".")
    for place in places:
        if not OmegaConf.is_dict(cfg) or place not in cfg or OmegaConf.is_missing(cfg, place):
            return False
        cfg = cfg[place]
    return OmegaConf.is_dict(cfg) and last in cfg.keys()  # noqa: SIM118 (a value that is missing is a key all the same)


class Accepted(Exception):
    """The next thing would have been to write."""


Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Return the line in which ``train`` or ``evaluate`` refuses options, called here, before anything is written."""
    from jacobian_robust.evaluation import evaluate as evaluation
    from jacobian_robust.training import runs  # noqa: F401 (imported later, it would keep what is patched here)
    from jacobian_robust.training import train as training

    def stop(*_: Any, **__: Any) -> None:
        raise Accepted

    monkeypatch.chdir(tmp_path)
    programs = {"train": training.train, "evaluate": evaluation.evaluate}

    def refuse(program: str, *overrides: str) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(training, "claimed", stop)
            patched.setattr(evaluation, "report", stop)
            with pytest.raises(MISTAKES) as refused:
                programs[program](composed(program, *overrides, "output_dir=run"))
        return one_line(refused.value)

    return refuse


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


def colours(picture: Path) -> int:
    """Return how many colours a picture has: a blank one has one."""
    return len(np.unique(np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3), axis=0))


def shows(picture: Path, colour: str) -> bool:
    """Return whether a picture has something of a colour: that of a model's line, as ``#0072B2``."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    return bool((np.abs(pixels - np.array(ImageColor.getrgb(colour))).max(-1) <= 2).sum() > 20)


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


class Forked(multiprocessing.get_context("fork").Process):  # type: ignore[name-defined, misc]
    """A program in a process of its own, with the methods of ``Popen`` that tests call; it need not import all anew."""

    def __init__(self, name: str, arguments: tuple[str, ...], log: Path, environment: dict[str, str]) -> None:
        super().__init__()
        self.arguments, self.log, self.environment = [f"{name}.py", *arguments], log, environment

    def run(self) -> None:
        os.environ |= self.environment
        with self.log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = output
            sys.argv = self.arguments
            signal.signal(signal.SIGINT, signal.default_int_handler)  # of tests in the background it is ignored
            try:
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
            except Exception:
                traceback.print_exc()
                sys.exit(1)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)


Program = Callable[..., "Forked | subprocess.Popen[bytes]"]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """Start ``train.py`` or ``evaluate.py`` in a process of its own, which writes what it prints to ``log``.

    It is forked, but beside a GPU, which a forked process cannot use.
    """
    started: list[Forked | subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str, log: Path, **environment: str) -> Forked | subprocess.Popen[bytes]:
        if torch.cuda.is_available():
            with log.open("ab") as output:
                started.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / f"{name}.py"), *arguments],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=os.environ | environment,
                        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
                    )
                )
        else:
            started.append(Forked(name, arguments, log, environment))
            started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a sweep fork its jobs, but beside a GPU: they need not import all anew. The slow tests spawn them."""
    if not torch.cuda.is_available():
        choose = multiprocessing.set_start_method
        monkeypatch.setattr(multiprocessing, "set_start_method", lambda *_, **__: choose("fork", force=True))


@pytest.fixture(scope="package", autouse=True)
def few_queries() -> Iterator[None]:
    """Let the random search of the sanity checks end soon: it is half the time of an evaluation of few images."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(balls, "QUERIES", FEW)
        yield


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[Path, Figure]:
    """Leave pictures blank: a third of a short training's time is drawing its curves.

    A test marked ``drawn`` has those drawn that it names by their files, or all of them.

    Returns:
        By its file, the figure that was to be drawn: a test looks at its axes.
    """
    marker = request.node.get_closest_marker("drawn")
    return {} if marker and not marker.args else leave_blank(monkeypatch, *(marker.args if marker else ()))


def leave_blank(monkeypatch: pytest.MonkeyPatch, *but: str) -> dict[Path, Figure]:
    """Leave pictures blank but those of some names."""
    figures: dict[Path, Figure] = {}
    draw = Figure.savefig

    def save(self: Figure, file: Any, **options: Any) -> None:
        if isinstance(file, Path):
            figures[file] = self
            if file.name in but:
                return draw(self, file, **options)
        return Image.new("RGB", (1, 1)).save(file, "png")

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


@dataclass
class Trained:
    directory: Path
    metrics: dict[str, float]

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoints" / "last.ckpt"


Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """Make what the worker processes have in common: the first that asks for a name makes it, the others wait.

    What is called with a directory returns something that JSON can hold, which all are given beside the directory.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        result = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not result.is_file():
                result.write_text(json.dumps(make(shared / name)))
        return shared / name, json.loads(result.read_text())

    return made


@pytest.fixture(scope="session")
def trained(once: Once) -> Trained:
    """A twin pair, trained for two short epochs with a strong penalty and attacked."""
    return Trained(*once("pair", functools.partial(_train_pair, logger="logger=csv")))


@pytest.fixture(scope="session")
def logged(once: Once) -> Trained:
    """The same with W&B runs, which are offline."""
    return Trained(*once("logged_pair", functools.partial(_train_pair, logger="logger=wandb")))


def _train_pair(directory: Path, logger: str) -> dict[str, float]:
    from jacobian_robust.training.train import train

    cfg = composed(
        "train",
        *SHORT,
        logger,
        "twin=true",
        "evaluate=true",
        "limit=60",
        "sanity_images=4",
        "monitor_attack_images=20",
        "attack.pgd_linf.eps=[0.05,0.1]",
        "attack.pgd_linf.steps=5",
        "attack.pgd_linf.step_size=0.02",
        "geometry_images=0",
        "reliability=false",
        "regularizer.probes=1",
        "regularizer.chart=sphere",
        "eta=constant",
        "eta.value=0.5",
        "optimizer.lr=0.1",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=60",
        f"output_dir={directory}",
    )
    with pytest.MonkeyPatch.context() as patched:  # this is made before the fixtures of packages and tests
        patched.setattr(balls, "QUERIES", FEW)
        leave_blank(patched, "curves.png")
        return train(cfg)

"""Hundreds of broken options and files: each ends in one line that names the option; nothing is written."""

import math

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jacobian_robust.cli import programs
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation import evaluate as evaluation
from jacobian_robust.training import build
from jacobian_robust.training import train as training

from .conftest import ROOT, Accepted, composed

CHECKPOINT = ROOT / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"

WRONG_TYPES = [True, False, 0, 1, 1.0, 1.5, "x", "1", "true", None, [], {}, [1, [2]], ["x"], [None], {"a": 1}, b"x"]
OUT_OF_RANGE = [-1, -0.5, 10**12, 10**30, -(10**30), 1e300, -1e300, 1e-300, math.nan, math.inf, -math.inf]
STRANGE = [
    *("", " ", "../../x", "/proc/nowhere", "naïve 日本語 😀", "<script>alert(1)</script>", "%s{}", "--help"),
    *("x" * 5000, "\0", "\x1b[31m", "a\nb", "\u202e", "\ud800", "\u2028"),
]
INTERPOLATIONS = ["${nope}", "${nope.nope}", "${oc.env:NOT_IN_THE_ENVIRONMENT}", "${no_resolver:1}"]
TARGETS = [{"_target_": target} for target in ("os.system", "subprocess.Popen", "no.such", 5, "builtins.print")]
VALUES = [*WRONG_TYPES, *OUT_OF_RANGE, *STRANGE, *INTERPOLATIONS, *TARGETS]

BASES = [
    ("train", ["data=toy", "model=mlp", "optimizer=adam", "suite=full", "evaluate=true"], ""),
    *[("train", ["data=toy", "model=mlp", f"regularizer={name}"], "regularizer") for name in ("isometry", "margin")],
    *[("train", ["data=toy", "model=mlp", f"regularizer={name}"], "regularizer") for name in ("spectral", "hoffman")],
    ("train", ["data=toy", "model=mlp", "eta=constant"], "eta"),
    ("train", ["model=lenet"], "model"),
    ("train", [], "data"),
    ("train", ["data=fashion_mnist"], "data"),
    ("train", ["data=toy", "model=mlp", "optimizer=sgd"], "optimizer"),
    ("evaluate", [f"checkpoint={CHECKPOINT}", "suite=full"], ""),
    ("evaluate", [f"checkpoint={CHECKPOINT}", "data=mnist"], "data"),
    ("evaluate", [f"checkpoint={CHECKPOINT}", "model=lenet"], "model"),
]


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """Stop at what is accepted before it writes; fetch nothing from a network."""

    def stop(*_, **__):
        raise Accepted

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(training, "claimed", stop)
    monkeypatch.setattr(evaluation, "report", stop)
    monkeypatch.setattr(MNISTDataModule.dataset_class, "download", offline)
    monkeypatch.setattr(build, "check_differentiable", lambda *_: None)  # of the model alone, and half a second
    monkeypatch.setattr(training, "require_possible", lambda *_: None)  # AutoAttack is not for the toy's three classes
    monkeypatch.chdir(tmp_path)


def leaves(cfg, prefix=""):
    for key in cfg:
        name = f"{prefix}{key}"
        if OmegaConf.is_missing(cfg, key) or not OmegaConf.is_dict(cfg[key]):
            yield name
        else:
            yield name
            yield from leaves(cfg[key], f"{name}.")


OF_NULL = {
    **dict.fromkeys(("batch_size", "limit", "columns", "every_steps", "trial"), 1),
    **dict.fromkeys(("tolerance", "eps", "delta_over_eps", "gradient_clip_val", "step_size"), 1.0),
    **dict.fromkeys(("source", "entity", "group", "name", "ckpt_path", "storage", "study", "objective"), "x"),
    "parts": OmegaConf.create([]),
    "pruner": OmegaConf.create({}),
}
"""A value of the kind that an option is of whose default is null."""

MAY_BE_NULL = {
    *("regularizer", "regularizer._target_", "adversary", "eps_schedule", "scheduler", "averaging", "logger"),
    *("regularizer.probes", "regularizer.projections", "limit", "geometry_images", "sanity_source"),
    *("data", "model", "model._target_", "input"),  # of an evaluation: what the checkpoint names, and plain pixels
    *("checkpoints.every_seconds", "trainer.precision", "trainer.enable_progress_bar"),
    *("trainer.limit_train_batches", "trainer.limit_val_batches"),  # Lightning's own default
}
"""Options with another default, for which null has a meaning of its own."""

FREE = {"trainer.devices", "trainer.limit_train_batches", "trainer.limit_val_batches", "checkpoint", "input.mean"}
"""What may be a number or a text, a share or a count, one or several."""


def like(value, before, name):
    """Whether an accepted value is of the kind of the one that was there: nothing is taken for something else."""
    last = name.rpartition(".")[2]
    if value is None:
        return before is None or name in MAY_BE_NULL
    if name in FREE:
        return True
    before = OF_NULL[last] if before is None else before
    if isinstance(before, bool) or isinstance(value, bool):
        return type(value) is type(before)
    if isinstance(before, int):
        return isinstance(value, int)
    if isinstance(before, float):
        return isinstance(value, int | float) and math.isfinite(value)
    if isinstance(before, str):
        return isinstance(value, str) and bool(value.strip()) and value.isprintable()
    if OmegaConf.is_list(before):
        return OmegaConf.is_list(value) or isinstance(value, int | float | str)  # one of it
    return OmegaConf.is_dict(value)


def told(error, capsys):
    """The one line that an error ends in; an error of any other kind than a user's would be a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        programs._fail(error)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    return line


def refused(door, cfg, capsys):
    """The line in which a config is refused; ``None`` if it is not."""
    try:
        {"train": training.train, "evaluate": evaluation.evaluate}[door](cfg)
    except Accepted:
        return None
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        return told(error, capsys)
    raise AssertionError("ended without having been stopped")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "base", "group"), BASES, ids=[f"{door} {base[-1] if base else 'as it is'}" for door, base, _ in BASES]
)
def test_every_option_refuses_what_it_cannot_be(door, base, group, stopped, tmp_path, capsys):
    """All wrong values, for each option of every group's every choice."""
    cfg = composed(door, *base, f"output_dir={tmp_path}/run")
    names = [name for name in leaves(cfg) if name.startswith(group)]
    assert names
    wrong, met = [], 0
    for name in names:
        for value in VALUES:
            broken = cfg.copy()
            OmegaConf.update(broken, name, value, merge=False, force_add=True)
            what, met = f"{name}={value!r}"[:80], met + 1
            try:
                line = refused(door, broken, capsys)
                if line is None:
                    before = OmegaConf.select(cfg, name)
                    if not like(OmegaConf.select(broken, name), before, name):
                        wrong.append(f"{what} is accepted in place of {before!r}")
                elif name not in line and name.rpartition(".")[0] not in line and name.split(".")[0] not in line:
                    wrong.append(f"{what} is not named: {line}")
            except Exception as error:
                wrong.append(f"{what} ends in {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, f"{len(wrong)} of {met}:\n" + "\n".join(wrong)
    assert met == len(VALUES) * len(names)
    assert not list(tmp_path.iterdir())

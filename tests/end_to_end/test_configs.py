"""Every shipped config, composed and made; every command of the README, composed."""

import functools
import importlib.util
import re

import pytest
import torch

from jacobian_robust.adversaries import Adversary
from jacobian_robust.config import build, plain, without_none
from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.options import read_evaluation
from jacobian_robust.penalties import Penalty
from jacobian_robust.reporting.wandb import read_logger
from jacobian_robust.training.schedules import EpsSchedule, EtaSchedule, Schedule

from .conftest import ROOT, composed_anew

CHOICES = [
    (group.name, choice.stem)
    for group in sorted((ROOT / "conf").iterdir())
    if group.is_dir() and group.name not in ("hydra", "experiment")
    for choice in sorted(group.glob("*.yaml"))
]
OPTIONAL = ("augmentation", "regularizer", "adversary", "eps_schedule", "scheduler", "averaging")
PARTS = ("adversary", "augmentation", "averaging", "data", "eps_schedule", "eta", "logger", "model", "optimizer")
PARTS += ("regularizer", "scheduler", "task", "trainer")
EXPERIMENTS = [path.stem for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]


@functools.cache
def composed_together(number):
    """Compose the choices of this number of all the parts that are made each by itself: one at a time is slow."""
    choices = {group: [name for of, name in CHOICES if of == group] for group in PARTS}
    chosen = (f"{group}={names[number % len(names)]}" for group, names in choices.items())
    return composed_anew("train", *chosen, "output_dir=somewhere")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_of_every_group_can_be_made(group, choice):
    if group in PARTS:
        cfg = composed_together([name for of, name in CHOICES if of == group].index(choice))
    else:
        cfg = composed_anew("train", f"{group}={choice}", "output_dir=somewhere")
    assert plain(cfg)["seed"] == 0
    if group == "logger":
        assert (read_logger(cfg) is None) == (choice == "csv")
    elif group == "attack":
        assert [attack.name for attack in read_evaluation(cfg).attacks] == [choice]
    elif group == "certificate":
        norm = "l2" if choice in ("lipschitz", "smoothing") else "linf"
        cfg = composed_anew("train", f"certificate={choice}", f"attack=pgd_{norm}", "output_dir=somewhere")
        assert [certificate.name for certificate in read_evaluation(cfg).certificates] == [choice]
    elif group == "suite":
        assert read_evaluation(cfg).attacks
    elif group == "hparams_search":
        assert cfg.objective == "validation_robust_accuracy"
    elif choice in (
        "image_folder",
        "tensors",
        "factory",
        "timm",
        "torchvision",
    ):  # they need a folder, a file or a name
        with pytest.raises(UserError, match="is missing: give"):
            build(cfg, group)
    elif choice.startswith("lipschitz_") and importlib.util.find_spec("orthogonium") is None:
        with pytest.raises(UserError, match=r"pip install jacobian-robust\[lipschitz\]"):
            build(cfg, group)
    elif choice == "gpu" and not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"trainer: .*(GPU|CUDA|gpu|cuda)"):
            build(cfg, group)
    else:
        made = build(cfg, group, optional=group in OPTIONAL)
        assert (made is None) == (choice == "none")
        if group == "eta":
            assert isinstance(made, EtaSchedule)
        if group == "eps_schedule" and made is not None:
            assert isinstance(made, EpsSchedule)
        if group == "regularizer" and made is not None:
            assert isinstance(made, Penalty)
        if group == "adversary" and made is not None:
            assert isinstance(made, Adversary)
        if group == "scheduler" and made is not None:
            assert isinstance(made, Schedule)


def test_the_full_suite_has_what_its_row_says_at_the_other_suites_budgets():
    full, *others = (
        {attack.name: attack for attack in read_evaluation(composed_anew("evaluate", f"suite={suite}")).attacks}
        for suite in ("full", "standard", "quick")
    )
    every = {choice for group, choice in CHOICES if group == "attack"}
    (row,) = re.findall(r"^\| `full` \| (.*) \|", (ROOT / "docs" / "howto" / "evaluate.md").read_text(), re.MULTILINE)
    assert every - full.keys() == set(re.findall(r"but `(\w+)`", row))
    for suite in others:
        for name, attack in suite.items():
            assert set(full[name].eps) >= set(attack.eps), name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_made_and_tells_its_command(experiment):
    cfg = composed_anew("train", f"experiment={experiment}", "output_dir=somewhere")
    if ".Lipschitz" in cfg.model._target_:
        pytest.importorskip("orthogonium", reason="extra lipschitz")
    training = ("regularizer", "adversary", "eta", "eps_schedule", "optimizer", "scheduler", "averaging", "trainer")
    groups = ("data", "model", *training)
    for group in groups:
        build(cfg, group, optional=group in OPTIONAL)
    assert read_evaluation(cfg).attacks
    header = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
    assert f"python train.py experiment={experiment}" in header
    assert "Cost:" in header
    assert "Result:" in header


def test_the_notes_experiments_are_the_notes():
    names = ("vanilla", "regularized", "constant_eta", "vanilla_double_softmax", "isometry")
    configs = [composed_anew("train", f"experiment=note_{name}") for name in names]
    for cfg in configs:
        assert cfg.trainer.max_epochs == 30
        assert cfg.data.batch_size == 32
        assert cfg.data.validation_size == 0
        assert cfg.optimizer.lr == 0.01
        attack = cfg.attack.pgd_linf
        assert (attack.steps, attack.step_size, list(attack.eps)) == (40, 0.01, [0.1, 0.2, 0.3])
    vanilla, regularized, constant_eta, double_softmax, _ = configs
    assert vanilla.regularizer._target_ is None
    assert regularized.regularizer.delta_over_eps == 1e-3
    assert (regularized.eta.min, regularized.eta.max) == (0.002, 0.006)
    assert constant_eta.eta.value == 0.005
    assert constant_eta.regularizer == regularized.regularizer
    assert double_softmax.regularizer._target_ is None
    assert double_softmax.model.double_softmax


def test_none_is_none_whatever_an_experiment_sets_of_another_choice():
    cfg = composed_anew("train", "experiment=toy", "regularizer=none")
    assert cfg.regularizer.eps == 0.1
    assert build(cfg, "regularizer", optional=True) is None
    assert without_none(cfg, ["regularizer"]).regularizer is None
    assert cfg.regularizer is not None


@pytest.mark.parametrize("group", sorted({group for group, _ in CHOICES}))
def test_every_choice_says_what_it_is(group):
    for path in (ROOT / "conf" / group).glob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("#"), f"{path} opens without saying what it is"

"""The command line: broken ones end in a line, ``--cfg job`` shows what was composed, and a shell completes options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf

from jacobian_robust.cli.mistakes import one_line

from .conftest import ROOT, composed_anew
from .test_fuzz import CHECKPOINT, leaves, stopped

__all__ = ["stopped"]  # a fixture

BROKEN = [
    *("eta.max=", "eta.max==1", "=1", "eta.max", "seed=[1", "seed=1]", "seed={a:1", "seed='1", 'seed="1', "seed=(1"),
    *("a b=1", "eta..max=1", ".eta=1", "eta.=1", "seed=${", "seed=${seed", "name=${name}", "seed=${nope}"),
    *("eta=nope", "eta=[constant,geometric]", "experiment=/etc/passwd", "trainer=default@x"),
    *("+eta=constant", "++nope=1", "+nope=1", "~nope", "~seed=1", "~eta.max", "+search.nope=1", "search.trial=-1"),
    *("search.trial=1.5", "search.pruner.nope=1", "search.storage=''", "objective=nope", "objective=''", "objective=3"),
    *("monitor_attack_images=-1", "monitor_attack_images=true", "monitor_attack_images=many", "processes=0"),
    *("hydra.run.dirr=x", "hydra.mode=SIDEWAYS", "hydra/sweeper=nope", "hydra/launcher=nope", "hparams_search=nope"),
    *("logger.api_key=1", "+logger.password=x", "search.storage=postgresql://me:word@host/db", "seed=1,2", "--nope"),
    *("seed=range(1,3)", "eta.max=interval(0,1)", "+data.root.x=1", "seed=null", "twin=maybe"),
]
SWEEPS = [
    *("seed=1,", "seed=,1", "seed=range(", "seed=choice()", "seed=range(1,3", "nope=1,2", "eta=nope,constant", "seed"),
    *("hydra.sweep.dirr=x", "eta.mx=1,2", "~nope", "seed=glob(*", "logger.api_key=1,2", "--nope"),
]
SEARCHES = [
    *("hydra.sweeper.trials=0", "hydra.sweeper.trials=true", "hydra.sweeper.trials=many", "hydra.sweeper.batch=0"),
    *("hydra.sweeper.batch=1.5", "hydra.sweeper.direction=sideways", "hydra.sweeper.study=''", "objective=null"),
    *("hydra.sweeper.storage=''", "+hydra.sweeper.nope=1", "hydra.sweeper.nope=1", "hydra.sweeper.sampler=null"),
    *("hydra.sweeper.storage=postgresql://me:word@host/db", "hydra.sweeper.params.eta.max=nowhere", "seed=1,"),
    *("+hydra.sweeper.params.seed=3", "hydra.sweeper.sampler._target_=os.system", "hydra.sweeper.study=3"),
]
LINES = [
    *[("train", [text]) for text in BROKEN],
    *[("evaluate", [f"checkpoint={CHECKPOINT}", text]) for text in BROKEN],
    *[("train", ["-m", text]) for text in SWEEPS],
    *[("evaluate", ["-m", f"checkpoint={CHECKPOINT}", text]) for text in SWEEPS],
    *[("train", ["hparams_search=optuna", text]) for text in SEARCHES],
]


FEW = [
    *[("train", [text]) for text in ("eta.max=", "seed=[1", "seed=${nope}", "eta=nope", "~nope", "seed=1,2", "--nope")],
    ("train", ["search.storage=postgresql://me:word@host/db"]),
    ("train", ["logger.api_key=1"]),
    ("train", ["objective=nope"]),
    ("evaluate", [f"checkpoint={CHECKPOINT}", "monitor_attack_images=many"]),
    ("evaluate", [f"checkpoint={CHECKPOINT}", "hydra.mode=SIDEWAYS"]),
    ("train", ["-m", "seed=range("]),
    ("train", ["-m", "nope=1,2"]),
    ("train", ["-m", "hydra.sweep.dirr=x"]),
    ("evaluate", ["-m", f"checkpoint={CHECKPOINT}", "eta=nope,constant"]),
    ("train", ["hparams_search=optuna", "hydra.sweeper.trials=0"]),
    ("train", ["hparams_search=optuna", "hydra.sweeper.storage=postgresql://me:word@host/db"]),
    ("train", ["hparams_search=optuna", "+hydra.sweeper.params.seed=3"]),
]
"""One of each kind; all of them are slow."""


@pytest.mark.parametrize(
    ("name", "line"),
    [pytest.param(*line, marks=() if line in FEW else pytest.mark.slow) for line in LINES],
    ids=[f"{name} {line[0][:2]} {line[-1]}" for name, line in LINES],
)
def test_a_broken_command_line_ends_in_one_line_and_leaves_no_result(door, stopped, tmp_path, name, line):
    result = door(name, *line, "hydra.run.dir=run", "hydra.sweep.dir=sweep")
    assert result.status == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.error.isprintable()
    assert "word@" not in result.error
    assert not [path for path in tmp_path.rglob("*") if path.name in ("config.yaml", "job.json", "study.journal")]


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_every_option_misspelt_is_told(name, every):
    """One letter too many in the name of any option, and in the name of any choice."""
    cfg = composed_anew(name, "output_dir=run")
    names = list(leaves(cfg))
    assert len(names) > 30
    for option in names[::every]:
        with pytest.raises(HydraException) as refusal:
            composed_anew(name, f"{option}x=1")
        line = one_line(refusal.value)
        assert f"{option}x" in line, line
        assert "\n" not in line
    groups = sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name in cfg)
    assert "attack" in groups
    for group in groups[:: max(1, every // 4)]:
        with pytest.raises(HydraException) as refusal:
            composed_anew(name, f"{group}=nowhere")
        assert "nowhere" in one_line(refusal.value)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_the_composed_config_is_shown(door, tmp_path, name):
    result = door(name, "--cfg", "job", "seed=7", "attack=fgsm", "output_dir=run")
    assert result.status == 0
    shown = yaml.safe_load(result.stdout)
    assert shown == OmegaConf.to_container(composed_anew(name, "seed=7", "attack=fgsm", "output_dir=run"))
    assert shown["seed"] == 7
    assert not list(tmp_path.iterdir())


def documented_completion():
    page = (ROOT / "docs/howto/train.md").read_text()
    (line,) = [line for line in page.splitlines() if "train.py -sc install=bash" in line]
    return line.split("`")[1]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train.py regularizer=fro", ["regularizer=frobenius"]),
        ("train.py regularizer=spectral regularizer.col", ["regularizer.columns="]),
        ("train.py hparams_search=", ["hparams_search=optuna"]),
        ("train.py search.tri", ["search.trial="]),
        ("evaluate.py suite=q", ["suite=quick"]),
        ("evaluate.py attack=pgd_l2 attack.pgd_l2.step", ["attack.pgd_l2.step_size=", "attack.pgd_l2.steps="]),
        ("train.py nope=1 nonsense", []),
    ],
)
@pytest.mark.slow
def test_bash_completes_options(typed, offered):
    """With the function that the documents have a shell take in, called as bash calls it for the tabulator key."""
    line = f"python {typed}"
    script = f'{documented_completion()}\n"$(complete -p python | sed "s/.*-F \\([^ ]*\\) .*/\\1/")"\n'
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_CWORD": str(len(line.split()) - 1)}
    # Of the installed package or of these sources, as the tests themselves.
    environment = os.environ | asked | {"PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered
    assert not done.stderr

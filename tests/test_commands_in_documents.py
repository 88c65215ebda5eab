"""The commands that README and the documents show are ones that the programs take."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from jacobian_robust.training.train import train

from .end_to_end.conftest import composed

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(r"(?:python (?:\S*/)?|jacobian-robust )(train|evaluate)(?:\.py)? ?(.*)")
FLAGS = {"-m", "--help", "--cfg", "job", "hydra", "…"}


def commands(documents):
    """Yield the document, the program and the options of each command line in a code block."""
    for document in documents:
        for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for program, rest in PROGRAM.findall(line.partition(" #")[0]):
                    yield document.relative_to(ROOT), program, shlex.split(rest.partition("&&")[0])


def first_choices(options):
    """Return the options of the first job of a sweep, without flags."""
    chosen = []
    for option in options:
        if option in FLAGS:
            continue
        override = OverridesParser.create().parse_override(option)
        if override.is_sweep_override():
            name, _, _ = option.partition("=")
            values = list(override.sweep_string_iterator()) if override.is_choice_sweep() else None
            option = f"{name}={values[0]}" if values else option
        chosen.append(option)
    return chosen


@pytest.mark.parametrize(
    ("documents", "least"),
    [
        pytest.param([ROOT / "README.md", ROOT / "docs" / "getting-started.md"], 4, id="first"),
        pytest.param(DOCUMENTS, 40, id="all", marks=pytest.mark.slow),
    ],
)
def test_every_command_composes(documents, least):
    found = {(program, *options): document for document, program, options in commands(documents)}
    assert len(found) > least
    refused = []
    for (program, *options), document in found.items():
        if "--config-dir" in options or any("hparams_search" in option or "tag(" in option for option in options):
            continue
        try:
            chosen = first_choices(options)
            if any("hydra" in option for option in chosen):
                with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                    compose(program, overrides=chosen, return_hydra_config=True)
            else:
                composed(program, *chosen)
        except Exception as error:
            refused.append(f"{document}: {program} {' '.join(options)}: {error}")
    assert not refused


def test_the_penalty_of_the_howto_trains(tmp_path, monkeypatch):
    page = (ROOT / "docs/howto/own-penalty.md").read_text(encoding="utf-8")
    (module,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "mylab.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mylab", raising=False)
    metrics = train(
        composed(
            *("train", "data=toy", "model=mlp", "regularizer=none", "regularizer._target_=mylab.SquaredNorm"),
            *("+regularizer.probes=1", "eta=constant", "eta.value=0.1", "logger=csv", "trainer.max_epochs=1"),
            *("trainer.enable_progress_bar=false", "monitor_images=0", f"output_dir={tmp_path / 'run'}"),
        )
    )
    assert metrics["train_penalty"] > 0


@pytest.mark.parametrize("line", ["python train.py nosuch.option=1"])
def test_a_wrong_command_would_be_found(line):
    ((program, rest),) = PROGRAM.findall(line)
    with (
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
        pytest.raises(Exception, match="Could not override"),
    ):
        compose(program, overrides=rest.split(), return_hydra_config=True)

"""What the programs make of a command line before Hydra reads it."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from jacobian_robust.cli.programs import _readable

PARSER = OverridesParser.create()


@pytest.mark.parametrize(
    "name",
    ["epoch=3-step=55.ckpt", "josé/run", "日本/run", "run (1)/x", "it's=1", "a;b", "=x", "a,b=c", "back\\slash=\\"],
)
def test_a_path_is_taken_as_it_is(name):
    (option,) = _readable([f"checkpoint={name}"])
    assert PARSER.parse_override(option).value() == name


def test_a_comma_is_of_the_name_where_such_a_file_is_and_of_a_sweep_where_none_is(tmp_path):
    (tmp_path / "a,b").touch()
    (option,) = _readable([f"checkpoint={tmp_path}/a,b"])
    assert PARSER.parse_override(option).value() == f"{tmp_path}/a,b"
    assert _readable(["seed=0,1"]) == ["seed=0,1"]


@pytest.mark.parametrize(
    "line",
    [
        ["-m", "seed=range(3)", "+a.b={c:1}", "~twin", "attack=[fgsm,pgd_l2]", "checkpoint='a=b'", "name=null"],
        ["--config-dir", "josé=1", "hydra.run.dir=runs/${now:%Y}", "name="],
    ],
)
def test_what_can_be_read_stays(line):
    assert _readable(line) == line


def test_a_list_that_cannot_be_read_is_refused_with_its_quoted_form(capsys):
    with pytest.raises(SystemExit, match="1"):
        _readable(["checkpoint=[a=1,b]"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: checkpoint=[a=1,b] cannot be read")
    assert "\"checkpoint=['a=b']\"" in line

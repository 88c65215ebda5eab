"""The console command and the search path of its configs."""

import sys

import pytest
from hydra import compose, initialize_config_dir

import jacobian_robust
from jacobian_robust.cli.main import main


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["jacobian-robust", *arguments])
    main()


def test_it_tells_its_version_and_its_commands(monkeypatch, capsys):
    command(monkeypatch, "--version")
    assert capsys.readouterr().out.strip() == jacobian_robust.__version__
    command(monkeypatch, "--help")
    assert "evaluate" in capsys.readouterr().out


@pytest.mark.parametrize("line", [["trian"], ["study", "nope"], ["study"], ["--nope"]])
def test_an_unknown_command_is_refused_in_one_line(monkeypatch, line):
    with pytest.raises(SystemExit, match=r"^error: .* is no command: give one of [^\n]*$"):
        command(monkeypatch, *line)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("jacobian-robust tr", "train evaluate compare study"),
        ("jacobian-robust train regularizer=fro", "regularizer=frobenius"),
        ("jacobian-robust evaluate suite=q", "suite=quick"),
        ("jacobian-robust study to", "note toy frontier classes simplifications"),
    ],
)
def test_it_completes_commands_and_options(monkeypatch, capsys, typed, offered):
    monkeypatch.setenv("COMP_LINE", typed)
    command(monkeypatch, "-sc", "query=bash")
    assert capsys.readouterr().out.strip() == offered


def test_a_program_from_any_directory_composes_the_configs_and_a_users_own(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "own.yaml").write_text("_target_: own.Model\n")
    command(monkeypatch, "train", "--config-dir", "mine", "model=own", "--cfg", "job")
    assert "_target_: own.Model" in capsys.readouterr().out


def test_a_class_beside_the_working_directory_is_found_and_takes_no_modules_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mylab_of_the_test.py").write_text("VALUE = 3\n")
    (tmp_path / "json.py").write_text("raise RuntimeError\n")
    command(monkeypatch, "--version")
    assert __import__("mylab_of_the_test").VALUE == 3
    assert __import__("json").loads("1") == 1
    assert sys.path[-1] == str(tmp_path)


def test_the_groups_are_offered_to_a_users_own_hydra_program(tmp_path):
    (tmp_path / "app.yaml").write_text("defaults: [{regularizer: frobenius}, {attack: pgd_linf}]\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("app")
    assert cfg.regularizer._target_ == "jacobian_robust.penalties.Frobenius"
    assert "pgd_linf" in cfg.attack

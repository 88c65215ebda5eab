"""The console command: ``jacobian-robust --help``."""

import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

import jacobian_robust

__all__ = ["main"]

_PROGRAMS = ("train", "evaluate")
_STUDIES = ("note", "toy", "frontier", "classes", "simplifications")
_COMMANDS = (*_PROGRAMS, "compare", "study")

_HELP = """\
usage: jacobian-robust COMMAND …

commands
  train            train a classifier; the same as python train.py
  evaluate         attack trained classifiers; the same as python evaluate.py
  compare          one report of several evaluations
  study note       reproduce the note
  study toy        draw the toy model
  study frontier   compare defences: accuracy against robustness
  study classes    count which class pays for the note's penalty
  study simplifications   measure the note's simplifications on a checkpoint; an evaluate with diagnostics

COMMAND --help shows a command's options. train and evaluate find their configs from any directory;
--config-dir DIRECTORY adds your own, as DIRECTORY/model/mine.yaml for model=mine.

tab completion: eval "$(jacobian-robust -sc install=bash)"
"""


def main() -> None:
    """Run the subcommand that the command line names.

    Classes of yours are found in the working directory, as with ``python train.py``. It comes last: a file there cannot
    take the place of an installed module.
    """
    sys.path.append(str(Path.cwd()))
    match sys.argv[1:]:
        case [] | ["-h" | "--help", *_] | ["study", "-h" | "--help", *_]:
            print(_HELP, end="")
        case ["--version"]:
            print(jacobian_robust.__version__)
        case ["-sc" | "--shell-completion", action]:
            _complete(action)
        case ["train" | "evaluate" as name, *options]:
            _run_program(name, options)
        case ["compare", *options]:
            _run_module("jacobian_robust.reporting.compare", options)
        case ["study", "simplifications", *options]:
            _run_program("evaluate", ["diagnostics=simplifications", *options])
        case ["study", name, *options] if name in _STUDIES:
            _run_module(f"jacobian_robust_studies.{name}", options)
        case ["study", *rest]:
            _refuse(f"study {rest[0] if rest else ''}".rstrip(), _STUDIES)
        case [name, *_]:
            _refuse(name, _COMMANDS)


def _refuse(name: str, known: tuple[str, ...]) -> NoReturn:
    sys.exit(f"error: {name!r} is no command: give one of {', '.join(known)}; --help explains them")


def _run_program(name: str, options: list[str]) -> None:
    module = importlib.import_module(f"jacobian_robust.cli.{name}")
    # The file runs the program by itself: Lightning starts further processes by this line.
    sys.argv = [str(module.__file__), *_flags_first(options)]
    module.main()


def _flags_first(options: list[str]) -> list[str]:
    """Move ``diagnostics=simplifications`` of a study behind the flags, which Hydra wants first."""
    if options[:1] != ["diagnostics=simplifications"]:
        return options
    return [*options[1:], options[0]]


def _run_module(name: str, options: list[str]) -> None:
    sys.argv = [sys.argv[0], *options]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _complete(action: str) -> None:
    """Install tab completion, or print the completions of the shell's ``COMP_LINE``."""
    if not action.startswith("query="):
        importlib.import_module("jacobian_robust.cli.train").main()
        return
    line = os.environ.get("COMP_LINE", "")
    command, _, rest = line.partition(" ")
    name, space, options = rest.lstrip().partition(" ")
    if not space:
        print(" ".join(_COMMANDS))
    elif name in _PROGRAMS:
        os.environ["COMP_LINE"] = f"{command} {options}"
        _run_program(name, ["-sc", action])
    elif name == "study" and " " not in options.lstrip():
        print(" ".join(_STUDIES))

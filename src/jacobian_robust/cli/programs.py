"""What the Hydra programs share: a mistake ends in one line and a non-zero status."""

import contextlib
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from jacobian_robust.cli.mistakes import MISTAKES, one_line
from jacobian_robust.cli.sweeps import close_sweep, run_job
from jacobian_robust.config import secret
from jacobian_robust.errors import Terminated, UserError

__all__ = ["entry_point", "run"]

_composed: list[DictConfig] = []
"""The configs of this process that Hydra could make sense of."""

_SECRET = re.compile(r"(?i)api_?key|password|secret|(?<!_)token")
"""What secrets are called."""

_VERBOSE = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")


def entry_point(main: Callable[[], Any]) -> Callable[[], None]:
    """Wrap a ``hydra.main`` function so that a mistake in its options ends in one line.

    ``HYDRA_FULL_ERROR=1`` shows the traceback. The exit status is 1, 130 after an interruption (SIGINT), or 143 after
    a termination (SIGTERM).
    """

    @functools.wraps(main)
    def entered() -> None:
        # Hydra then raises instead of printing several lines of its own.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        _composed.clear()
        _refuse_secrets(sys.argv[1:])
        _refuse_flags(sys.argv[1:])
        sys.argv[1:] = _readable(sys.argv[1:])
        try:
            with close_sweep():
                main()
        except KeyboardInterrupt as interruption:
            print(f"interrupted: {interruption}".removesuffix(": "), file=sys.stderr)
            sys.exit(130)
        except Terminated as termination:
            print(f"terminated: {termination}", file=sys.stderr)
            sys.exit(143)
        except MISTAKES as error:
            _fail(error)
        except ValueError as error:
            if _composed:  # then it is no mistake in the command line
                raise
            _fail(UserError(f"{error}: {' '.join(sys.argv[1:])}"))

    return entered


def run(task: str, cfg: DictConfig) -> float | None:
    """Run the function behind an entry point, with one line for a user's mistake and a traceback for a bug.

    Return the objective in a sweep; see :func:`jacobian_robust.cli.sweeps.run_job`. ``task`` is the dotted name of a
    function of the config. It is imported here: --help and a misspelt option need no torch.
    """
    _composed.append(cfg)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(task, cfg)
    module, _, function = task.rpartition(".")
    try:
        getattr(importlib.import_module(module), function)(cfg)
    except MISTAKES as error:
        # Hydra made it, and runs/, before anything was checked. What holds something stays.
        place, here = Path(HydraConfig.get().runtime.output_dir), Path.cwd()
        with contextlib.suppress(OSError):
            for made in (place, *(parent for parent in place.parents if parent.is_relative_to(here))):
                if made != here:
                    made.rmdir()
        _fail(error)
    return None


def _refuse_secrets(arguments: list[str]) -> None:
    """End if a key or password is among the options: a sweep would name directories by it, W&B log it."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        looked_up = " ".join(re.findall(r"oc\.env:([^,}]*)", value))
        why = secret(argument)
        if why is None and any(_SECRET.search(text) for text in (name, looked_up)):
            why = "is no place for a secret, which would be written to files: leave it in the environment"
        if why is not None:
            _fail(UserError(f"{'an option' if secret(name) else name.lstrip('+~')} {why}"))


def _refuse_flags(arguments: list[str]) -> None:
    """End in one line where Hydra's parser would show the whole of its usage."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        _fail(UserError(f"{message}; flags, as -m, come before the options, and --help shows both"))

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)


def _readable(arguments: list[str]) -> list[str]:
    """Return the arguments with quotes around what Hydra would not read without, as the names of many files.

    Those are ``epoch=3.ckpt``, what has letters outside ASCII, and an existing ``a,b``, which were a sweep.
    """
    parser, options = OverridesParser.create(), get_args_parser().parse_args(arguments).overrides

    def readable(option: str) -> str:
        name, _, value = option.partition("=")
        quoted = f"{name}={QuotedString(text=value, quote=Quote.single).with_quotes()}"
        try:
            sweep = parser.parse_override(option).is_sweep_override()
            return quoted if sweep and Path(value).exists() else option
        except HydraException as error:
            if not value or not re.fullmatch(r"\+{0,2}[\w.@/:]+", name) or re.match(r"\w+\(", value):
                return option  # a sweep's function, as range(; Hydra says what is wrong
            if value[0] in "[{(\"'":
                why = str(error).splitlines()[0]
                _fail(UserError(f"{name}={value} cannot be read ({why}); quote each name in it, as \"{name}=['a=b']\""))
            return quoted

    return [readable(argument) if argument in options else argument for argument in arguments]


def _fail(error: Exception) -> NoReturn:
    if _VERBOSE:
        traceback.print_exception(error)
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(1)

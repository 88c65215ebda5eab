"""What the two doors, ``train.py`` and ``evaluate.py``, share: a mistake ends in one line and a non-zero status."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jacobian_robust.errors import Terminated, UserError

__all__ = ["door", "run"]

_MISTAKES = (UserError, HydraException, OmegaConfBaseException, OSError)
# A sweep's directories are named by their overrides, made fit for a file system.
OmegaConf.register_new_resolver(
    "directory_name", lambda text: re.sub(r"[^\w.,=+-]+", "-", str(text))[:150], replace=True
)

_composed: list[DictConfig] = []
"""The configs of this process that Hydra could make sense of."""

_VERBOSE = bool(os.environ.get("HYDRA_FULL_ERROR"))


def door(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a ``hydra.main`` function so that a mistake in its options is told in one line.

    ``HYDRA_FULL_ERROR=1`` shows the traceback. The exit status is 1, 130 after an interruption (SIGINT), or 143 after
    a termination (SIGTERM).
    """

    @functools.wraps(main)
    def entered() -> None:
        # Hydra then raises instead of printing several lines of its own.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        _composed.clear()
        _refuse_secrets(sys.argv[1:])
        try:
            main()
        except KeyboardInterrupt as interruption:
            print(f"interrupted: {interruption}".removesuffix(": "), file=sys.stderr)
            sys.exit(130)
        except Terminated as termination:
            print(f"terminated: {termination}", file=sys.stderr)
            sys.exit(143)
        except _MISTAKES as error:
            _fail(error)
        except ValueError as error:
            if _composed:  # then it is no mistake in the command line
                raise
            _fail(UserError(f"{error}: {' '.join(sys.argv[1:])}"))

    return entered


def run(task: Callable[[DictConfig], Any], cfg: DictConfig) -> None:
    """Run what a door leads to, with a user's mistake told in one line and a bug by its traceback.

    In a sweep the error goes on to Hydra instead, which runs the other jobs before it says which one failed.
    """
    _composed.append(cfg)
    try:
        task(cfg)
    except _MISTAKES as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _fail(error)


def _refuse_secrets(arguments: list[str]) -> None:
    """End if a key or password is among the options: a sweep would name directories by it, W&B log it."""
    for name in (argument.partition("=")[0] for argument in arguments):
        if re.search(r"(?i)api_?key|password|secret|(?<!_)token", name):
            _fail(UserError(f"{name.lstrip('+~')}: a secret does not belong among the options: set WANDB_API_KEY"))


def _fail(error: Exception) -> NoReturn:
    if _VERBOSE:
        traceback.print_exception(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if unknown := re.match(r"Could not override '([\w.]+)'", str(error)):
        name = unknown[1]
        under = ", as attack.pgd_linf.steps" if name.startswith("attack.") else ""
        lines = [f"{name}: there is no such option{under}; --cfg job shows all there are, --help the groups"]
    # Hydra's second-best hint and OmegaConf's internals are noise to somebody who misspelt an option.
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "To append to your config"))]
    line = f"error: {'; '.join(kept) or type(error).__name__}"
    # What a file or a directory is called must not move the terminal's cursor.
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)
    sys.exit(1)

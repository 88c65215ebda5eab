"""The one-line errors of the commands, in the words of this project's options."""

import re

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from jacobian_robust.errors import UserError

__all__ = ["MISTAKES", "one_line"]

MISTAKES = (UserError, HydraException, OmegaConfBaseException, OSError)
"""Exceptions that are reported in one line."""


def one_line(error: BaseException) -> str:
    """Return an exception's message in one line, in the words of this project's options."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if unknown := re.match(r"Could not override '([\w.]+)'", str(error)):
        name = unknown[1]
        under = ", as attack.pgd_linf.steps" if name.startswith("attack.") else ""
        lines = [f"{name}: there is no such option{under}; --cfg job shows all there are, --help the groups"]
    # Hydra's second-best hint and OmegaConf's internals are noise to somebody who misspelt an option.
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "To append to your config"))]
    # What a file or a directory is called must not move the terminal's cursor.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in "; ".join(kept) or type(error).__name__)

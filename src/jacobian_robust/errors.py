"""The exceptions that the command line shows as a single line instead of a traceback."""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

__all__ = ["DIVERGED", "Terminated", "UserError", "describe", "ends_in_one_line"]


class UserError(ValueError):
    """A mistake outside the code: an option, a file, a directory. The message names it and its remedy, in one line."""


class Terminated(BaseException):
    """The process was asked to end (SIGTERM) and has kept its state; the message says how to go on."""


DIVERGED = "training diverged"
"""How the message of a training begins that was ended by a loss or a gradient that is not finite."""


@contextlib.contextmanager
def ends_in_one_line(*, again: str = "") -> Iterator[None]:
    """Within the context, end the program in one line: at a mistake with status 1, at an interruption with 130.

    Args:
        again: how to go on after an interruption.
    """
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted: {again}".removesuffix(": "), file=sys.stderr)
        sys.exit(130)


def describe(error: BaseException, group: str = "") -> str:
    """Return one line about an error, with the full names of the options at fault.

    Args:
        error: what was raised.
        group: the config group it was raised in.
    """
    if isinstance(error, ValidationError):
        described: dict[str, str] = {}  # where several types were possible, the first one's complaint
        for details in error.errors():
            name = ".".join(str(part) for part in (group, *details["loc"]) if not _POSSIBLE_TYPE.fullmatch(str(part)))
            described.setdefault(name, _describe_option(details, name))
        return "; ".join(described.values())
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{group}: {text}" if group else text


_POSSIBLE_TYPE = re.compile(r"|constrained-\w+|(float|int|str|bool)|\w+\[.*\]")
"""What pydantic adds to the place of an option that may be of several types."""


def _describe_option(details: Mapping[str, Any], name: str) -> str:
    message = details["msg"].removeprefix("Value error, ")
    # What an unknown option holds is not shown: it could be a key.
    got = f" (got {details['input']!r})" if details["loc"] and "unexpected" not in details["type"] + message else ""
    return f"{name}: {message[:1].lower()}{message[1:]}{got}" if name else message

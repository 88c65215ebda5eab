"""The exceptions that the command line shows as a single line instead of a traceback."""

__all__ = ["Terminated", "UserError"]


class UserError(ValueError):
    """A mistake outside the code: an option, a file, a directory. The message names it and its remedy, in one line."""


class Terminated(BaseException):
    """The process was asked to end (SIGTERM) and has kept its state; the message says how to go on."""

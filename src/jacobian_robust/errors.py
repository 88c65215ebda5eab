"""The one exception that the command line shows as a single line instead of a traceback."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake outside the code: an option, a file, a directory. The message names it and its remedy, in one line."""

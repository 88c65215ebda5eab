"""Writing results so that an interruption leaves the old file or the new one, never half of one."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jacobian_robust.errors import UserError

__all__ = ["claim", "from_here", "write_atomically"]


def from_here(path: str | Path) -> Path:
    """Return a path relative to the working directory if it is below it, as a person would write it."""
    path, here = Path(path), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def claim(directory: Path, name: str, text: str) -> None:
    """Write the file that makes a directory a result's own; of two processes, one succeeds.

    Raises:
        UserError: if the directory holds such a file already; nothing is changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with (directory / name).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(
            f"{directory} already holds a result ({name}), which is left as it is: choose another hydra.run.dir"
        ) from error


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that takes the place of ``path`` when the block ends, and is dropped if it raises."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    scratch = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        scratch.chmod(0o644)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise

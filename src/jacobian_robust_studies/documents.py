"""Documents of which a command writes a part, between two marks, and a person the rest; and the commands' own runs."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically

__all__ = ["Document", "run_entry_point"]


class Document:
    """A Markdown file with a part that a command writes.

    Args:
        path: of the file; it need not exist.
        command: which writes the part.
        title: of a new document.

    Raises:
        UserError: if the file exists without the marks.
    """

    def __init__(self, path: Path, command: str, title: str) -> None:
        self.path = path
        self.marks = f"<!-- written by {command} -->", "<!-- end of what it writes -->"
        self.title = title
        self._around()

    def _around(self) -> tuple[str, str]:
        """Return what a person wrote before and after."""
        if not self.path.is_file():
            return f"# {self.title}\n\n", "\n"
        first, last = self.marks
        before, begin, rest = self.path.read_text().partition(first)
        _, end, after = rest.partition(last)
        if not (begin and end):
            raise UserError(
                f"{self.path} lacks the lines {first!r} and {last!r}, between which the tables go: put both back"
            )
        return before, after

    def write(self, text: str) -> None:
        """Put the text between the marks, and leave the rest as it is."""
        before, after = self._around()
        first, last = self.marks
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as file:
            file.write(f"{before}{first}\n\n{text}\n{last}{after}")


def run_entry_point(*command: str, check: bool = True, threads: int | None = None, log: Path | None = None) -> None:
    """Run ``train.py`` or ``evaluate.py`` of the clone in the working directory, as a person would.

    Args:
        command: the script and its options.
        check: whether a failure raises.
        threads: that it may use; all processors by default.
        log: file to append its output to, where other commands use the terminal at the same time.

    Raises:
        UserError: if this is no clone, or the command fails.
    """
    if not Path(command[0]).is_file():
        raise UserError(f"run this in a clone of the project: {command[0]} is not in the working directory")
    print("+ python", *command, flush=True)
    environment = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a") if log else contextlib.nullcontext() as output:
        done = subprocess.run([sys.executable, *command], env=environment, stdout=output, stderr=output, check=False)
    if done.returncode and check:
        why = f": {log} says why" if log else ""
        raise UserError(f"python {' '.join(command)} ended with status {done.returncode}{why}; run this again to go on")

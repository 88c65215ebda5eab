"""Documents of which a command writes a part, between two marks, and a person the rest."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from jacobian_robust.errors import UserError
from jacobian_robust.files import write_atomically

__all__ = ["Document", "end_entry_points", "run_entry_point"]


class Document:
    """A Markdown file with a part that a command writes.

    Args:
        path: of the file; it need not be there.
        command: whose part it is.
        title: of the document, where it is not there yet.

    Raises:
        UserError: if the file is there without the marks.
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
        check: whether a failure ends the work.
        threads: of the processors that it may use; all by default.
        log: file to append what it prints to, where others have the terminal at the same time.

    Raises:
        UserError: if this is no clone, or the command fails.
    """
    if not Path(command[0]).is_file():
        raise UserError(f"run this in a clone of the project: {command[0]} is not in the working directory")
    print("+ python", *command, flush=True)
    environment = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a") if log else contextlib.nullcontext() as output:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output)
    _running.add(process)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        end_entry_points()
        raise
    finally:
        _running.discard(process)
    if status and check:
        why = f": {log} says why" if log else ""
        raise UserError(f"python {' '.join(command)} ended with status {status}{why}; run this again to go on")


_running: set[subprocess.Popen[bytes]] = set()

GRACE = 10.0
"""Seconds that all of them have to end by themselves: Ctrl-C in a terminal interrupts them too."""


def end_entry_points() -> None:
    """End all commands that :func:`run_entry_point` runs, in any thread; Ctrl-C may reach this process alone."""
    running, deadline = list(_running), time.monotonic() + GRACE
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in running:
        process.terminate()  # nothing, if it has ended
    for process in running:
        process.wait()

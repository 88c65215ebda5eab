"""Other processes: several that train together. None outlives the one that started them, and one's failure ends all."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from typing import Any, Literal, NamedTuple

from jacobian_robust.errors import Terminated, UserError

__all__ = ["ProcessDied", "Stop", "run_together"]

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy a CUDA context, and the locks of other threads

PATIENCE = 20.0
"""Seconds that the others have, once a process has failed, to say why they do: they may know better."""


class ProcessDied(Exception):
    """A process ended without a word: it was killed, as a system does that is short of memory, or it crashed."""


class Stop:
    """A request to end, which the starting process makes and the others look at."""

    def __init__(self) -> None:
        self._flag = RawValue(ctypes.c_bool, False)

    def __call__(self) -> bool:
        """Return whether to end."""
        return bool(self._flag.value)

    def ask(self) -> None:
        """Ask all processes to end."""
        self._flag.value = True


class _Failure(NamedTuple):
    """Why a process ended; the kinds are in the order in which they explain the failures of the others."""

    kind: Literal["died", "mistake", "terminated", "bug"]
    why: str

    def error(self) -> BaseException:
        kinds: dict[str, type[BaseException]] = {
            "died": ProcessDied,
            "mistake": UserError,
            "terminated": Terminated,
            "bug": RuntimeError,
        }
        return kinds[self.kind](self.why)


def run_together(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], stop: Stop) -> None:
    """Call a function in a process for each tuple of arguments, and return when all have ended.

    The processes are deaf to SIGINT and SIGTERM, which are often sent to all of a group: this one asks them to ``stop``
    for either, and waits for them. A second SIGINT does not wait.

    Args:
        task: a function of a module; ``UserError`` and ``Terminated`` are raised here as they are raised there.
        arguments: of each process, by which they can know one another; what a spawned process can be given.
        stop: among the arguments, for the function to look at.

    Raises:
        ProcessDied: if one was killed.
        KeyboardInterrupt: after an interruption, when all have ended.
        Terminated: after SIGTERM, when all have ended.
        RuntimeError: with the traceback of any other error.
    """
    processes: dict[Connection, tuple[int, BaseProcess]] = {}
    interrupted = False
    with _answering(signal.SIGTERM, stop.ask):
        try:
            with _answering(signal.SIGINT, None):  # those that are spawned inherit it
                for number, of_process in enumerate(arguments):
                    processes |= {connection: (number, p) for connection, p in [_started(task, of_process)]}
            try:
                failures = _ended(processes)
                if not failures:
                    for _, process in processes.values():
                        process.join()
            except KeyboardInterrupt:
                interrupted = True
                stop.ask()
                failures = _ended(processes)
        finally:
            for _, process in processes.values():
                process.kill()
                process.join()
    if interrupted:
        raise KeyboardInterrupt
    if stop():
        raise next((failure.error() for failure in failures if failure.kind == "terminated"), Terminated())
    if failures:
        raise min(failures, key=lambda failure: ("died", "mistake", "terminated", "bug").index(failure.kind)).error()


def _started(task: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[Connection, BaseProcess]:
    ours, theirs = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_entered, args=(theirs, task, arguments))
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return ours, process


def _ended(processes: dict[Connection, tuple[int, BaseProcess]]) -> list[_Failure]:
    """Return the failures, in the order in which they were told; some processes still run if they say nothing."""
    failures: list[_Failure] = []
    deadline = None
    while running := [connection for connection in processes if not connection.closed]:
        heard = wait(running, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not heard:
            return failures
        for connection in heard:
            assert isinstance(connection, Connection)
            number, process = processes[connection]
            try:
                failure = connection.recv()
            except EOFError:
                process.join()
                failure = _Failure("died", f"process {number + 1} of {len(processes)} {_how_it_died(process)}")
            connection.close()
            if failure is not None:
                failures.append(failure)
                deadline = deadline or time.monotonic() + PATIENCE
    return failures


def _how_it_died(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (short of memory?)" if name == "SIGKILL" else "")
    return f"ended with status {code}"


def _entered(connection: Connection, task: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Do what a process was started for, and say how it ended: nothing, or a failure."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    failure = None
    try:
        task(*arguments)
    except UserError as error:
        failure = _Failure("mistake", str(error))
    except Terminated as error:
        failure = _Failure("terminated", str(error))
    except BaseException:
        failure = _Failure("bug", f"in another process:\n{traceback.format_exc()}")
    connection.send(failure)


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, however that was: nobody waits for it any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _answering(number: signal.Signals, answer: Callable[[], None] | None) -> Iterator[None]:
    """Answer a signal by a call, or not at all; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN if answer is None else lambda *_: answer())
    try:
        yield
    finally:
        signal.signal(number, before)

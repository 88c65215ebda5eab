"""Other processes: several that train together, or share work. None outlives the one that started them.

One's failure ends all, and is told where they were started.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from typing import Any, Literal, NamedTuple

from jacobian_robust.errors import Terminated, UserError

__all__ = ["ProcessDied", "Stop", "Workers", "run_together"]

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
    processes: dict[Connection, BaseProcess] = {}
    interrupted = False
    with _answering(signal.SIGTERM, stop.ask):
        try:
            with _answering(signal.SIGINT, None):  # those that are spawned inherit it
                for of_process in arguments:
                    connection, process = _started(_do, (task, *of_process))
                    processes[connection] = process
            try:
                failures = _ended(processes)
                if not failures:
                    for process in processes.values():
                        process.join()
            except KeyboardInterrupt:
                interrupted = True
                stop.ask()
                failures = _ended(processes)
        finally:
            for process in processes.values():
                process.kill()
                process.join()
    if interrupted:
        raise KeyboardInterrupt
    if stop():
        raise next((failure.error() for failure in failures if failure.kind == "terminated"), Terminated())
    if failures:
        raise min(failures, key=lambda failure: ("died", "mistake", "terminated", "bug").index(failure.kind)).error()


class Workers:
    """Processes that do one job after another, and end when the block does.

    Args:
        number: how many.
        make: a function of a module, called in each process with its number and the arguments; returns a function that
            does a job.
        arguments: for it, what a spawned process can be given.

    Raises:
        ProcessDied: if one was killed.
        UserError: as it is raised there.
        RuntimeError: with the traceback of any other error.
    """

    def __init__(self, number: int, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        self._processes: dict[Connection, BaseProcess] = {}
        self._doing: dict[Connection, int] = {}
        self._given = 0
        with _answering(signal.SIGINT, None):  # those that are spawned inherit it
            for i in range(number):
                connection, process = _started(_work, (make, i, *arguments))
                self._processes[connection] = process

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    def map(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """Yield what is made of the jobs, in their order."""
        jobs, next_one = iter(jobs), self._given
        done: dict[int, Any] = {}
        while True:
            idle = [connection for connection in self._processes if connection not in self._doing]
            # Each has one job at a time: a pipe holds less than a batch, and both ends would wait to be read.
            for connection, job in zip(idle, jobs, strict=False):
                self._doing[connection], self._given = self._given, self._given + 1
                with contextlib.suppress(ConnectionError):  # what it has said, if anything, says more
                    connection.send(job)
            while next_one in done:
                yield done.pop(next_one)
                next_one += 1
            if next_one == self._given:
                return
            for heard in wait(list(self._doing)):
                assert isinstance(heard, Connection)
                # What is left of an abandoned pass has a smaller number, and is asked for no more.
                done[self._doing.pop(heard)] = self._received(heard)

    def _received(self, connection: Connection) -> Any:
        try:
            result = connection.recv()
        except (EOFError, ConnectionError):
            process = self._processes[connection]
            process.join()
            raise ProcessDied(f"process {_which(connection, self._processes)} {_how_it_died(process)}") from None
        if isinstance(result, _Failure):
            raise result.error()
        return result


def _work(connection: Connection, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
    do = make(*arguments)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(do(job))


def _which(connection: Connection, processes: Mapping[Connection, Any]) -> str:
    return f"{list(processes).index(connection) + 1} of {len(processes)}"


def _started(task: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[Connection, BaseProcess]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_entered, args=(theirs, task, arguments))
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return ours, process


def _ended(processes: dict[Connection, BaseProcess]) -> list[_Failure]:
    """Return the failures, in the order in which they were told; some processes still run if they say nothing."""
    failures: list[_Failure] = []
    deadline = None
    while running := [connection for connection in processes if not connection.closed]:
        heard = wait(running, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not heard:
            return failures
        for connection in heard:
            assert isinstance(connection, Connection)
            try:
                failure = connection.recv()
            except (EOFError, ConnectionError):
                process = processes[connection]
                process.join()
                failure = _Failure("died", f"process {_which(connection, processes)} {_how_it_died(process)}")
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
    """Do what a process was started for, and say why it could not."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        task(connection, *arguments)
    except UserError as error:
        connection.send(_Failure("mistake", str(error)))
    except Terminated as error:
        connection.send(_Failure("terminated", str(error)))
    except BaseException:
        connection.send(_Failure("bug", f"in another process:\n{traceback.format_exc()}"))


def _do(connection: Connection, task: Callable[..., None], *arguments: Any) -> None:
    task(*arguments)
    connection.send(None)


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

"""Processes that work together end together, and say why in one line."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jacobian_robust.errors import Terminated, UserError
from jacobian_robust.training.processes import ProcessDied, Stop, Workers, run_together


def write(path, stop):
    Path(path).write_text(str(os.getpid()))


def until_stopped(path, stop):
    write(path, stop)
    while not stop():
        time.sleep(0.01)
    raise Terminated("stopped")


def for_ever(path, stop):
    write(path, stop)
    time.sleep(1000)


def mistaken(path, stop):
    raise UserError("an option")


def buggy(path, stop):
    raise ZeroDivisionError


def killed(path, stop):
    os.kill(os.getpid(), signal.SIGKILL)


def one_of_each(first, second, path, stop):
    (second if str(path).endswith("1") else first)(path, stop)


def together(tmp_path, first, second):
    stop = Stop()
    run_together(one_of_each, [(first, second, tmp_path / str(i), stop) for i in range(2)], stop)


def alive(path):
    try:
        os.kill(int(path.read_text()), 0)
    except (ProcessLookupError, ValueError, FileNotFoundError):
        return False
    return True


def eventually(condition):
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_all_run_and_end(tmp_path):
    together(tmp_path, write, write)
    assert len({(tmp_path / str(i)).read_text() for i in range(2)}) == 2


@pytest.mark.parametrize(
    ("task", "error", "why"),
    [
        (mistaken, UserError, "an option"),
        (buggy, RuntimeError, "ZeroDivisionError"),
        (killed, ProcessDied, "process 2 of 2 was killed by SIGKILL"),
    ],
)
def test_one_that_fails_ends_the_other(tmp_path, monkeypatch, task, error, why):
    monkeypatch.setattr("jacobian_robust.training.processes.PATIENCE", 0.2)
    with pytest.raises(error, match=why):
        together(tmp_path, for_ever, task)
    assert not alive(tmp_path / "0")


def test_what_was_the_users_mistake_is_told_although_it_broke_the_others(tmp_path):
    with pytest.raises(UserError, match="an option"):
        together(tmp_path, buggy, mistaken)
    with pytest.raises(ProcessDied):
        together(tmp_path, buggy, killed)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_asks_all_to_end(tmp_path, number, error):
    def interrupt():
        eventually(lambda: all((tmp_path / str(i)).exists() for i in range(2)))
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is deaf to it
    try:
        with pytest.raises(error):
            together(tmp_path, until_stopped, until_stopped)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(alive(tmp_path / str(i)) for i in range(2))


def test_none_outlives_the_process_that_started_it(tmp_path):
    script = (
        "from tests.test_processes import *\n"
        f"if __name__ == '__main__': together(Path({str(tmp_path)!r}), for_ever, for_ever)"
    )
    (tmp_path / "start.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "start.py")], env=environment)
    assert eventually(lambda: all(alive(tmp_path / str(i)) for i in range(2)))
    parent.kill()
    parent.wait()
    assert eventually(lambda: not any(alive(tmp_path / str(i)) for i in range(2)))


def doubling(number, path):
    (path / str(number)).write_text(str(os.getpid()))

    def double(job):
        if job == "mistake":
            raise UserError("an option")
        if job == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2 if job == 0 else 0)
        return 2 * job

    return double


def test_workers_answer_in_order_whoever_was_slow(tmp_path):
    with Workers(3, doubling, tmp_path) as workers:
        assert list(workers.map(range(20))) == list(range(0, 40, 2))
        abandoned = workers.map(range(20))
        assert next(abandoned) == 0
        abandoned.close()
        assert list(workers.map(["a", "b"])) == ["aa", "bb"]
        assert list(workers.map([])) == []
    assert len(list(tmp_path.iterdir())) == 3
    assert not any(alive(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("job", "error", "why"), [("mistake", UserError, "an option"), ("death", ProcessDied, "was killed by SIGKILL")]
)
def test_what_befalls_a_worker_is_told(tmp_path, job, error, why):
    with pytest.raises(error, match=why), Workers(2, doubling, tmp_path) as workers:
        list(workers.map([1, 2, job, 3]))
    assert not any(alive(path) for path in tmp_path.iterdir())


def test_a_worker_that_cannot_begin_says_why(tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(RuntimeError, match="FileNotFoundError"), Workers(1, doubling, nowhere) as workers:
        list(workers.map([1]))

"""Attack batches in this process, one after the other, or in several processes, with the same results."""

import contextlib
import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from jacobian_robust.attacks import Attack
from jacobian_robust.errors import UserError
from jacobian_robust.memory import keep_freed_memory

__all__ = ["Attackers", "Job", "full_precision", "one_by_one", "several"]


class Job(NamedTuple):
    """A batch to attack.

    Attributes:
        model: whose answers the attack follows.
        attack: the attack.
        images: pixels in [0, 1].
        labels: the true classes.
        eps: radius of the ball.
        stream: a text that gives the random stream, so that it does not matter which process attacks, or when.
    """

    model: nn.Module
    attack: Attack
    images: Float[Tensor, "batch *shape"]
    labels: Shaped[Tensor, "batch *_"]
    eps: float
    stream: str


Attackers = Callable[[Iterable[Job]], Iterator[Tensor]]
"""Returns the attacked images of each batch, in the order of the batches, which all follow the same model."""


def one_by_one(jobs: Iterable[Job]) -> Iterator[Float[Tensor, "batch *shape"]]:
    """Attack one batch after the other, here; torch's global random stream is left as it was."""
    for job in jobs:
        with _seeded(job.stream):
            adversarial = job.attack.perturb(job.model, job.images, job.labels, job.eps)
        yield adversarial


@contextlib.contextmanager
def _seeded(stream: str) -> Iterator[None]:
    """Draw from a random stream that a text gives, and go on with the old one afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # manual_seed reseeds them all
        torch.manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big") >> 1)
        yield


@contextlib.contextmanager
def several(processes: int, models: Sequence[nn.Module]) -> Iterator[Attackers]:
    """Yield attackers that run in several processes, each on a GPU of its own where there are several.

    Attacks that follow another model than the given ones run in this process, as all do for ``processes=1``.

    Args:
        processes: how many.
        models: those whose answers attacks may follow.

    Raises:
        UserError: if a model cannot be given to another process; from the attackers, if a process died.
    """
    if processes == 1:
        yield one_by_one
        return
    packed = [_packed(model, processes) for model in models]
    numbers = {id(model): number for number, model in enumerate(models)}
    spawn = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)  # the processors that this process would use alone
    in_worker, here = spawn.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        processes, spawn, initializer=_start_worker, initargs=(in_worker, spawn.Value("i", 0), threads, packed)
    )

    def attack(jobs: Iterable[Job]) -> Iterator[Tensor]:
        jobs = iter(jobs)
        for first in jobs:
            together = itertools.chain([first], jobs)
            if id(first.model) in numbers:
                yield from _in_order(pool, processes, numbers, together)
            else:
                yield from one_by_one(together)

    try:
        yield attack
    finally:
        here.close()  # ends the workers, in the middle of a batch if need be
        pool.shutdown(cancel_futures=True)
        in_worker.close()


def _in_order(
    pool: ProcessPoolExecutor, processes: int, numbers: dict[int, int], jobs: Iterable[Job]
) -> Iterator[Tensor]:
    """Yield the attacked batches in their order, with at most two batches a process under way."""
    waiting: deque[tuple[Future[Any], torch.device]] = deque()
    try:
        for job in jobs:
            # As arrays: tensors would travel through shared memory, which outlives processes that are killed.
            arrays = job.images.numpy(force=True), job.labels.numpy(force=True)
            submitted = pool.submit(_attack_in_worker, numbers[id(job.model)], job.attack, *arrays, job.eps, job.stream)
            waiting.append((submitted, job.images.device))
            if len(waiting) == 2 * processes:
                done, device = waiting.popleft()
                yield torch.from_numpy(done.result()).to(device)
        while waiting:
            done, device = waiting.popleft()
            yield torch.from_numpy(done.result()).to(device)
    except BrokenProcessPool as error:
        raise UserError(
            f"attacking: one of {processes} processes died (killed, short of memory?); an evaluation goes on with the "
            "same options and resume=true, with processes=1 alone"
        ) from error
    finally:
        for left, _ in waiting:
            left.cancel()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the context, convolve with all 24 bits of float32; by default a GPU multiplies with 11 (TF32)."""
    rounded = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = rounded


def _packed(model: nn.Module, processes: int) -> bytes:
    """Return a model as bytes, weights and all: a function that made it could make another one."""
    content = io.BytesIO()
    try:
        torch.save(model, content)
    except Exception as error:  # a foreign model can fail in any way
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"processes={processes}: the model cannot be given to another process ({what}); give processes=1"
        ) from error
    return content.getvalue()


class _Worker:
    """What a worker process holds: its device, and the models by number once they are used."""

    device = torch.device("cpu")
    packed: Sequence[bytes] = ()
    models: dict[int, nn.Module] = {}  # noqa: RUF012 - one for the process


def _start_worker(ends: Connection, count: Any, threads: int, packed: Sequence[bytes]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is for the process that started this one
    threading.Thread(target=_end_with, args=(ends,), daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # as full_precision, for as long as the process lasts
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    if gpus := torch.cuda.device_count():
        _Worker.device = torch.device("cuda", number % gpus)
    _Worker.packed = packed


def _end_with(ends: Connection) -> None:
    """End this process when the one that started it closes its end of the pipe or has died."""
    with contextlib.suppress(EOFError, OSError):
        ends.recv()
    os._exit(1)


def _attack_in_worker(number: int, attack: Attack, images: Any, labels: Any, eps: float, stream: str) -> Any:
    if number not in _Worker.models:  # its own bytes, from the process that started it
        content = io.BytesIO(_Worker.packed[number])
        _Worker.models[number] = torch.load(content, map_location=_Worker.device, weights_only=False)
    here = [torch.from_numpy(array).to(_Worker.device) for array in (images, labels)]
    job = Job(_Worker.models[number], attack, here[0], here[1], eps, stream)
    return next(one_by_one([job])).numpy(force=True)

"""Who attacks: this process, batch after batch, or several others at once, with the same results."""

import contextlib
import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobian_robust.attacks import Attack
from jacobian_robust.errors import UserError
from jacobian_robust.training.memory import keep_freed_memory
from jacobian_robust.training.processes import Workers

__all__ = ["Attackers", "Job", "full_precision", "one_by_one", "several"]


class Job(NamedTuple):
    """A batch to attack.

    Attributes:
        model: whose answers the attack follows.
        attack: the attack.
        images: pixels in [0, 1].
        labels: the true classes.
        eps: radius of the ball.
        stream: a text that gives the random stream, so that it does not matter who attacks, or when.
    """

    model: nn.Module
    attack: Attack
    images: Float[Tensor, "batch *shape"]
    labels: Int[Tensor, "batch"]
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
    """Yield attackers that share the batches among processes, each on a GPU of its own where there are several.

    What follows another model than the given ones is attacked here. A single process is this one.

    Args:
        processes: how many.
        models: those whose answers attacks may follow.

    Raises:
        UserError: if a model cannot be given to another process.
        ProcessDied: from the attackers, if a process was killed.
    """
    if processes == 1:
        yield one_by_one
        return
    # The processors that this process would use alone.
    threads = max(1, torch.get_num_threads() // processes)
    with Workers(processes, _attacker, threads, [_packed(model, processes) for model in models]) as workers:
        numbers = {id(model): number for number, model in enumerate(models)}

        def given(job: Job) -> tuple[Any, ...]:
            # As arrays: tensors would travel through shared memory, which outlives those that are killed.
            return numbers[id(job.model)], job.attack, _array(job.images), _array(job.labels), job.eps, job.stream

        def attack(jobs: Iterable[Job]) -> Iterator[Tensor]:
            jobs = iter(jobs)
            for first in jobs:
                together = itertools.chain([first], jobs)
                if id(first.model) in numbers:
                    for adversarial in workers.map(map(given, together)):
                        yield torch.from_numpy(adversarial).to(first.images.device)
                else:
                    yield from one_by_one(together)

        yield attack


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the context, convolve with all 24 bits of float32; by default a GPU multiplies with 11 (TF32)."""
    rounded = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = rounded


def _array(tensor: Tensor) -> Any:
    return tensor.numpy(force=True)


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


def _attacker(number: int, threads: int, packed: Sequence[bytes]) -> Callable[[Any], Any]:
    """Return what one of the processes does with a batch."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as full_precision, for as long as the process lasts
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    # Its own bytes, from the process that started it.
    models = [torch.load(io.BytesIO(content), map_location=device, weights_only=False) for content in packed]

    def attack(given: Any) -> Any:
        model, attack, images, labels, eps, stream = given
        job = Job(
            models[model], attack, torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), eps, stream
        )
        return _array(next(one_by_one([job])))

    return attack

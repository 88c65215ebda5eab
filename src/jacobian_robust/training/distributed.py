"""What the processes of one training agree on; with one process everything is its own."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.utilities.rank_zero import _get_rank
from torch import Tensor

__all__ = ["any_process", "gathered", "rank", "summed", "this_process"]

T = TypeVar("T")


def this_process() -> int:
    """Return the number of this process among those that train together; 0 for one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank() -> int:
    """Return the number of this process before they meet, as whoever started it says; 0 for one alone."""
    return _get_rank() or 0


def any_process(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """Return which flags are raised in one process or more; all of them call this, and get the same answer."""
    if not dist.is_initialized():
        return flags
    raised = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return tuple(map(bool, raised.tolist()))


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; all of them call this."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def gathered(value: T) -> list[T]:
    """Return the values of all processes in their order; all of them call this. Tensors come from the CPU's memory."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

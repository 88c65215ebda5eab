"""A penalty as a constraint: multipliers that learn its weight, in place of a fixed one."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust.options import STRICT
from jacobian_robust.penalties.base import Condition, Model, Penalty, Reduce

__all__ = ["Lagrangian"]


def _summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes that train together; with one, the tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


class _State:
    """What a Lagrangian and its copies with another radius have in common.

    Attributes:
        multipliers: of the classes; ``None`` before the first batch.
        batches: of each batch since the last step, the classes' sums of the penalty and their numbers of images.
    """

    def __init__(self) -> None:
        self.multipliers: Tensor | None = None
        self.batches: list[Tensor] = []


@dataclass(eq=False, config=STRICT | {"arbitrary_types_allowed": True}, kw_only=True)
class Lagrangian(Penalty):
    """Asks that the mean of a penalty over each class be at most ``τ``, by the augmented Lagrangian.

    A class with the violation ``g = mean(α) - τ`` costs ``(max(0, λ + ρg)² - λ²)/(2ρ)`` (Rockafellar, 1973; Bertsekas,
    "Constrained optimization and Lagrange multiplier methods", 1982), and after each step of training its multiplier
    climbs, ``λ ← max(0, λ + rate·share·g)``, where ``share`` is the class's of the batch (stochastic primal-dual
    training as in Chamon & Ribeiro, "Probably approximately correct constrained learning", 2020). The mean over the
    batch of what is returned is the sum over the classes by these shares. A constraint that holds loses its weight, and
    one that is violated gains it without end: with ``eta=constant eta.value=0.5`` the loss is half the Lagrangian.

    With several processes ``g`` is of the whole batch, here as in :meth:`step`: in training they all call the penalty,
    and the multipliers are the same in all of them. The mean of their losses, and of its gradients, as
    DistributedDataParallel takes it of equal parts of a batch, is that of one process with the whole batch.

    Args:
        penalty: ``α``.
        tolerance: ``τ``, in units of the penalty.
        rate: step of the ascent.
        damping: weight ``ρ`` of the quadratic term.
    """

    penalty: Penalty
    tolerance: NonNegativeFloat = 0.0
    rate: PositiveFloat
    damping: PositiveFloat

    def __post_init__(self) -> None:
        self._state = _State()

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        *,
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return for each sample what its class costs, differentiable with respect to the model's parameters."""
        more = {"model": model} if self.needs_model else {}
        alpha = self.penalty(logits, inputs, labels, generator=generator, create_graph=create_graph, **more)
        classes, state = logits.shape[-1], self._state
        multipliers = alpha.new_zeros(classes) if state.multipliers is None else state.multipliers.to(alpha)
        state.multipliers = multipliers
        counts = alpha.new_zeros(classes).index_add(0, labels, torch.ones_like(alpha))
        sums = alpha.new_zeros(classes).index_add(0, labels, alpha)
        violations = self._violations(sums, counts)
        if create_graph:
            state.batches.append(torch.stack([sums.detach(), counts]))
            # The value of all processes, the derivative of this one.
            violations = violations - violations.detach() + self._violations(*_summed(state.batches[-1]))
        wanted = (multipliers + self.damping * violations).clamp_min(0)
        return ((wanted.square() - multipliers.square()) / (2 * self.damping))[labels]

    @property
    def needs_graph(self) -> bool:
        """Whether the constrained penalty differentiates the logits with respect to the inputs."""
        return self.penalty.needs_graph

    @property
    def needs_model(self) -> bool:
        """Whether the constrained penalty evaluates the model at other points than the inputs."""
        return self.penalty.needs_model

    @property
    def takes_probabilities(self) -> bool:
        """Whether the constrained penalty is given probabilities instead of logits."""
        return self.penalty.takes_probabilities

    def with_radius(self, share: float) -> "Lagrangian":
        """Return the constraint on the penalty with ``share`` times its radius; both have the same multipliers."""
        changed = copy.copy(self)
        changed.penalty = self.penalty.with_radius(share)
        return changed

    def condition(self, classes: int) -> Condition | None:
        """Return the condition of the constrained penalty."""
        return self.penalty.condition(classes)

    def certified(
        self, model: nn.Module, inputs: Float[Tensor, "batch *shape"], labels: Int[Tensor, "batch"]
    ) -> Bool[Tensor, "batch"] | None:
        """Return what the constrained penalty certifies."""
        return self.penalty.certified(model, inputs, labels)

    @property
    def stateful(self) -> bool:
        """Return ``True``: the multipliers change."""
        return True

    def step(self, reduce: Reduce = lambda tensor: tensor) -> None:
        """Let the multipliers climb by the violations of the batches that were penalised since the last step."""
        state = self._state
        if not state.batches:  # in all processes: they penalise the same steps
            return
        assert state.multipliers is not None
        for sums, counts in reduce(torch.stack(state.batches)):
            violations, shares = self._violations(sums, counts), counts / counts.sum()
            state.multipliers = (state.multipliers + self.rate * shares * violations).clamp_min(0)
        self.discard()

    def _violations(self, sums: Tensor, counts: Tensor) -> Tensor:
        return sums / counts.clamp_min(1) - self.tolerance

    def discard(self) -> None:
        """Forget the batches since the last step."""
        self._state.batches.clear()

    @property
    def multipliers(self) -> Float[Tensor, "classes"] | None:
        """The classes' ``λ``; ``None`` before the first batch."""
        return self._state.multipliers

    @property
    def multiplier(self) -> float | None:
        """The mean of the multipliers; ``None`` before the first batch."""
        return None if self.multipliers is None else self.multipliers.mean().item()

    def state_dict(self) -> dict[str, Any]:
        """Return the multipliers."""
        return {"multipliers": self.multipliers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the multipliers."""
        self._state.multipliers = state_dict["multipliers"]

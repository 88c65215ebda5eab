"""A penalty as a constraint: multipliers that learn its weight, in place of a fixed one."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from jacobian_robust.options import STRICT
from jacobian_robust.penalties.base import Penalty, needs_input_graph, takes_model

__all__ = ["Lagrangian"]


@dataclass(eq=False, config=STRICT | {"arbitrary_types_allowed": True}, kw_only=True)
class Lagrangian:
    """Asks that the mean of a penalty over each class be at most ``τ``, by the augmented Lagrangian.

    A class with the violation ``g = mean(α) - τ`` costs ``(max(0, λ + ρg)² - λ²)/(2ρ)`` (Rockafellar, 1973; Bertsekas,
    "Constrained optimization and Lagrange multiplier methods", 1982), and after each step of training its multiplier
    climbs, ``λ ← max(0, λ + rate·share·g)``, where ``share`` is the class's of the batch (stochastic primal-dual
    training as in Chamon & Ribeiro, "Probably approximately correct constrained learning", 2020). The mean over the
    batch of what is returned is the sum over the classes by these shares. A constraint that holds loses its weight, and
    one that is violated gains it without end: with ``eta=constant eta.value=0.5`` the loss is half the Lagrangian.

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
        self._multipliers: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []

    @property
    def input_graph(self) -> bool:
        """Whether the penalty differentiates the logits with respect to the inputs."""
        return needs_input_graph(self.penalty)

    def __call__(
        self,
        logits: Float[Tensor, "batch classes"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Int[Tensor, "batch"],
        *,
        model: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return for each sample what its class costs, differentiable with respect to the model's parameters."""
        more: dict[str, Any] = {"model": model} if takes_model(self.penalty) else {}
        alpha = self.penalty(logits, inputs, labels, generator=generator, create_graph=create_graph, **more)
        classes = logits.shape[-1]
        if self._multipliers is None:
            self._multipliers = torch.zeros(classes)
        multipliers = self._multipliers = self._multipliers.to(alpha)
        counts = alpha.new_zeros(classes).index_add(0, labels, torch.ones_like(alpha))
        violations = alpha.new_zeros(classes).index_add(0, labels, alpha) / counts.clamp_min(1) - self.tolerance
        if create_graph:
            self._seen.append((violations.detach(), counts / len(labels)))
        wanted = (multipliers + self.damping * violations).clamp_min(0)
        return ((wanted.square() - multipliers.square()) / (2 * self.damping))[labels]

    def learn(self) -> None:
        """Let the multipliers climb by the violations of the batches that were penalised since they last did."""
        for violations, shares in self._seen:
            assert self._multipliers is not None
            self._multipliers = (self._multipliers + self.rate * shares * violations).clamp_min(0)
        self.forget()

    def forget(self) -> None:
        """Leave the multipliers as they are: the step of these batches is not taken."""
        self._seen.clear()

    @property
    def multipliers(self) -> Float[Tensor, "classes"] | None:
        """The classes' ``λ``; ``None`` before the first batch."""
        return self._multipliers

    def state_dict(self) -> dict[str, Any]:
        """Return the multipliers."""
        return {"multipliers": self._multipliers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._multipliers = state_dict["multipliers"]

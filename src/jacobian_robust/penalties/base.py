"""The protocol of all penalties.

A penalty is called with the logits of a batch, the inputs they came from and their labels, and returns one value for
each sample. A new penalty is a subclass of :class:`Penalty` with a ``__call__``, and one YAML file in
``conf/regularizer``. Equation numbers are those of the research note "Adversarial robustness with an upper-bound on the
norm of the Jacobian matrix".
"""

import abc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import Categorical, Family
from jacobian_robust.options import Magnitude

__all__ = ["Bound", "Condition", "Magnitude", "Model", "Penalty", "Reduce", "vector_jacobian_product"]

Bound = Literal["center", "boundary"]

Model = Callable[[Tensor], Tensor]
"""Maps inputs to logits."""

Reduce = Callable[[Tensor], Tensor]
"""Returns the sum of a tensor over all processes."""


class Condition(NamedTuple):
    """Eq. 14, ``‖J_μ‖₂ ≤ d/ε``.

    Attributes:
        eps: the Euclidean radius ``ε``, in units of the inputs.
        bound: the Fisher–Rao distance ``d``: to the ``center`` of the simplex or to the decision ``boundary``.
    """

    eps: float
    bound: Bound


class Penalty(abc.ABC):
    """A penalty ``α`` of each sample, which the loss adds to the cross-entropy.

    Only ``__call__`` has to be written. The other methods have defaults, which suit a penalty that differentiates the
    logits with respect to the inputs and keeps no state.
    """

    @abc.abstractmethod
    def __call__(
        self,
        logits: Float[Tensor, "batch *outputs"],
        inputs: Float[Tensor, "batch *shape"],
        labels: Shaped[Tensor, "batch *_"],
        *,
        model: Model | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
    ) -> Float[Tensor, "batch"]:
        """Return the penalty of each sample, differentiable with respect to the model's parameters.

        Args:
            logits: the model's outputs before the softmax, with a graph to ``inputs`` if ``needs_graph``; or the
                parameters of the penalty's family.
            inputs: what the model was given, with ``requires_grad`` set before the forward pass if ``needs_graph``.
            labels: the true classes; or the targets of the family.
            model: maps other inputs to logits; given if ``needs_model``.
            generator: source of the penalty's random numbers; torch's global one by default.
            create_graph: make the penalty differentiable; without it, only its value is computed.
        """

    @property
    def needs_graph(self) -> bool:
        """Whether the penalty differentiates the logits with respect to the inputs."""
        return True

    @property
    def needs_model(self) -> bool:
        """Whether the penalty evaluates the model at other points than the inputs."""
        return False

    @property
    def takes_probabilities(self) -> bool:
        """Whether the model's outputs are probabilities instead of logits."""
        return False

    def with_radius(self, share: float) -> "Penalty":
        """Return the penalty with ``share`` times its radius ``ε``; its state, if it has any, is the same object.

        Raises:
            UserError: if the penalty has no radius.
        """
        radius = getattr(self, "eps", None)
        if radius is None:
            raise UserError(f"eps_schedule: {type(self).__name__} has no radius ε; give eps_schedule=none")
        changed: Penalty = replace(self, eps=radius * share)  # type: ignore[type-var]
        return changed

    def with_family(self, family: Family) -> "Penalty":
        """Return the penalty for outputs that are parameters of a family.

        Raises:
            UserError: if the penalty is of class logits alone.
        """
        if isinstance(family, Categorical):
            return self
        if not hasattr(self, "family"):
            raise UserError(
                f"regularizer: {type(self).__name__} is for classification alone; choose frobenius, spectral, margin "
                "or linear_margin"
            )
        changed: Penalty = replace(self, family=family)  # type: ignore[type-var]
        return changed

    def condition(self, classes: int) -> Condition | None:
        """Return the ``ε`` and the bound of eq. 14 that the penalty enforces; ``None`` if it enforces none.

        Args:
            classes: the number of classes.
        """
        return None

    def certified(
        self, model: nn.Module, inputs: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Bool[Tensor, "batch"] | None:
        """Return whether the bound that the penalty trains is proof of the class of each sample's whole ball.

        ``None`` if the penalty bounds nothing over a ball.
        """
        return None

    @property
    def stateful(self) -> bool:
        """Whether the penalty changes from step to step, so that it has to be saved and told of each step."""
        return False

    def step(self, reduce: Reduce = lambda tensor: tensor) -> None:  # noqa: B027 (most have no state)
        """Update the state after the batches of an optimizer step.

        Args:
            reduce: returns the sum of a tensor over all processes, each of which calls ``step``; one process alone
                leaves the default, which returns the tensor.
        """

    def discard(self) -> None:  # noqa: B027 (most have no state)
        """Leave the state as it is: the optimizer step of these batches is skipped."""

    @property
    def multiplier(self) -> float | None:
        """The mean weight that the penalty has learned, for the record of an epoch; ``None`` if it learns none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Restore the state."""


def vector_jacobian_product(
    logits: Float[Tensor, "batch *outputs"],
    inputs: Float[Tensor, "batch *shape"],
    direction: Float[Tensor, "batch *outputs"],
    *,
    create_graph: bool,
) -> Float[Tensor, "batch n"]:
    """Return ``vᵀ J_s`` of each sample, flat, in float32 or better; ``J_s`` is the Jacobian of the logits."""
    (row,) = torch.autograd.grad(logits, inputs, direction, create_graph=create_graph, retain_graph=True)
    return row.flatten(1).to(torch.promote_types(row.dtype, torch.float32))

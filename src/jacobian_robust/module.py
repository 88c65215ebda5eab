"""The LightningModule: a classifier trained with cross-entropy and a penalty on its Jacobian."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobian_robust.regularizers import Penalty

__all__ = ["LossTerms", "RobustClassifier"]

Stage = Literal["train", "validation"]
Batch = tuple[Float[Tensor, "batch *shape"], Int[Tensor, "batch"]]


class LossTerms(NamedTuple):
    """The loss of one batch and what it is made of, each a mean over the batch."""

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


def _means(sums: Float[Tensor, "terms_and_count"]) -> dict[str, float]:
    return dict(zip(LossTerms._fields, (sums[:-1] / sums[-1]).tolist(), strict=True))


class RobustClassifier(pl.LightningModule):
    """A classifier that minimises ``(1 - η)·CE + η·mean(α)`` (the note's eq. 16).

    Args:
        model: maps inputs ``(batch, …)`` to logits ``(batch, classes)``.
        optimizer: makes the optimizer from the parameters.
        penalty: returns ``α`` of each sample from logits and inputs; ``None`` trains with cross-entropy alone.
        seed: seed of the penalty's random probes.
        config: plain containers, stored in every checkpoint so that it can be evaluated alone.

    Attributes:
        eta: the weight ``η`` of the penalty, in [0, 1]; a callback of :mod:`jacobian_robust.callbacks` sets it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        penalty: Penalty | None = None,
        *,
        seed: int = 0,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.penalty = penalty
        self.eta = 0.0
        self._optimizer = optimizer
        self._config = config or {}
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[Stage, Tensor] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the name of the running hook, which Lightning sets 40 times a step, at a dict's price."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.model(inputs)
        return logits

    def loss_terms(
        self, batch: Batch, *, generator: torch.Generator | None = None, create_graph: bool = True
    ) -> LossTerms:
        """Return the loss of a batch (eq. 16) and its parts.

        Args:
            batch: inputs and labels.
            generator: source of the penalty's random probes.
            create_graph: make the penalty differentiable; without it, only its value is computed.
        """
        inputs, labels = batch
        if self.penalty is None:
            logits = self(inputs)
            cross_entropy = loss = nn.functional.cross_entropy(logits, labels)
            penalty = torch.zeros_like(loss)
        else:
            with torch.enable_grad():
                inputs = inputs.detach().requires_grad_()
                logits = self(inputs)
                cross_entropy = nn.functional.cross_entropy(logits, labels)
                penalty = self.penalty(logits, inputs, generator=generator, create_graph=create_graph).mean()
                loss = (1 - self.eta) * cross_entropy + self.eta * penalty
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return LossTerms(loss, cross_entropy, penalty, accuracy)

    def _add(self, stage: Stage, terms: LossTerms, samples: int) -> None:
        # Not self.log: a millisecond a step, where a whole step of a small network takes fifteen.
        sums = torch.stack([*(term.detach() for term in terms), torch.ones_like(terms.loss)]) * samples
        self._sums[stage] = self._sums[stage] + sums if stage in self._sums else sums

    def means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch so far; empty at its start."""
        return _means(self._sums[stage]) if stage in self._sums else {}

    def pop_means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch, and begin anew; empty if there was none."""
        return _means(self._sums.pop(stage)) if stage in self._sums else {}

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Return the loss of a batch."""
        terms = self.loss_terms(batch, generator=self._generator)
        self._add("train", terms, len(batch[1]))
        return terms.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss of a batch, with probes of its own: validation leaves training as it would have been."""
        generator = torch.Generator().manual_seed(batch_idx)
        self._add("validation", self.loss_terms(batch, generator=generator, create_graph=False), len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the model's parameters."""
        return self._optimizer(self.model.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the configuration, and the state of the probes' generator, so that a resumed run draws on."""
        checkpoint["jacobian_robust"] = {"config": self._config, "generator": self._generator.get_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the generator of the probes."""
        self._generator.set_state(checkpoint["jacobian_robust"]["generator"].cpu())

"""The LightningModule: a classifier trained with cross-entropy and a penalty on its Jacobian."""

import contextlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor, nn

from jacobian_robust.double_backward import FastDoubleBackward
from jacobian_robust.errors import UserError
from jacobian_robust.regularizers import Amortization, Penalty

__all__ = ["LossTerms", "RobustClassifier"]

SKIPPED_IN_A_ROW = 3
"""So many steps without a finite loss and gradient end a training."""

Stage = Literal["train", "validation"]
Batch = tuple[Float[Tensor, "batch *shape"], Int[Tensor, "batch"]]


class LossTerms(NamedTuple):
    """The loss of one batch and what it is made of, each a mean over the batch; and the logits behind them."""

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    penalty: Float[Tensor, ""] | None
    logits: Float[Tensor, "batch classes"]


class _RunningMeans:
    """Means over the samples of an epoch, computed for many batches at once.

    A step pays for a list's append instead of a dozen small kernels, and a GPU is not waited for. Lightning's self.log
    costs a millisecond a step, where a whole step of a small network takes fifteen.
    """

    def __init__(self) -> None:
        self._new: list[tuple[LossTerms, Tensor]] = []
        self._sums: dict[str, float] = {}
        self._samples: dict[str, int] = {}

    def add(self, terms: LossTerms, labels: Int[Tensor, "batch"]) -> None:
        penalty = None if terms.penalty is None else terms.penalty.detach()
        kept = LossTerms(terms.loss.detach(), terms.cross_entropy.detach(), penalty, terms.logits.detach())
        self._new.append((kept, labels))
        if len(self._new) == 64:  # keeps few logits
            self._sum_up()

    def state_dict(self) -> dict[str, Any]:
        """Return what was added so far, not summed up if it is not yet: a sum's order shows in its last digit."""
        new = [[*terms, labels] for terms, labels in self._new]
        return {"sums": dict(self._sums), "samples": dict(self._samples), "new": new}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._samples = dict(state_dict["sums"]), dict(state_dict["samples"])
        self._new = [(LossTerms(*terms), labels) for *terms, labels in state_dict["new"]]

    def value(self) -> dict[str, float]:
        self._sum_up()
        return {name: total / self._samples[name] for name, total in self._sums.items()}

    def _sum_up(self) -> None:
        for name in ("loss", "cross_entropy", "penalty"):
            measured = [(getattr(terms, name), len(labels)) for terms, labels in self._new]
            if values := [value for value, _ in measured if value is not None]:
                samples = [count for value, count in measured if value is not None]
                weights = torch.tensor(samples, dtype=torch.float64)
                self._add(name, (torch.stack(values).cpu().double() @ weights).item(), sum(samples))
        if self._new:
            labels = torch.cat([labels for _, labels in self._new])
            predicted = torch.cat([terms.logits for terms, _ in self._new]).argmax(-1)
            self._add("accuracy", (predicted == labels).sum().item(), len(labels))
        self._new.clear()

    def _add(self, name: str, total: float | int, samples: int) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._samples[name] = self._samples.get(name, 0) + samples


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which mixed precision, if it is on, is off."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else contextlib.nullcontext()


class RobustClassifier(pl.LightningModule):
    """A classifier that minimises ``(1 - η)·CE + η·mean(α)`` (the note's eq. 16).

    Args:
        model: maps inputs ``(batch, …)`` to logits ``(batch, classes)``.
        optimizer: makes the optimizer from the parameters.
        penalty: returns ``α`` of each sample from logits and inputs; ``None`` trains with cross-entropy alone.
        amortization: how seldom the penalty is computed in training.
        seed: seed of the penalty's random probes.
        config: plain containers, stored in every checkpoint so that it can be evaluated alone.

    Attributes:
        eta: the weight ``η`` of the penalty, in [0, 1]; a callback of :mod:`jacobian_robust.callbacks` sets it.
        skipped_steps: how many steps were skipped since their loss or gradient was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        penalty: Penalty | None = None,
        *,
        amortization: Amortization = Amortization(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.penalty = penalty
        self.amortization = amortization
        self.eta = 0.0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._batch: Batch | None = None
        self._spoilt = False
        self._optimizer = optimizer
        self._config = config or {}
        self.wandb: str | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._means: dict[Stage, _RunningMeans] = {"train": _RunningMeans(), "validation": _RunningMeans()}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the name of the running hook, which Lightning sets 40 times a step, at a dict's price."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        """Return the logits, in float32 if the model computes in half precision: losses and norms need the digits."""
        logits: Tensor = self.model(inputs)
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

    def loss_terms(
        self,
        batch: Batch,
        *,
        generator: torch.Generator | None = None,
        create_graph: bool = True,
        weight: int = 1,
        penalised: int | None = None,
    ) -> LossTerms:
        """Return the loss of a batch (eq. 16) and its parts.

        Args:
            batch: inputs and labels.
            generator: source of the penalty's random probes.
            create_graph: make the penalty differentiable; without it, only its value is computed.
            weight: by what ``η·mean(α)`` is multiplied; with 0 the penalty is not computed.
            penalised: how many of the inputs the penalty is computed of, the first ones; all by default.
        """
        inputs, labels = batch
        if self.penalty is None or not weight:
            logits = self(inputs)
            cross_entropy = nn.functional.cross_entropy(logits, labels)
            loss = cross_entropy if self.penalty is None else (1 - self.eta) * cross_entropy
            return LossTerms(loss, cross_entropy, None, logits)
        with torch.enable_grad():
            watched = inputs[:penalised].detach().requires_grad_()
            with FastDoubleBackward():
                watched_logits = self(watched)
            logits = watched_logits
            if len(watched) < len(inputs):
                # Two passes cost what one does, and no derivative is taken with respect to the rest.
                logits = torch.cat([logits, self(inputs[len(watched) :])])
            cross_entropy = nn.functional.cross_entropy(logits, labels)
            with _full_precision(inputs.device):
                penalty = self.penalty(
                    watched_logits, watched, labels[:penalised], generator=generator, create_graph=create_graph
                ).mean()
            loss = (1 - self.eta) * cross_entropy + self.eta * weight * penalty
        return LossTerms(loss, cross_entropy, penalty, logits)

    def means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch so far; empty at its start."""
        return self._means[stage].value()

    def pop_means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch, and begin anew; empty if there was none."""
        means = self._means[stage].value()
        self._means[stage] = _RunningMeans()
        return means

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""] | None:
        """Return the loss of a batch; nothing, which skips the step, if it is not finite.

        Where gradients are accumulated, a step's is the mean over its batches, also of the last, shorter one in an
        epoch, and one batch without a finite loss spoils it.
        """
        terms = self.loss_terms(
            batch,
            generator=self._generator,
            weight=self.amortization.weight(self.global_step),
            # The batch is in random order: its first images are a random part of it.
            penalised=self.amortization.samples(len(batch[1])),
        )
        if not self._spoilt:
            self._batch = batch
        if not terms.loss.isfinite():
            self._spoilt = True
            return None
        self._means["train"].add(terms, batch[1])
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            # Lightning divides by their number, however few are left.
            left = int(self.trainer.num_training_batches) - batch_idx // batches * batches
            return terms.loss * (batches / min(batches, left))
        return terms.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step whose loss or gradient is not finite: without gradients an optimizer does nothing."""
        if self._spoilt:
            self._spoilt = False
            optimizer.zero_grad(set_to_none=True)
            self._skip("loss")
            return
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        # The gradient of a finite cross-entropy is finite: plain training need not pay for the look.
        if self.penalty is None or torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            self._skipped_in_a_row = 0
        else:
            optimizer.zero_grad(set_to_none=True)
            self._skip("gradient")

    def _skip(self, what: str) -> None:
        """Count a step that is skipped.

        Raises:
            UserError: if it is the last of too many in a row; its batch is kept for inspection.
        """
        Console().print(f"step {self.global_step + 1} is skipped: its {what} is not finite", soft_wrap=True)
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < SKIPPED_IN_A_ROW:
            return
        assert self._batch is not None
        inputs, labels = self._batch
        place = Path(self.trainer.default_root_dir) / "nonfinite_batch.pt"
        weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        torch.save({"inputs": inputs.cpu(), "labels": labels.cpu(), "model": weights}, place)
        raise UserError(
            f"training diverged: the {what} of {SKIPPED_IN_A_ROW} steps in a row was not finite; the last batch and "
            f"the weights are in {place}; try a smaller optimizer.lr, eta.max or regularizer.cap"
        )

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Differentiate the loss with respect to the parameters alone: nobody asks for the gradient of the images."""
        if self.penalty is not None:
            kwargs.setdefault("inputs", [parameter for parameter in self.parameters() if parameter.requires_grad])
        loss.backward(**kwargs)

    # Lightning asks for the signature at each step, and here it finds the answer ready.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says; where it says nothing, spare each step Lightning's search for what to do."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss of a batch, with probes of its own: validation leaves training as it would have been."""
        generator = torch.Generator().manual_seed(batch_idx)
        terms = self.loss_terms(batch, generator=generator, create_graph=False)
        self._means["validation"].add(terms, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the model's parameters."""
        return self._optimizer(self.model.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the configuration, the state of the probes' generator and the epoch's means so far."""
        checkpoint["jacobian_robust"] = {
            "config": self._config,
            "generator": self._generator.get_state(),
            "means": self._means["train"].state_dict(),
            "skipped_steps": self.skipped_steps,
            "wandb": self.wandb,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the generator of the probes, and the epoch's means."""
        stored = checkpoint["jacobian_robust"]
        self._generator.set_state(stored["generator"].cpu())
        if "means" in stored:  # checkpoints of older versions end with an epoch
            self._means["train"].load_state_dict(stored["means"])
        self.skipped_steps = stored.get("skipped_steps", 0)

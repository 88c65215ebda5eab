"""The LightningModule: a classifier trained with cross-entropy and a penalty on its Jacobian."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor, nn

from jacobian_robust.adversaries import Adversary, Place
from jacobian_robust.errors import DIVERGED, UserError
from jacobian_robust.penalties import Amortization, Penalty
from jacobian_robust.randomness import SharedGenerator
from jacobian_robust.training.capture import CapturedSteps, NotCaptured
from jacobian_robust.training.distributed import any_process, gathered, summed, this_process

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
        new = [[None if part is None else part.cpu() for part in (*terms, labels)] for terms, labels in self._new]
        return {"sums": dict(self._sums), "samples": dict(self._samples), "new": new}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a state, added to what there is."""
        for name, total in state_dict["sums"].items():
            self._add(name, total, state_dict["samples"][name])
        self._new += [(LossTerms(*terms), labels) for *terms, labels in state_dict["new"]]

    def value(self) -> dict[str, float]:
        self._sum_up()
        return {name: total / self._samples[name] for name, total in self._sums.items()}

    def value_of_all_processes(self) -> dict[str, float]:
        self._sum_up()
        whole = _RunningMeans()
        for sums, samples in gathered((self._sums, self._samples)):
            whole.load_state_dict({"sums": sums, "samples": samples, "new": []})
        return whole.value()

    def _sum_up(self) -> None:
        for name in ("loss", "cross_entropy", "penalty"):
            measured = [(getattr(terms, name), len(labels)) for terms, labels in self._new]
            # A resumed run's are in the CPU's memory.
            if values := [value.to(self._new[-1][1].device) for value, _ in measured if value is not None]:
                samples = [count for value, count in measured if value is not None]
                weights = torch.tensor(samples, dtype=torch.float64)
                self._add(name, (torch.stack(values).cpu().double() @ weights).item(), sum(samples))
        if self._new:
            device = self._new[-1][1].device
            labels = torch.cat([labels.to(device) for _, labels in self._new])
            predicted = torch.cat([terms.logits.to(device) for terms, _ in self._new]).argmax(-1)
            self._add("accuracy", (predicted == labels).sum().item(), len(labels))
        self._new.clear()

    def _add(self, name: str, total: float | int, samples: int) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._samples[name] = self._samples.get(name, 0) + samples


def _generator(seed: int) -> SharedGenerator:
    generator = SharedGenerator()
    generator.manual_seed(seed)
    return generator


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which mixed precision, if it is on, is off."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else contextlib.nullcontext()


class RobustClassifier(pl.LightningModule):
    """A classifier that minimises ``(1 - η)·CE + η·mean(α)`` (the note's eq. 16), at displaced images if so wanted.

    Args:
        model: maps inputs ``(batch, …)`` to logits ``(batch, classes)``.
        optimizer: makes the optimizer from the parameters.
        penalty: returns ``α`` of each sample from logits and inputs; ``None`` trains with cross-entropy alone.
        adversary: displaces the images in training; ``None`` trains on them as they are.
        amortization: how seldom the penalty is computed in training.
        seed: seed of the penalty's random probes.
        cuda_graph: take the steps on a GPU from CUDA graphs (:mod:`jacobian_robust.training.capture`), where
            that can be done; ``"auto"`` says nothing where there is no GPU.
        config: plain containers, stored in every checkpoint so that it can be evaluated alone.

    Attributes:
        eta: the weight ``η`` of the penalty, in [0, 1]; an :class:`EtaSchedule` sets it.
        captured: what takes the steps from graphs; ``None`` where all of them are eager.
        skipped_steps: how many steps were skipped since their loss or gradient was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        penalty: Penalty | None = None,
        *,
        adversary: Adversary | None = None,
        amortization: Amortization = Amortization(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        cuda_graph: bool | Literal["auto"] = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.penalty = penalty
        self.adversary = adversary
        self.amortization = amortization
        self.eta = 0.0
        self.captured: CapturedSteps | None = None
        self._cuda_graph = cuda_graph
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._batch: Batch | None = None
        self._spoilt = False
        self._optimizer = optimizer
        self._config = config or {}
        self.wandb: str | None = None
        self._seed = seed
        self._generator = _generator(seed)
        self._means: dict[Stage, _RunningMeans] = {"train": _RunningMeans(), "validation": _RunningMeans()}

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
        weight: int | float = 1,
        penalised: int | None = None,
        attacked: bool = False,
        eta: Tensor | None = None,
    ) -> LossTerms:
        """Return the loss of a batch (eq. 16) and its parts.

        Args:
            batch: inputs and labels.
            generator: source of the penalty's random probes.
            create_graph: make the penalty differentiable; without it, only its value is computed.
            weight: by what ``η·mean(α)`` is multiplied; with 0 the penalty is not computed.
            penalised: how many of the inputs the penalty is computed of, the first ones; all by default.
            attacked: let the adversary displace the inputs.
            eta: ``η`` as a scalar tensor; the attribute by default.
        """
        share = self.eta if eta is None else eta
        inputs, labels = batch
        adversary = self.adversary if attacked else None
        points: dict[Place, Tensor] = {"clean": inputs}
        if adversary is not None:
            points["adversary"] = adversary.perturb(self.model, inputs, labels)
        known: dict[Place, Tensor] = {}

        def logits_at(place: Place) -> Tensor:
            if place not in known:
                known[place] = self(points[place])
            return known[place]

        def fitted() -> tuple[Tensor, Tensor]:
            if adversary is not None:
                return adversary.fit(logits_at, labels)
            cross_entropy = nn.functional.cross_entropy(logits_at("clean"), labels)
            return cross_entropy, cross_entropy

        fit_at: Place = "clean" if adversary is None else adversary.fit_at
        if self.penalty is None or not weight:
            fit, cross_entropy = fitted()
            loss = fit if self.penalty is None else (1 - share) * fit
            return LossTerms(loss, cross_entropy, None, logits_at(fit_at))
        place: Place = "clean" if adversary is None else adversary.penalty_at
        more: dict[str, Any] = {}
        with torch.enable_grad():
            if self.penalty.needs_graph:
                watched = points[place][:penalised]
                if not watched.requires_grad:
                    watched = watched.detach().requires_grad_()
                watched_logits = self(watched)
                known[place] = watched_logits
                if len(watched) < len(inputs):
                    # Two passes cost what one does, and no derivative is taken with respect to the rest.
                    known[place] = torch.cat([watched_logits, self(points[place][len(watched) :])])
                if self.penalty.needs_model:
                    more["model"] = self
            else:
                watched, watched_logits = points[place][:penalised], logits_at(place)[:penalised]
                if self.penalty.needs_model:
                    more["model"] = self
            fit, cross_entropy = fitted()
            with _full_precision(inputs.device):
                penalty = self.penalty(
                    watched_logits, watched, labels[:penalised], generator=generator, create_graph=create_graph, **more
                ).mean()
            loss = (1 - share) * fit + share * weight * penalty
        return LossTerms(loss, cross_entropy, penalty, logits_at(fit_at))

    def means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch so far, in this process; empty at its start."""
        return self._means[stage].value()

    def pop_means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch, and begin anew; empty if there was none."""
        means = self._means[stage].value_of_all_processes()
        self._means[stage] = _RunningMeans()
        return means

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""] | None:
        """Return the loss of a batch; nothing, which skips the step, if it is not finite.

        The processes have equally many images of a batch, so that the mean of their losses is the batch's. Where
        gradients are accumulated, a step's is the mean over its batches, also of the last, shorter one in an epoch, and
        one batch without a finite loss spoils it.
        """
        if self.adversary is not None:
            batch = self.adversary.next_batch(batch)
        weight = self.amortization.weight(self.global_step)
        # The batch is in random order: its first images are a random part of it.
        penalised = self.amortization.samples(len(batch[1]))
        terms = self._captured_terms(batch, weight, penalised) or self.loss_terms(
            batch, generator=self._generator, weight=weight, penalised=penalised, attacked=True
        )
        if not self._spoilt:
            self._batch = batch
        if any(any_process(not terms.loss.isfinite(), device=terms.loss.device)):
            self._spoilt = True
            # Several processes have to meet in the backward pass; what comes of it is thrown away.
            return None if self.trainer.world_size == 1 else terms.loss
        self._means["train"].add(terms, batch[1])
        loss = terms.loss
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            # Lightning divides by their number, however few are left.
            left = int(self.trainer.num_training_batches) - batch_idx // batches * batches
            return loss * (batches / min(batches, left))
        return loss

    def on_fit_start(self) -> None:
        """Give each process probes of its own, and take the steps from CUDA graphs if that can be done."""
        if rank := self.trainer.global_rank:
            # A resumed run's differ from those of its first part: it is the same in distribution, not bit for bit.
            self._generator.manual_seed(self._seed + rank + 1_000_003 * self.trainer.global_step)
        if not self._cuda_graph or (self._cuda_graph == "auto" and self.device.type != "cuda"):
            return
        obstacles = {
            "there is no GPU": self.device.type != "cuda",
            "several processes meet in a step": self.trainer.world_size > 1,
            "the adversary differentiates, too": self.adversary is not None,
            "the penalty changes from step to step": self.penalty is not None and self.penalty.stateful,
            "the model changes more than its weights": any(True for _ in self.model.buffers()),
            "precision is mixed": self.trainer.precision not in ("32-true", "64-true"),
        }
        if obstacle := next((text for text, stands in obstacles.items() if stands), None):
            self._stay_eager(obstacle)
        else:
            Console().print("cuda_graph: the steps are taken from CUDA graphs")
            self.captured = CapturedSteps([p for p in self.parameters() if p.requires_grad], self._generator)

    def _stay_eager(self, reason: str) -> None:
        self.captured = None
        if this_process() == 0:
            Console().print(f"cuda_graph: the steps are taken one kernel at a time: {reason}", soft_wrap=True)

    def _captured_terms(self, batch: Batch, weight: int, penalised: int) -> LossTerms | None:
        """Return the terms of a batch's loss from a graph; nothing if they have to be computed eagerly."""
        if self.captured is None:
            return None

        def compute(inputs: Tensor, labels: Tensor, eta: Tensor) -> list[Tensor]:
            terms = self.loss_terms(
                (inputs, labels), generator=self._generator, weight=weight, penalised=penalised, eta=eta
            )
            parts = [terms.loss, terms.cross_entropy, terms.logits]
            return parts if terms.penalty is None else [*parts, terms.penalty]

        try:
            outputs = self.captured(compute, *batch, self.eta, (weight, penalised, self.penalty))
        except NotCaptured as error:
            self._stay_eager(str(error))
            return None
        if outputs is None:
            return None
        loss, cross_entropy, logits, *penalty = outputs
        return LossTerms(loss, cross_entropy, penalty[0] if penalty else None, logits)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step whose loss or gradient is not finite: without gradients an optimizer does nothing."""
        if self._spoilt:
            self._spoilt = False
            optimizer.zero_grad(set_to_none=True)
            self._skip("loss")
            return
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        # The gradient of a finite cross-entropy is finite: plain training need not pay for the look. On several devices
        # the gradient is their mean already: all of them find the same.
        if self.penalty is None or torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            self._skipped_in_a_row = 0
            if self.penalty is not None:
                self.penalty.step(summed)
        else:
            optimizer.zero_grad(set_to_none=True)
            self._skip("gradient")

    def _skip(self, what: str) -> None:
        """Count a step that is skipped.

        Raises:
            UserError: if it is the last of too many in a row; its batch is kept for inspection.
        """
        if this_process() == 0:
            Console().print(f"step {self.global_step + 1} is skipped: its {what} is not finite", soft_wrap=True)
        if self.penalty is not None:
            self.penalty.discard()
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < SKIPPED_IN_A_ROW:
            return
        assert self._batch is not None
        inputs, labels = map(torch.cat, zip(*gathered([part.cpu() for part in self._batch]), strict=True))
        place = Path(self.trainer.default_root_dir) / "nonfinite_batch.pt"
        weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        if this_process() == 0:
            torch.save({"inputs": inputs, "labels": labels, "model": weights}, place)
        raise UserError(
            f"{DIVERGED}: the {what} of {SKIPPED_IN_A_ROW} steps in a row was not finite; the last batch and "
            f"the weights are in {place}; try a smaller optimizer.lr, eta.max or regularizer.cap"
        )

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Differentiate the loss with respect to the parameters, and to what the adversary asks for, alone."""
        leaves = self.adversary.leaves if self.adversary is not None else []
        if self.penalty is not None:
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            kwargs.setdefault("inputs", parameters + leaves)
        loss.backward(**kwargs)
        if self.adversary is not None:
            self.adversary.learn()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss of a batch, with probes of its own: validation leaves training as it would have been.

        The images are the clean ones, whatever the adversary, so that runs can be compared.
        """
        terms = self.loss_terms(batch, generator=_generator(batch_idx + this_process()), create_graph=False)
        self._means["validation"].add(terms, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the model's parameters."""
        return self._optimizer(self.model.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the configuration, the state of the probes' generator and the epoch's means so far."""
        checkpoint["jacobian_robust"] = {
            "config": self._config,
            "generator": self._generator.get_state(),
            "means": gathered(self._means["train"].state_dict()),
            "skipped_steps": self.skipped_steps,
            "wandb": self.wandb,
            "adversary": self._adversary_states(),
            "penalty": self.penalty.state_dict() if self.penalty is not None else {},
        }

    def _adversary_states(self) -> list[dict[str, Any]]:
        return [] if self.adversary is None else gathered(self.adversary.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the generator of the probes, and the epoch's means."""
        stored = checkpoint["jacobian_robust"]
        # With precision=64-true the weights are loaded before the network is converted: they would be rounded.
        weights = [weight for weight in checkpoint["state_dict"].values() if weight.is_floating_point()]
        if weights and all(weight.dtype == torch.float64 for weight in weights):
            self.double()
        self._generator.set_state(stored["generator"].cpu())
        if "means" in stored:  # checkpoints of older versions end with an epoch
            means = stored["means"] if isinstance(stored["means"], list) else [stored["means"]]
            for state in means[self.trainer.global_rank :: self.trainer.world_size]:
                self._means["train"].load_state_dict(state)
        self.skipped_steps = stored.get("skipped_steps", 0)
        states = stored.get("adversary") or []
        states = states if isinstance(states, list) else [states]  # older ones hold one process's
        if self.adversary is not None and self.trainer.global_rank < len(states):
            self.adversary.load_state_dict(states[self.trainer.global_rank])
        if self.penalty is not None and stored.get("penalty"):
            self.penalty.load_state_dict(stored["penalty"])

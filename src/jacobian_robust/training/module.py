"""The LightningModule: a classifier trained with cross-entropy and a penalty on its Jacobian."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from jacobian_robust.adversaries import Adversary
from jacobian_robust.geometry.families import CATEGORICAL, Family
from jacobian_robust.penalties import Amortization, Penalty
from jacobian_robust.randomness import SharedGenerator
from jacobian_robust.robustness.metrics import TaskMetrics
from jacobian_robust.training.capture import CapturedSteps, NotCaptured
from jacobian_robust.training.distributed import gathered, summed, this_process
from jacobian_robust.training.losses import Batch, LossTerms, loss_terms
from jacobian_robust.training.means import RunningMeans
from jacobian_robust.training.nonfinite import NonFiniteSteps

__all__ = ["RobustClassifier"]

Stage = Literal["train", "validation"]


def _generator(seed: int) -> SharedGenerator:
    generator = SharedGenerator()
    generator.manual_seed(seed)
    return generator


class RobustClassifier(pl.LightningModule):
    """A classifier that minimises ``(1 - η)·CE + η·mean(α)`` (the note's eq. 16), at displaced images if so wanted.

    Args:
        model: maps inputs ``(batch, …)`` to logits ``(batch, classes)``.
        optimizer: makes the optimizer from the parameters.
        penalty: returns ``α`` of each sample from logits and inputs; ``None`` trains with cross-entropy alone.
        adversary: displaces the images in training; ``None`` trains on them as they are.
        family: of the distribution that the model's outputs describe; its negative log-likelihood takes the place of
            the cross-entropy, and its targets that of the labels. The penalty and the adversary are of the same.
        amortization: how seldom the penalty is computed in training.
        seed: seed of the penalty's random probes.
        cuda_graph: take the steps on a GPU from CUDA graphs (:mod:`jacobian_robust.training.capture`), where
            that can be done; ``"auto"`` says nothing where there is no GPU.
        config: plain containers, stored in every checkpoint so that it can be evaluated alone.

    Attributes:
        eta: the weight ``η`` of the penalty, in [0, 1]; a callback sets it, by its schedule.
        captured: what takes the steps from graphs; ``None`` where all of them are eager.
        nonfinite: counts the steps that were skipped since their loss or gradient was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        penalty: Penalty | None = None,
        *,
        adversary: Adversary | None = None,
        family: Family = CATEGORICAL,
        amortization: Amortization = Amortization(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        cuda_graph: bool | Literal["auto"] = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.penalty = penalty
        self.adversary = adversary
        self.family = family
        self.amortization = amortization
        self.eta = 0.0
        self.captured: CapturedSteps | None = None
        self._cuda_graph = cuda_graph
        self.nonfinite = NonFiniteSteps()
        self.make_optimizer = optimizer
        self._config = config or {}
        self.wandb: str | None = None
        self._seed = seed
        self._generator = _generator(seed)
        self._metrics = TaskMetrics(family)
        self._means: dict[Stage, RunningMeans] = {"train": RunningMeans(family), "validation": RunningMeans(family)}

    def forward(self, inputs: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *outputs"]:
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
            create_graph: make the penalty differentiable.
            weight: by what ``η·mean(α)`` is multiplied.
            penalised: how many of the inputs, the first ones, the penalty is computed of.
            attacked: let the adversary displace the inputs.
            eta: ``η`` as a scalar tensor; the attribute by default.
        """
        return loss_terms(
            self,
            batch,
            eta=self.eta if eta is None else eta,
            penalty=self.penalty,
            adversary=self.adversary if attacked else None,
            family=self.family,
            generator=generator,
            create_graph=create_graph,
            weight=weight,
            penalised=penalised,
        )

    def training_terms(self, batch: Batch, step: int) -> LossTerms:
        """Return the terms of a step's loss, with the penalty as seldom as the amortization says."""
        weight = self.amortization.weight(step)
        # The batch is in random order: its first images are a random part of it.
        penalised = self.amortization.samples(len(batch[1]))
        return self._captured_terms(batch, weight, penalised) or self.loss_terms(
            batch, generator=self._generator, weight=weight, penalised=penalised, attacked=True
        )

    def means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch so far, in this process; empty at its start."""
        return self._means[stage].value()

    def pop_means(self, stage: Stage) -> dict[str, float]:
        """Return the means of the loss terms over the epoch, and begin anew; empty if there was none.

        In validation with the metrics of the task.
        """
        means = self._means[stage].value_of_all_processes()
        if stage == "validation":
            means |= self._metrics.value()
            self._metrics = TaskMetrics(self.family)
        self._means[stage] = RunningMeans(self.family)
        return means

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""] | None:
        """Return the loss of a batch; nothing, which skips the step, if it is not finite.

        The processes have equally many images of a batch, so that the mean of their losses is the batch's. Where
        gradients are accumulated, a step's is the mean over its batches, also of the last, shorter one in an epoch, and
        one batch without a finite loss spoils it.
        """
        if self.adversary is not None:
            batch = self.adversary.next_batch(batch)
        terms = self.training_terms(batch, self.global_step)
        if self.nonfinite.spoils(batch, terms):
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
        if self.nonfinite.spoilt:
            self._skip("loss", optimizer)
            return
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        # The gradient of a finite cross-entropy is finite: plain training need not pay for the look. On several devices
        # the gradient is their mean already: all of them find the same.
        if self.penalty is not None and not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            if self.nonfinite.of_the_scale(getattr(self.trainer.precision_plugin, "scaler", None)):
                self.penalty.discard()  # the scaler leaves the step out, and begins the next with half the scale
            else:
                self._skip("gradient", optimizer)
            return
        self.nonfinite.taken()
        if self.penalty is not None:
            self.penalty.step(summed)

    def _skip(self, what: str, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        if self.penalty is not None:
            self.penalty.discard()
        directory = Path(self.trainer.default_root_dir)
        self.nonfinite.skip(what, step=self.global_step + 1, model=self.model, directory=directory)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Differentiate the loss with respect to the parameters, and to what the adversary asks for, alone."""
        leaves = self.adversary.leaves if self.adversary is not None else []
        if self.penalty is not None:
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            kwargs.setdefault("inputs", parameters + leaves)
        loss.backward(**kwargs)
        if self.adversary is not None:
            self.adversary.learn()

    def on_validation_epoch_start(self) -> None:
        """Begin anew: of several validations in an epoch the last one counts, which saw the weights that are kept."""
        self._means["validation"] = RunningMeans(self.family)
        self._metrics = TaskMetrics(self.family)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss of a batch, with probes of its own: validation leaves training as it would have been.

        The images are the clean ones, whatever the adversary, so that runs can be compared.
        """
        terms = self.loss_terms(batch, generator=_generator(batch_idx + this_process()), create_graph=False)
        self._means["validation"].add(terms, batch[1])
        self._metrics.update(terms.logits.detach(), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the model's parameters."""
        return self.make_optimizer(self.model.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the configuration, the state of the probes' generator and the epoch's means so far."""
        checkpoint["jacobian_robust"] = {
            "config": self._config,
            "generator": self._generator.get_state(),
            "means": gathered(self._means["train"].state_dict()),
            "skipped_steps": self.nonfinite.skipped,
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
        self.nonfinite.skipped = stored.get("skipped_steps", 0)
        states = stored.get("adversary") or []
        states = states if isinstance(states, list) else [states]  # older ones hold one process's
        if self.adversary is not None and self.trainer.global_rank < len(states):
            self.adversary.load_state_dict(states[self.trainer.global_rank])
        if self.penalty is not None and stored.get("penalty"):
            self.penalty.load_state_dict(stored["penalty"])

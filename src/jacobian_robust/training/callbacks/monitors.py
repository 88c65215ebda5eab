"""What measures the network at the end of each epoch."""

import abc
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from jacobian_robust.attacks import Attack
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.jacobian import frobenius_norm, jacobian_norms
from jacobian_robust.penalties import Bound, Penalty, satisfies_condition
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.training.averaging import MovingAverage
from jacobian_robust.training.distributed import gathered
from jacobian_robust.training.module import RobustClassifier


class Monitor(pl.Callback, abc.ABC):
    """Measures a network at the end of each epoch, in evaluation mode, on the first images of the two splits.

    Args:
        images: how many images of each split; 0 measures nothing.

    Attributes:
        average: of the weights, measured instead of those of the last step, if there is one.
        latest: what was measured last, by split.
    """

    average: MovingAverage | None = None

    def __init__(self, images: int) -> None:
        self.images = images
        self.latest: dict[str, dict[str, float]] = {}

    @abc.abstractmethod
    def measure(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, process: int = 0, of: int = 1
    ) -> dict[str, float]:
        """Return what is measured on images ``(n, …)`` and their labels ``(n,)``, by its name in ``METRICS``.

        Of several processes that call this each can measure a part; what they return is the same, and what one would.
        """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure both splits."""
        assert isinstance(pl_module, RobustClassifier)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        training = pl_module.training
        pl_module.eval()
        model = pl_module.model if self.average is None else self.average.model
        splits = {"train": "train", "validation": datamodule.validation_name}
        for stage, split in splits.items():
            images, labels = datamodule.split(split).first(self.images)
            if len(images):
                images, labels = images.to(pl_module.device), labels.to(pl_module.device)
                self.latest[stage] = self.measure(
                    model, images, labels, process=trainer.global_rank, of=trainer.world_size
                )
        pl_module.train(training)


class JacobianMonitor(Monitor):
    """Measures the Jacobian, exactly, the same way for every penalty and for none.

    The mean ``‖J_μ‖_F``, and the share of images that satisfy eq. 14, ``‖J_μ‖₂ ≤ d/ε``.

    Args:
        images: how many images of each split; 0 measures nothing.
        eps: the radius ``ε`` of eq. 14.
        bound: the distance ``d`` of eq. 14.
        family: of the distribution that the outputs describe. Where it has more than a hundred directions the norm is
            estimated with probes, and its upper bound by the Frobenius norm stands in eq. 14.
    """

    def __init__(self, images: int, *, eps: float, bound: Bound, family: Family = CATEGORICAL) -> None:
        super().__init__(images)
        self.family = family
        self.eps = eps
        self.bound: Bound = bound

    def state_dict(self) -> dict[str, Any]:
        """Return the condition: without it nobody could say what the rows of the checkpoint were measured with."""
        return {"eps": self.eps, "bound": self.bound}

    def measure(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, process: int = 0, of: int = 1
    ) -> dict[str, float]:
        """Return the mean norm and the share of satisfied conditions."""
        dtype = next((parameter.dtype for parameter in model.parameters()), images.dtype)
        measured: dict[int, tuple[float, int]] = {}
        for number, chunk in list(enumerate(images.split(50)))[process::of]:
            inputs = chunk.to(dtype).requires_grad_()
            with torch.enable_grad():
                logits = model(inputs)
                frobenius, spectral = self._norms(logits, inputs)
            satisfied = satisfies_condition(spectral, logits, bound=self.bound, eps=self.eps, family=self.family)
            measured[number] = frobenius.sum().item(), int(satisfied.sum())
        if of > 1:
            measured = {number: value for part in gathered(measured) for number, value in part.items()}
        in_order = [measured[number] for number in sorted(measured)]
        norm_sum, holds = sum(norm for norm, _ in in_order), sum(count for _, count in in_order)
        return {"jacobian_norm": norm_sum / len(images), "condition_satisfied": holds / len(images)}

    def _norms(self, logits: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Frobenius and the spectral norm; of many directions an estimate of the first, twice."""
        if self.family.rank(logits) <= 100 or isinstance(self.family, Categorical):
            return jacobian_norms(logits, inputs, family=self.family)
        generator = torch.Generator().manual_seed(0)
        norm = frobenius_norm(logits, inputs, family=self.family, probes=8, generator=generator)
        return norm, norm


class CertificateMonitor(Monitor):
    """Counts the images that a penalty's own bound certifies, at its target and not at a radius that is still rising.

    Args:
        images: how many images of each split; 0 measures nothing.
        penalty: says what is certified; nothing is measured if it bounds nothing over a ball.
    """

    def __init__(self, images: int, penalty: Penalty) -> None:
        super().__init__(images)
        self.penalty = penalty

    def measure(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, process: int = 0, of: int = 1
    ) -> dict[str, float]:
        """Return the certified share of the images; each process certifies them all."""
        certified = self.penalty.certified(model, images, labels)
        return {} if certified is None else {"certified_accuracy": certified.double().mean().item()}


class AttackMonitor(Monitor):
    """Attacks at one budget, with the same starts in each epoch; torch's global random stream is left as it was.

    Args:
        images: how many images of each split; 0 measures nothing.
        attack: the attack; its first budget is taken.
    """

    def __init__(self, images: int, attack: Attack) -> None:
        super().__init__(images)
        self.attack = replace(attack, eps=attack.eps[:1], eps_linf=attack.eps_linf and attack.eps_linf[:1])

    def measure(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, process: int = 0, of: int = 1
    ) -> dict[str, float]:
        """Return the share of all images that stand; each process attacks them all."""
        with torch.enable_grad():
            (budget,) = sweep(model, images, labels, [self.attack], examples=0).budgets
        return {"robust_accuracy": budget.robust_accuracy}

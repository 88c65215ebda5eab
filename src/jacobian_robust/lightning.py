"""Callbacks for anybody's LightningModule: a penalty on its Jacobian, and its robust accuracy.

The module's ``forward`` returns logits, and its batches begin with images and labels. Nothing else is asked of it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from jacobian_robust import attacks
from jacobian_robust.errors import UserError
from jacobian_robust.penalties import Penalty

__all__ = ["JacobianPenalty", "RobustnessMonitor"]

Split = Callable[[Any], tuple[Tensor, Tensor]]


def first_two(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and the labels with which a batch begins.

    Raises:
        UserError: if it does not begin with two tensors.
    """
    parts = list(batch[:2]) if isinstance(batch, tuple | list) else []
    if len(parts) < 2 or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            "a batch does not begin with images and labels: pass split=FUNCTION, which returns the two of a batch"
        )
    return parts[0], parts[1]


class JacobianPenalty(pl.Callback):
    """Adds ``weight · mean(α)`` to the loss of a LightningModule whose ``training_step`` is left as it is.

    The penalty is computed on the same batch, by another forward pass, in ``on_before_backward``, and added in place to
    the loss that the hook is given. One backward pass then differentiates both, so that the gradient is that of
    ``loss + weight · mean(α)`` under gradient accumulation, gradient clipping and DDP too: its reducer sees each
    parameter's gradient once. ``on_after_backward`` would come too late for that: the gradients have been averaged over
    the processes then. The loss that Lightning logs and returns is the module's own.

    The pass runs in the module's present mode, in full precision under mixed precision; running statistics of batch
    normalisation are not updated by it.

    Args:
        penalty: ``α``.
        weight: its weight in the loss, at least 0.
        seed: of the penalty's random numbers, which differ from process to process; below 2³¹.
        name: under which the mean of the penalty is logged; of several penalties each has its own.
        split: returns the images and the labels of a batch; by default its first two parts.

    Example:
        >>> penalty = JacobianPenalty(penalties.Margin(eps=0.5, probes=1), weight=1.0)
        >>> pl.Trainer(max_epochs=1, callbacks=[penalty]).fit(module, loader)
    """

    def __init__(
        self,
        penalty: Penalty,
        *,
        weight: float,
        seed: int = 0,
        name: str = "jacobian_penalty",
        split: Split = first_two,
    ) -> None:
        if not 0 <= weight < float("inf"):
            raise UserError(f"weight: give a finite number of at least 0 (got {weight})")
        self.penalty = penalty
        self.weight = weight
        self.seed = seed
        self.name = name
        self.split = split
        self._generator = torch.Generator()
        self._batch: tuple[Tensor, Tensor] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: under manual optimization, whose backward passes may have several losses, and with a strategy
                that shards the parameters, which are not there in a forward pass outside of its own.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise UserError(
                "JacobianPenalty: with manual optimization add penalty(logits, images, labels) to the loss yourself"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            name = type(trainer.strategy).__name__
            raise UserError(f"JacobianPenalty: {name} shards the parameters; give strategy=ddp, or one device")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, and seed the random numbers by its number: a resumed run needs no state to draw the same."""
        self._batch = self.split(batch)
        number = trainer.fit_loop.epoch_loop.total_batch_idx * trainer.world_size + trainer.global_rank
        self._generator.manual_seed(self.seed * 2**32 + number)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the penalty to the loss."""
        assert self._batch is not None
        images, labels = self._batch
        if self.penalty.needs_graph:
            images = images.detach().requires_grad_()
        more: dict[str, Any] = {}
        if self.penalty.needs_model:
            more["model"] = functools.partial(_logits, pl_module)
        with _statistics_kept(pl_module):
            logits = _logits(pl_module, images)
            value = self.penalty(logits, images, labels, generator=self._generator, **more).mean()
        # Lightning has divided the loss by the number of accumulated batches, and scaled it in half precision.
        added = self.weight * value / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss.add_((added if scaler is None else scaler.scale(added)).to(loss.dtype))
        pl_module.log(self.name, value.detach(), batch_size=len(labels))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the penalty's state follow, if it has one."""
        self.penalty.step(lambda tensor: torch.as_tensor(trainer.strategy.reduce(tensor, reduce_op="sum")))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of the batch."""
        self._batch = None

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the penalty."""
        return {"penalty": self.penalty.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a state."""
        self.penalty.load_state_dict(state_dict["penalty"])


class RobustnessMonitor(pl.Callback):
    """Attacks a LightningModule's ``forward`` on validation images after each epoch, and logs ``robust_accuracy``.

    The value is the share of the images that are classified correctly after the attack. ModelCheckpoint and
    EarlyStopping can monitor it. The attack has the same starts in each epoch, and training goes on with the random
    numbers that it would have had.

    Args:
        attack: the attack, an object of :mod:`jacobian_robust.attacks`; by default PGD with 20 steps in the ℓ∞ ball.
        eps: radius of the ball, in units of pixels in [0, 1]. A module that wants others normalises them itself.
        images: how many validation images, the first ones, in all processes together.
        seed: of the attack.
        split: returns the images and the labels of a batch; by default its first two parts.

    Example:
        >>> monitor = RobustnessMonitor(eps=0.1, images=500)
        >>> pl.Trainer(max_epochs=1, callbacks=[monitor]).fit(module, loader, validation_loader)
    """

    def __init__(
        self,
        attack: attacks.Attack | None = None,
        *,
        eps: float,
        images: int = 500,
        seed: int = 0,
        split: Split = first_two,
    ) -> None:
        if images < 1:
            raise UserError(f"images: give a number of at least 1 (got {images})")
        self.attack = attack or attacks.PGD(name="pgd", eps=(eps,), norm="linf", steps=20, step_size=eps / 8)
        self.eps = eps
        self.images = images
        self.seed = seed
        self.split = split
        self._batches: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last epoch's images."""
        self._batches.clear()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch while images are missing."""
        missing = -(-self.images // trainer.world_size) - sum(len(labels) for _, labels in self._batches)
        if missing > 0 and dataloader_idx == 0 and not trainer.sanity_checking:
            images, labels = self.split(batch)
            self._batches.append((images[:missing], labels[:missing]))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attack the images and log the share that is classified correctly."""
        if not self._batches:
            return
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        correct = torch.zeros((), device=pl_module.device)
        with torch.random.fork_rng(devices), torch.inference_mode(False):
            torch.manual_seed(self.seed)
            model = _Forward(pl_module)
            for images, labels in self._batches:
                adversarial = self.attack.perturb(model, images.clone(), labels.clone(), self.eps)
                with torch.no_grad():
                    correct += (_logits(pl_module, adversarial).argmax(-1) == labels).sum()
        attacked = sum(len(labels) for _, labels in self._batches)
        self._batches.clear()
        pl_module.log(
            "robust_accuracy", correct / attacked, batch_size=attacked, sync_dist=trainer.world_size > 1, prog_bar=True
        )


class _Forward(nn.Module):
    """A LightningModule as an attack sees it: a network, without the Trainer."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return _logits(self.module, images)


def _logits(module: pl.LightningModule, images: Tensor) -> Tensor:
    """Return what ``forward`` returns, in float32 or better.

    Raises:
        UserError: if these are no logits.
    """
    logits = module(images)
    if not (isinstance(logits, Tensor) and logits.ndim == 2 and logits.is_floating_point()):
        name = type(module).__name__
        raise UserError(f"{name}.forward: it has to return logits (batch, classes), a tensor of floating-point numbers")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch normalisation use its batch, or its statistics in evaluation mode, without an update of them."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True

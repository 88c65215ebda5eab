"""Adversaries that displace the training images: baselines alone, and together with any penalty.

The loss is ``(1 - η)·CE(x') + η·mean(α)``, where ``x'`` are the displaced images and the penalty ``α`` is taken at the
clean ones or at them. Pixels, budgets ``eps`` and step sizes are in units of [0, 1]. An adversary draws from torch's
global stream, which a resumed run restores; several processes seed it differently, and each displaces its own images. A
new adversary is a subclass of :class:`Adversary` with a ``perturb``, and one YAML file in ``conf/adversary``.
"""

import abc
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from jacobian_robust import attacks
from jacobian_robust.attacks.base import attackable
from jacobian_robust.errors import UserError
from jacobian_robust.geometry.families import CATEGORICAL, Categorical, Family
from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.options import STRICT, Count, Size

__all__ = ["FGSM", "PGD", "TRADES", "Adversary", "Free", "Noise", "Place", "Steepest"]

Place = Literal["clean", "adversary"]
"""Where a part of the loss is taken: at the images or at the displaced ones."""

Batch = tuple[Float[Tensor, "_ ..."], Shaped[Tensor, "_ ..."]]
LogitsAt = Callable[[Place], Float[Tensor, "batch *outputs"]]


@dataclass(eq=False, config=STRICT, kw_only=True)
class Adversary(abc.ABC):
    """Displaces the images of each training step.

    Args:
        eps: radius of the ball around each image.
        fit_at: where the cross-entropy is taken.
        penalty_at: where the penalty is taken, if there is one.
        family: of the distribution that the model's outputs describe.
    """

    eps: float = Field(gt=0, le=1e6)
    fit_at: Place = "adversary"
    penalty_at: Place = "clean"
    family: Family = CATEGORICAL

    @abc.abstractmethod
    def perturb(
        self, model: nn.Module, images: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Float[Tensor, "batch *shape"]:
        """Return the displaced images, in [0, 1].

        Args:
            model: returns logits; its mode and its parameters are left as they were.
            images: pixels in [0, 1].
            labels: the true classes.

        Raises:
            UserError: if a pixel is outside [0, 1].
        """

    def fit(
        self, logits_at: LogitsAt, labels: Shaped[Tensor, "batch *_"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return what stands in the place of the cross-entropy in the loss, and the cross-entropy, means of the batch.

        Args:
            logits_at: returns the model's logits at either place.
            labels: the true classes.
        """
        cross_entropy = self.family.loss(logits_at(self.fit_at), labels)
        return cross_entropy, cross_entropy

    def with_family(self, family: Family) -> "Adversary":
        """Return the adversary of a model whose outputs are parameters of a family.

        Raises:
            UserError: if the adversary is of class logits alone.
        """
        try:
            return replace(self, family=family)
        except ValueError as error:
            raise UserError(
                f"adversary: {type(self).__name__} is for classification alone; choose pgd, fgsm, free or noise"
            ) from error

    def idle(self, *, penalised: bool) -> bool:
        """Return whether no part of a loss with, or without, a penalty is taken at the displaced images."""
        return self.fit_at == "clean" and not (penalised and self.penalty_at == "adversary")

    def next_batch(self, batch: Batch) -> Batch:
        """Return the batch to train on in place of the one that is due."""
        return batch

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradient the adversary wants from the step's own backward pass."""
        return []

    def learn(self) -> None:  # noqa: B027 (most learn nothing)
        """Use these gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Restore it."""


@dataclass(eq=False, config=STRICT, kw_only=True)
class Noise(Adversary):
    """Random displacements, which know nothing of the model.

    Args:
        norm: ``linf``, uniform in the ball; or ``gaussian``, of standard deviation ``eps`` in each pixel, in no ball.
    """

    norm: Literal["linf", "gaussian"] = "linf"

    def perturb(
        self, model: nn.Module, images: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Float[Tensor, "batch *shape"]:
        """Return the images with noise, clipped to [0, 1]."""
        noise = attacks.UniformNoise if self.norm == "linf" else attacks.GaussianNoise
        return noise(name="noise", eps=(self.eps,)).perturb(model, images, labels, self.eps)


@dataclass(eq=False, config=STRICT, kw_only=True)
class Steepest(Adversary):
    """Moves to where the prediction changes fastest, for any penalty: looks for a large ``‖J_μ‖_F`` in the ℓ∞ ball.

    Of ``samples`` uniform points that of the largest norm is taken, and from there ``steps`` steps along the sign of
    the norm's gradient. The labels play no part in it. A penalty at an image says nothing of the ball around it (the
    note's simplification 2); this is a lower bound of the largest norm there, no certificate. With one sample and no
    step it is noise. The model is seen in evaluation mode.

    Args:
        steps: of the ascent, a forward pass and two derivatives each.
        samples: points to begin with; where there are several, a forward pass and a derivative each.
        step_size: length of a step in the ℓ∞ norm; ``None`` for ``1.25·eps/steps``.
        probes: vector–Jacobian products for the norm; ``None`` is exact.
    """

    penalty_at: Place = "adversary"
    steps: Size = 1
    samples: Count = 1
    step_size: Annotated[float, Field(gt=0, le=1e6)] | None = None
    probes: Count | None = 1

    def perturb(
        self, model: nn.Module, images: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Float[Tensor, "batch *shape"]:
        """Return the points, clipped to [0, 1]; where the norm has no slope, they stay where they began."""
        attacks.check_pixels(images)
        low, high = (images - self.eps).clamp_min(0), (images + self.eps).clamp_max(1)
        step = self.step_size or 1.25 * self.eps / max(self.steps, 1)
        with attackable(model), torch.enable_grad():
            points = self._steepest_sample(model, images, low, high)
            for _ in range(self.steps):
                norms = self._norms(model, points.requires_grad_(), create_graph=True)
                if not norms.requires_grad:  # piecewise linear outputs in a metric that does not change
                    break
                (gradient,) = torch.autograd.grad(norms.sum(), points)
                points = torch.clamp(points.detach() + step * gradient.sign(), low, high)
        return points.detach()

    def _steepest_sample(self, model: nn.Module, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        best, largest = images, torch.full_like(images.flatten(1)[:, 0], -torch.inf)
        for _ in range(self.samples):
            drawn = (images + self.eps * (2 * torch.rand_like(images) - 1)).clamp(low, high)
            if self.samples == 1:
                return drawn
            norms = self._norms(model, drawn.requires_grad_(), create_graph=False).to(largest)
            chosen = (norms > largest).view(-1, *[1] * (images.dim() - 1))
            best, largest = torch.where(chosen, drawn.detach(), best), torch.maximum(norms, largest)
        return best

    def _norms(self, model: nn.Module, points: Tensor, *, create_graph: bool) -> Tensor:
        logits = model(points)
        return frobenius_norm(logits, points, family=self.family, probes=self.probes, create_graph=create_graph)


@dataclass(eq=False, config=STRICT, kw_only=True)
class PGD(Adversary):
    """Adversarial training: the last iterate of projected gradient ascent from a random start (Madry et al., 2018).

    The attack sees the model in evaluation mode.

    Args:
        norm: of the ball.
        steps: iterations.
        step_size: length of a step in the norm of the ball; ``None`` for ``2.5·eps/steps``.
    """

    norm: attacks.Ball = "linf"
    steps: Count
    step_size: Annotated[float, Field(gt=0, le=1e6)] | None = None

    def perturb(
        self, model: nn.Module, images: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Float[Tensor, "batch *shape"]:
        """Return the last iterates."""
        attack = attacks.PGD(
            name="pgd",
            eps=(self.eps,),
            norm=self.norm,
            steps=self.steps,
            step_size=self._step_size(),
            early_stop=False,
            family=self.family,
        )
        return attack.perturb(model, images, labels, self.eps)

    def _step_size(self) -> float:
        return self.step_size or 2.5 * self.eps / self.steps


@dataclass(eq=False, config=STRICT, kw_only=True)
class FGSM(PGD):
    """Fast adversarial training: one step of the gradient's sign from a random start in the ℓ∞ ball.

    Wong, Rice & Kolter, "Fast is better than free: revisiting adversarial training", 2020. A ``step_size`` of ``None``
    is theirs, ``1.25·eps``.
    """

    norm: Literal["linf"] = "linf"
    steps: Literal[1] = 1

    def _step_size(self) -> float:
        return self.step_size or 1.25 * self.eps


@dataclass(eq=False, config=STRICT, kw_only=True)
class TRADES(PGD):
    """``CE(x) + β·KL(θ(x) ‖ θ(x'))``, where ``x'`` climbs the divergence in the ℓ∞ ball.

    Zhang et al., "Theoretically principled trade-off between robustness and accuracy", 2019. Both predictions are
    differentiated, as there.

    Args:
        beta: weight ``β`` of the divergence, ``1/λ`` in the paper.
    """

    norm: Literal["linf"] = "linf"
    fit_at: Literal["clean"] = "clean"
    family: Categorical = CATEGORICAL
    beta: float = Field(ge=0, le=1e6)

    def perturb(
        self, model: nn.Module, images: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Float[Tensor, "batch *shape"]:
        """Return the last iterates."""
        attack = attacks.DivergencePGD(name="trades", eps=(self.eps,), steps=self.steps, step_size=self._step_size())
        return attack.perturb(model, images, labels, self.eps)

    def fit(
        self, logits_at: LogitsAt, labels: Shaped[Tensor, "batch *_"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the paper's loss, and its first term."""
        clean, displaced = logits_at("clean"), logits_at("adversary")
        cross_entropy = nn.functional.cross_entropy(clean, labels)
        divergence = nn.functional.kl_div(
            displaced.log_softmax(-1), clean.log_softmax(-1), reduction="batchmean", log_target=True
        )
        return cross_entropy + self.beta * divergence, cross_entropy

    def idle(self, *, penalised: bool) -> bool:
        """Return ``False``: the divergence is always there."""
        return False


@dataclass(eq=False, config=STRICT, kw_only=True)
class Free(Adversary):
    """Adversarial training at the price of plain training: each backward pass moves the weights and the images.

    Shafahi et al., "Adversarial training for free!", 2019. A batch is trained on ``replays`` times in a row, and after
    each time the displacement takes a step along the gradient's sign, which the same backward pass has computed. The
    displacement is carried over to the next batch. Of the batches that an epoch hands out only every ``replays``-th is
    used, so that an epoch costs what a plain one does, and sees a random part of the images.

    Args:
        replays: how often a batch is trained on, ``m`` in the paper.
        step_size: of the displacement; ``None`` for ``eps``, the paper's.
    """

    fit_at: Literal["adversary"] = "adversary"
    replays: Count
    step_size: Annotated[float, Field(gt=0, le=1e6)] | None = None

    def __post_init__(self) -> None:
        self._count = 0
        self._batch: Batch | None = None
        self._displacement: Tensor | None = None
        self._leaf: Tensor | None = None

    def next_batch(self, batch: Batch) -> Batch:
        """Return the batch that is being replayed, or the new one if that is done."""
        if self._batch is None or self._count % self.replays == 0:
            self._batch = batch
        self._count += 1
        images, labels = (tensor.to(batch[0].device) for tensor in self._batch)
        return images, labels

    def perturb(
        self, model: nn.Module, images: Float[Tensor, "batch *shape"], labels: Shaped[Tensor, "batch *_"]
    ) -> Float[Tensor, "batch *shape"]:
        """Return the images where the last step left them, as a leaf that requires a gradient."""
        attacks.check_pixels(images)
        known = images[:0] if self._displacement is None else self._displacement.to(images.device)
        if len(known) < len(images):  # the last batch of an epoch is smaller, and the next one larger again
            known = torch.cat([known, torch.zeros_like(images[len(known) :])])
        self._displacement = known
        self._leaf = (images + known[: len(images)]).clamp(0, 1).requires_grad_()
        return self._leaf

    @property
    def leaves(self) -> list[Tensor]:
        """The displaced images."""
        return [] if self._leaf is None else [self._leaf]

    def learn(self) -> None:
        """Take the displacement's step."""
        if self._leaf is None or self._leaf.grad is None:
            return
        assert self._displacement is not None
        size = len(self._leaf)
        # A penalty's gradient that is not finite skips the weights' step, and must not stay in the displacement.
        moved = self._displacement[:size] + (self.step_size or self.eps) * self._leaf.grad.sign().nan_to_num(0.0)
        self._displacement = torch.cat([moved.clamp(-self.eps, self.eps), self._displacement[size:]])
        self._leaf = None

    def state_dict(self) -> dict[str, Any]:
        """Return the replayed batch, how often a batch was asked for, and the displacement."""
        batch = None if self._batch is None else list(self._batch)
        return {"batch": batch, "count": self._count, "displacement": self._displacement}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        batch = state_dict["batch"]
        self._batch = None if batch is None else (batch[0], batch[1])
        self._count, self._displacement = state_dict["count"], state_dict["displacement"]

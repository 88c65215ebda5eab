"""A first look at a model, before anything long: does it return logits for the data's images, in both modes?"""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jacobian_robust.errors import UserError, describe
from jacobian_robust.jacobian.checks import remedy_of

__all__ = ["is_random", "look_at", "unchanged"]


@contextmanager
def unchanged(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into a mode, and restore its modes, buffers and torch's random stream at the end.

    In training mode a forward pass changes running statistics. A copy would do too, but not every model has one.
    """
    modes = [(module, getattr(module, "training", False)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def look_at(
    model: nn.Module,
    outputs: int | tuple[int, ...],
    shape: tuple[int, ...],
    *,
    what: str = "model",
    gradient: bool = False,
    training: Collection[int] = (),
    device: torch.device | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.dtype:
    """Return the type of a model's logits, after it was given black images in evaluation mode, and in training mode.

    Args:
        model: the model; it is left as it was.
        outputs: the number of classes, or the shape of what a task asks for an image.
        shape: of an image, ``(channels, height, width)``.
        what: how the model is called in a message.
        gradient: whether its logits must have a gradient with respect to the images.
        training: the sizes of training batches to try in training mode, if any.
        device: where the model is; the CPU by default.
        options: the model's options, for the remedy where the shape is not the one they say.

    Raises:
        UserError: if it does not return ``(batch, *outputs)`` floating-point logits; the message says why.
    """
    wanted = (outputs,) if isinstance(outputs, int) else outputs
    dtype = torch.float32
    for mode, sizes in ((False, (3, 1)), (True, training)):
        if not sizes:
            continue
        with unchanged(model, training=mode):
            for batch in sizes:
                images = torch.zeros(batch, *shape, device=device)
                logits = _answer(model, images, what, mode, gradient and not mode, options or {})
                _require_logits(logits, batch, f"{what}: in training mode" if mode else what, wanted)
                dtype = logits.dtype
    return dtype


def _answer(
    model: nn.Module, images: Tensor, what: str, training: bool, gradient: bool, options: Mapping[str, Any]
) -> Any:
    batch, *shape = images.shape
    given = images.clone()
    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:  # a foreign model can fail in any way
        if training:
            few = batch == 1 and "more than 1 value per channel" in str(error)
            remedy = "; let no batch have one image alone: give another data.batch_size" if few else ""
            of = f"{batch} images" if batch > 1 else "1 image"
            raise UserError(f"{what}: cannot be trained on a batch of {of}: {describe(error)}{remedy}") from error
        fitting = {"channels": shape[0], "in_chans": shape[0], "image_size": shape[-1], "inputs": math.prod(shape)}
        wrong = [f"model.{name}={value}" for name, value in fitting.items() if options.get(name, value) != value]
        remedy = f"give {' '.join(wrong)}" if wrong else describe(error)
        of = f"{batch} images" if batch > 1 else "1 image"
        raise UserError(f"{what}: takes no batch of {of} of the data's shape {tuple(shape)}: {remedy}") from error
    if not torch.equal(images, given):
        raise UserError(
            f"{what}: changes the images that it is given, by an operation in place; write images = images - mean, or "
            "images.clone() first"
        )
    if gradient and isinstance(logits, Tensor) and logits.is_floating_point():
        watched = given.requires_grad_()
        try:
            answer = model(watched)
            reached = (
                answer.requires_grad and torch.autograd.grad(answer.sum(), watched, allow_unused=True)[0] is not None
            )
        except RuntimeError as error:
            why = describe(error).split(". ")[0]
            raise UserError(
                f"{what}: cannot be differentiated with respect to the image ({why}); {remedy_of(why)}"
            ) from error
        if not reached:
            raise UserError(
                f"{what}: its logits have no gradient with respect to the image (detached, or computed outside torch), "
                "which this evaluation needs; without, there are attack=[square,square_l2] with sanity_images=0, "
                "geometry_images=0 and diagnostics=null"
            )
    return logits


def _require_logits(logits: Any, batch: int, what: str, outputs: tuple[int, ...]) -> None:
    must = f"must return (batch, {', '.join(map(str, outputs))}) logits, not"
    if not isinstance(logits, Tensor):
        held = f" with {', '.join(map(str, logits))}" if isinstance(logits, Mapping) else ""
        raise UserError(
            f"{what}: {must} a {type(logits).__name__}{held}; choose its part: model=factory model.factory=… "
            f"model.output={next(iter(logits), 0) if isinstance(logits, Mapping) else 0}"
        )
    if logits.shape in ((batch, 1), (batch,)) and outputs == (2,):
        raise UserError(
            f"{what}: {must} {tuple(logits.shape)} for a batch of {batch}; one logit becomes two by model=factory "
            "model.factory=… model.binary=true"
        )
    if logits.shape != (batch, *outputs):
        remedy = ""
        if len(outputs) > 1:
            remedy = "; choose model=conv_pixels"
        elif logits.ndim == 2:
            remedy = f"; model.classes={logits.shape[1]}, and the data has {outputs[0]} classes"
        raise UserError(f"{what}: {must} {tuple(logits.shape)} for a batch of {batch}{remedy}")
    if not logits.is_floating_point():
        raise UserError(f"{what}: must return logits, not numbers of type {logits.dtype}")
    if logits.isnan().all():
        raise UserError(f"{what}: returns nan for black images: its logits would say nothing")


def is_random(model: nn.Module, images: Tensor) -> bool:
    """Return whether a model in evaluation mode gives the same images other logits at a second look."""
    with unchanged(model, training=False), torch.no_grad():
        return not torch.equal(model(images), model(images))

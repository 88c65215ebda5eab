"""Checks of a model and its images."""

import torch
from torch import Tensor

from jacobian_robust.geometry.families import BernoulliProduct, Categorical, Family, PixelCategorical, flat
from jacobian_robust.robustness.certificates import STOCHASTIC
from jacobian_robust.robustness.sanity.base import Evaluated, Outcome, SanityCheck, share_judged

__all__ = ["MODEL_CHECKS"]

DIFFERENT = 1e-3
"""Change of the logits between two answers to the same batch, as a share of the largest, that is no rounding."""

DIFFERENT_ALONE = 1e-2
"""The same for an image alone: kernels for another size of batch round in another way, on a GPU to three digits."""

ROUNDED = 2e-2
"""How far a sum of probabilities may be from 1, or from another constant as a share of it: half precision rounds."""

VARIED, ENOUGH = 0.5, 20
"""Range of a class's output, as a share of the most that it could be, and number of images from which on numbers that
are probabilities but for a constant, or for their sum, are no accident: a classifier's first, small logits can be."""


def _evaluation_mode(evaluated: Evaluated) -> Outcome:
    modules = evaluated.model.named_modules()
    training = [name for name, module in modules if module.training and isinstance(module, STOCHASTIC)]
    if training:
        return "fail", f"{training[0]} is in training mode: call model.eval() before the evaluation"
    return "pass", "no dropout or batch normalisation is in training mode"


def _deterministic(evaluated: Evaluated) -> Outcome:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        first, second = evaluated.outputs(), evaluated.outputs()
        apart = evaluated.outputs(batch_size=1)
    difference, changed = _difference(first, second, evaluated.family)
    if changed or difference > DIFFERENT:
        return "fail", (
            f"asked twice, the model gives other logits (up to {difference:.1%} of the largest) and {changed} other "
            "predictions: attack the mean over its randomness instead"
        )
    difference, changed = _difference(first, apart, evaluated.family)
    if difference > DIFFERENT_ALONE:
        return "fail", (
            f"asked for each image alone, the model gives other logits (up to {difference:.1%} of the largest) and "
            f"{changed} other predictions: the images of a batch influence each other, as in batch normalisation by "
            "the batch's own statistics"
        )
    return "pass", "asked twice, and for each image alone, the model gives the same answer"


def _difference(first: Tensor, second: Tensor, family: Family) -> tuple[float, int]:
    """Return the largest change of a logit, as a share of the largest logit, and how many predictions change."""
    difference = (first - second).abs().max() / first.abs().max().clamp_min(torch.finfo(first.dtype).tiny)
    return float(difference), int((~family.right(second, family.predict(first))).sum())


def _logits(evaluated: Evaluated) -> Outcome:
    outputs, family = evaluated.outputs().double(), evaluated.family
    if without := int((~flat(outputs).isfinite()).any(-1).sum()):
        return "fail", (
            f"the logits of {without} of {len(evaluated)} images are not finite: no class is predicted, and no loss to "
            "climb is defined; look for an overflow or a division by zero in the model"
        )
    if isinstance(family, BernoulliProduct) and len(evaluated) >= ENOUGH and ((outputs >= 0) & (outputs <= 1)).all():
        return "fail", (
            "all outputs are in [0, 1], as after a sigmoid, and each label is predicted of each image: the loss's own "
            "sigmoid comes on top and flattens its gradients; return logits"
        )
    if not isinstance(family, Categorical | PixelCategorical):
        return "pass", "the outputs are finite"
    outputs = outputs.movedim(1, -1).flatten(0, -2)  # of pixels, a row each
    positive, sums = bool((outputs >= 0).all()), outputs.sum(-1)
    flattened = "the attack's own softmax flattens its gradients; return logits"
    if positive and ((sums - 1).abs() < ROUNDED).all():
        return "fail", f"the outputs are probabilities (no row has a negative entry, all rows sum to 1): {flattened}"
    if not positive or len(evaluated) < ENOUGH:
        return "pass", "the outputs are not probabilities"
    varied, total = (outputs.amax(0) - outputs.amin(0)).max(), sums.mean()
    if (outputs <= 1).all() and varied > VARIED:
        return "warn", f"all outputs are in [0, 1], as after a sigmoid or a softmax that was clamped: then {flattened}"
    if ((sums - total).abs() < ROUNDED * total).all() and varied > VARIED * total:
        return "warn", (
            f"no output is negative and all rows sum to {total:.3g}, as probabilities times a constant do: then the "
            "attack's own softmax comes on top of the model's and misleads its gradients; return logits"
        )
    return "pass", "the outputs are not probabilities"


def _unseen(evaluated: Evaluated) -> Outcome:
    """Compare the images with those of the training. Images of one brightness, as empty canvases, are left out."""
    if evaluated.training_images is None:
        return "skip", "the training images are not known"
    seen = {image.tobytes() for image in evaluated.training_images.numpy(force=True) if image.min() < image.max()}
    images = evaluated.all_images
    if not evaluated.training_images.is_floating_point():
        images = (images * 255).round().to(torch.uint8)
    known = sum(image.tobytes() in seen for image in images.numpy(force=True))
    return share_judged(known, len(images)), f"{known or 'none'} of {len(images)} images are training images"


def _gradients(evaluated: Evaluated) -> Outcome:
    zero = undefined = 0
    with torch.enable_grad(), torch.inference_mode(False):
        for images, labels in zip(evaluated.images.split(100), evaluated.labels.split(100), strict=True):
            inputs = images.clone().requires_grad_()
            loss = evaluated.family.negative_log_likelihood(evaluated.model(inputs), labels).sum()
            gradient = torch.autograd.grad(loss, inputs, allow_unused=True)[0] if loss.requires_grad else None
            largest = inputs.new_zeros(len(inputs)) if gradient is None else gradient.flatten(1).abs().amax(-1)
            zero += int((largest == 0).sum())
            undefined += int((~largest.isfinite()).sum())
    faults = []
    if undefined:
        faults.append(f"that is not finite at {undefined}: an attack by gradients cannot follow it")
    if zero:
        faults.append(f"of exactly zero at {zero}: an attack by gradients cannot move them")
    if faults:
        why = f"of {len(evaluated)} images the loss has a gradient {'; and one '.join(faults)}"
        return share_judged(zero + undefined, len(evaluated)), why
    return "pass", "the loss has a gradient at every image"


MODEL_CHECKS: dict[str, SanityCheck] = {
    "evaluation mode": _evaluation_mode,
    "deterministic": _deterministic,
    "logits": _logits,
    "unseen images": _unseen,
    "gradients": _gradients,
}
"""The checks of a model and its images, by name."""

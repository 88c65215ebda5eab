"""Beyond adversaries: noise, calibration and images of another kind, which the note's introduction names."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobian_robust.geometry import distance_to_center
from jacobian_robust.robustness.budgets import predictions
from jacobian_robust.robustness.schema import Calibration, NoisePoint, OutOfDistribution

__all__ = ["SIGMAS", "calibration", "log_probabilities", "noise_accuracy", "out_of_distribution", "transformed"]

SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Standard deviations of the noise."""

BINS = 15
"""Of confidence (Guo et al., 2017)."""


def log_probabilities(model: nn.Module, images: Float[Tensor, "images *shape"]) -> Float[Tensor, "images classes"]:
    """Return the log-softmax of the logits, in float64."""
    with torch.no_grad():
        return torch.cat([model(chunk).double().log_softmax(-1) for chunk in images.split(100)])


def noise_accuracy(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Int[Tensor, "images"],
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
) -> list[NoisePoint]:
    """Return the accuracy under Gaussian noise, clipped to [0, 1]; the same draw, scaled, at every strength."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    return [
        NoisePoint(
            sigma=sigma,
            accuracy=float((predictions(model, (images + sigma * noise).clamp(0, 1)) == labels).double().mean()),
        )
        for sigma in sigmas
    ]


def calibration(log_p: Float[Tensor, "images classes"], labels: Int[Tensor, "images"]) -> Calibration:
    """Return the calibration of predicted probabilities: ECE (torchmetrics'), NLL, Brier score and the bins."""
    from torchmetrics.functional.classification import multiclass_calibration_error  # not at the top: it takes seconds

    p = log_p.exp()
    confidence, predicted = p.max(-1)
    right = (predicted == labels).double()
    # (0, 1/15], …, (14/15, 1]
    number = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    bins = []
    defined = confidence.isfinite()
    for i in number[defined].unique().tolist():
        inside = defined & (number == i)
        bins.append((float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    ece = float(multiclass_calibration_error(p, labels, num_classes=p.shape[-1], n_bins=BINS, norm="l1"))
    return Calibration(
        ece=ece if defined.all() else None,  # torchmetrics takes a nan for a zero
        nll=float(-log_p.gather(1, labels[:, None]).mean()),
        brier=float((p - nn.functional.one_hot(labels, p.shape[-1])).square().sum(-1).mean()),
        bins=bins,
    )


def transformed(
    images: Float[Tensor, "images *shape"], *, seed: int = 0, pictures: bool = True
) -> dict[str, Float[Tensor, "images *shape"]]:
    """Return images of another kind made from the given ones: rotated by 90°, or 180° if not square, inverted, noise.

    Some digits look like digits after a rotation: no score should reach an AUROC of 1 there.

    Args:
        images: pixels in [0, 1].
        seed: of the noise.
        pictures: whether turning and inverting them means anything; otherwise the noise is all there is.
    """
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    square = images.shape[-2] == images.shape[-1]  # others do not keep their shape after a quarter turn
    angle = 90 if square else 180
    turned = {f"rotated by {angle}°": images.rot90(angle // 90, dims=(-2, -1)), "inverted": 1 - images}
    return (turned if pictures else {}) | {"uniform noise": noise}


def out_of_distribution(
    model: nn.Module,
    log_p: Float[Tensor, "images classes"],
    others: Mapping[str, Float[Tensor, "others *shape"]],
) -> list[OutOfDistribution]:
    """Return how well three scores tell the evaluated images, with ``log_p``, from others.

    The scores, larger for what the model knows: the largest probability, the negative entropy, and the Fisher–Rao
    distance of the prediction to the simplex's centre (eq. 6).
    """
    from torchmetrics.functional.classification import binary_auroc

    inside = _scores(log_p)
    rows = []
    for name, images in others.items():
        outside = _scores(log_probabilities(model, images))
        known = torch.cat([torch.ones(len(log_p)), torch.zeros(len(images))]).long().to(log_p.device)
        # By rank: torchmetrics squashes scores outside [0, 1] by a sigmoid, which ties those of confident predictions.
        areas = {
            score: float(binary_auroc(_ranks(torch.cat([inside[score], outside[score]])), known)) for score in inside
        }
        rows.append(OutOfDistribution(against=name, images=len(images), **areas))
    return rows


def _scores(log_p: Float[Tensor, "images classes"]) -> dict[str, Float[Tensor, "images"]]:
    p = log_p.exp()
    return {
        "max_probability": p.amax(-1),
        "entropy": -torch.special.entr(p).sum(-1),  # 0 where a probability is
        "distance_to_center": distance_to_center(p),
    }


def _ranks(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return the ranks in [0, 1]; equal values share one."""
    unique, rank = values.unique(return_inverse=True)
    return rank.double() / max(len(unique) - 1, 1)

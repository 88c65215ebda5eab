"""Randomised smoothing (Cohen et al., 2019): an l2 certificate of any classifier's smoothed version."""

import torch
from jaxtyping import Float, Int
from scipy.stats import beta, norm
from torch import Tensor, nn

__all__ = ["smoothed_radius"]


def _counts(model: nn.Module, image: Tensor, sigma: float, samples: int, generator: torch.Generator) -> Tensor:
    """Return how often each class is predicted under Gaussian noise."""
    total: Tensor | None = None
    for size in [1000] * (samples // 1000) + [samples % 1000] * (samples % 1000 > 0):
        shape = (size, *image.shape)
        noise = torch.randn(shape, generator=generator, dtype=image.dtype, device=generator.device).to(image.device)
        logits = model(image + sigma * noise)
        counts = logits.argmax(-1).bincount(minlength=logits.shape[-1])
        total = counts if total is None else total + counts
    assert total is not None
    return total


@torch.no_grad()
def smoothed_radius(
    model: nn.Module,
    inputs: Float[Tensor, "batch *shape"],
    sigma: float,
    samples: int,
    confidence: float,
    generator: torch.Generator,
    *,
    selection: int = 100,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return each image's smoothed prediction and its l2 radius ``σ Φ⁻¹(p_A)``; -1 and 0 where it abstains.

    ``selection`` samples choose the class, ``samples`` others estimate its probability; ``p_A`` is the exact
    Clopper–Pearson lower bound at ``confidence``, in (0, 1), which holds for each image alone. The noise is not
    clipped to the inputs' range. The radius holds for real arithmetic and ideal Gaussian noise.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not (0 < sigma < float("inf") and samples > 0 and selection > 0 and 0 < confidence < 1):
        raise ValueError("bounds: sigma, samples and selection must be positive, confidence between 0 and 1")
    predictions, radii = [], []
    for image in inputs:
        chosen = int(_counts(model, image, sigma, selection, generator).argmax())
        hits = int(_counts(model, image, sigma, samples, generator)[chosen])
        lowest = float(beta.ppf(1 - confidence, hits, samples - hits + 1)) if hits else 0.0
        certain = lowest > 0.5
        predictions.append(chosen if certain else -1)
        radii.append(sigma * float(norm.ppf(lowest)) if certain else 0.0)
    return torch.tensor(predictions, device=inputs.device), torch.tensor(radii, dtype=torch.float64)

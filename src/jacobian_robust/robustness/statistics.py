"""How well so many images tell a share."""

from scipy.stats import binomtest

__all__ = ["wilson_interval"]


def wilson_interval(share: float, images: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95% interval (1927) of a share in [0, 1] of so many images.

    Raises:
        ValueError: if there are no images, or the share is not in [0, 1].
    """
    interval = binomtest(round(share * images), images).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)

"""What has to stand beside a number for it to be repeated."""

import platform
from importlib.metadata import version

__all__ = ["versions"]

_PACKAGES = ("jacobian-robust", "torch", "torchvision", "pytorch-lightning", "torchattacks", "pyautoattack")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a figure depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES}

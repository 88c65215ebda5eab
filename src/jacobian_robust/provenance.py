"""What a number needs beside it to be reproduced: versions, the commit, the run."""

import functools
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

from jacobian_robust import __version__

__all__ = ["git_state", "run_url", "versions"]

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchattacks", "pyautoattack")

_version = functools.cache(importlib.metadata.version)  # it reads a file


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a figure depends on."""
    # Not by the installation's metadata, which is of the day a clone was installed.
    own = {"python": platform.python_version(), "jacobian-robust": __version__}
    return own | {package: _version(package) for package in _PACKAGES}


def git_state() -> dict[str, str | bool | None]:
    """Return the git ``commit`` of this package's clone and whether it is ``dirty``; ``None`` outside a clone."""
    project = Path(__file__).resolve().parents[2]
    try:
        if not (project / ".git").exists():
            return {"commit": None, "dirty": None}
        commit, changes = (
            subprocess.run(["git", "-C", str(project), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def run_url(identity: str) -> str | None:
    """Return the address of a run named as W&B does, or ``None`` where its entity is not known."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+", identity):
        return None
    entity, project, run = identity.split("/")
    return f"https://wandb.ai/{entity}/{project}/runs/{run}"

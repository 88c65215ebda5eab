"""The commands."""

from jacobian_robust.cli.main import door, run

__all__ = ["door", "run"]

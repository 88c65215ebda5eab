"""Options on the command line that a training would not use."""

from collections.abc import Iterable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from jacobian_robust.errors import UserError

__all__ = ["check_used", "given_on_the_command_line"]

OF_A_PENALTY = ("eta", "amortization")


def given_on_the_command_line() -> list[str]:
    """Return the overrides of a single run; none in a sweep, whose jobs share options that one of them may not use."""
    single = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN
    return list(HydraConfig.get().overrides.task) if single else []


def check_used(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Refuse options of a penalty's weight where there is no penalty.

    Defaults, and what an experiment sets, are not refused: an experiment with ``regularizer=none`` is its undefended
    twin.

    Args:
        cfg: the config, with ``None`` for a group whose choice is ``none``.
        overrides: what was given on the command line.

    Raises:
        UserError: if one of them is given.
    """
    if cfg.regularizer:
        return
    for override in overrides:
        name = override.lstrip("+~").partition("=")[0]
        if name.partition(".")[0] in OF_A_PENALTY:
            raise UserError(
                f"{name}: regularizer=none has no penalty for it; leave {name} out, or choose a penalty, as "
                "regularizer=frobenius"
            )

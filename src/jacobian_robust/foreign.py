"""Models by import path, and outputs that are more, or less, than logits."""

import pkgutil
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from pydantic import validate_call
from torch import Tensor, nn

from jacobian_robust.errors import UserError, describe
from jacobian_robust.options import STRICT

__all__ = ["Logits", "from_factory"]


class Logits(nn.Module):
    """The logits of a model that returns more than those, or a single one.

    Args:
        model: the model.
        output: the name or the number of the logits in what it returns: the key of a dictionary, the attribute of a
            ``ModelOutput``, the place in a tuple; ``None`` for a tensor. Where the model returns a tensor in one of its
            two modes, that is taken as it is.
        binary: its one logit is that of class 1; that of class 0 is 0.
    """

    def __init__(self, model: nn.Module, output: str | int | None = None, *, binary: bool = False) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.binary = binary

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """Return the logits of images with pixels in [0, 1]."""
        logits = self.model(images)
        if self.output is not None and not isinstance(logits, Tensor):
            logits = _part(logits, self.output)
        if self.binary and isinstance(logits, Tensor):
            one = logits.reshape(len(images), -1)
            logits = torch.cat([torch.zeros_like(one), one], dim=1)
        return logits


def _part(outputs: Any, output: str | int) -> Any:
    if isinstance(output, str) and not isinstance(outputs, Mapping) and hasattr(outputs, output):
        return getattr(outputs, output)
    try:
        return outputs[output]
    except (KeyError, IndexError, TypeError) as error:
        held = f" with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
        raise UserError(
            f"model.output={output} is not in what the model returns, a {type(outputs).__name__}{held}"
        ) from error


@validate_call(config=STRICT)
def from_factory(
    factory: str | None = None,
    arguments: dict[str, Any] | None = None,
    output: str | int | None = None,
    binary: bool = False,
) -> nn.Module:
    """Return the model that a class or function makes.

    This is not among :mod:`jacobian_robust.models`, of which a checkpoint may choose: it calls whatever it is told to.

    Args:
        factory: its import path.
        arguments: what to call it with.
        output: see :class:`Logits`.
        binary: see :class:`Logits`.

    Raises:
        UserError: if it cannot be imported or called, or makes no model.
    """
    if factory is None:
        raise UserError("model.factory is missing: give model.factory=PACKAGE.FUNCTION, which returns a torch module")
    try:
        made = pkgutil.resolve_name(factory)(**arguments or {})
    except Exception as error:  # anything can go wrong in a function of somebody's own
        raise UserError(f"model.factory={factory}: {describe(error)}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"model.factory={factory} returns a {type(made).__name__}, no torch.nn.Module")
    return made if output is None and not binary else Logits(made, output, binary=binary)

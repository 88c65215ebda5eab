"""Types of options: as strict as YAML is, so that no value is taken for another quietly."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, Strict

__all__ = ["STRICT", "Count", "Flag", "Listed", "Magnitude", "NonEmpty", "Seed", "Size"]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
"""No unknown option, no nan, and no ``true``, ``1.0`` or ``'1'`` where 1 is meant; an integer is a number, though."""

Count = Annotated[int, Strict(), Field(gt=0, lt=2**31)]
"""Of what there is at least one; larger ones overflow what libraries count with."""

Size = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
"""Of what there may be none."""

Magnitude = Annotated[float, Field(ge=1e-6, le=1e6)]
"""A positive number that float32 can be multiplied with, divided by and squared."""

Flag = Annotated[bool, Strict()]

Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
"""Of NumPy's and torch's random streams."""

NonEmpty = Annotated[str, Strict(), Field(min_length=1)]
"""A text; an unset shell variable leaves an empty one, which is refused."""


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int | float | str) else value


Listed = BeforeValidator(_as_tuple)
"""Makes a YAML list the tuple that a type asks for, and a single value a tuple of one."""

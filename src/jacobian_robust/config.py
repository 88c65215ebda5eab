"""From a composed config to objects, with errors in one line that name the option."""

from collections.abc import Mapping
from typing import Any, TypeVar

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from jacobian_robust.errors import UserError

Options = TypeVar("Options", bound=BaseModel)

__all__ = ["build", "build_each", "describe", "flat", "plain", "read_options"]


def plain(cfg: DictConfig, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the resolved config as plain containers, less some of its top-level keys.

    Raises:
        UserError: if an interpolation or a mandatory value is missing.
    """
    try:
        kept = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in without])
        return OmegaConf.to_container(kept, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def build(cfg: DictConfig, group: str, kind: type = object, *, optional: bool = False, **arguments: Any) -> Any:
    """Return the object that a config group describes.

    Args:
        cfg: the whole config.
        group: one of its top-level keys.
        kind: what the object has to be.
        optional: return ``None`` for an empty group; otherwise that is an error.
        arguments: further arguments of the group's ``_target_``.

    Raises:
        UserError: if the object cannot be made; the message names the option.
    """
    if not cfg.get(group):
        if optional:
            return None
        raise UserError(f"{group} is empty: choose one, {group}=NAME, of those in conf/{group}")
    return _make(cfg[group], group, kind, **arguments)


def build_each(cfg: DictConfig, group: str, kind: type = object) -> list[Any]:
    """Return the objects that the entries of a config group describe; each is given its key as ``name``.

    Args:
        cfg: the whole config.
        group: one of its top-level keys, a mapping.
        kind: what the objects have to be.

    Raises:
        UserError: if there is none, or one cannot be made; the message names the option.
    """
    if not cfg.get(group):
        raise UserError(f"{group} is empty: choose some, {group}=[NAME,NAME], of those in conf/{group}")
    for name, entry in cfg[group].items():
        if not isinstance(entry, DictConfig):
            raise UserError(
                f"{group}.{name}: an option belongs to one of {', '.join(map(str, cfg[group]))}, as in "
                f"{group}.{next(iter(cfg[group]))}.{name}={entry}"
            )
        if not entry.get("_target_"):
            raise UserError(
                f"{group}.{name} has options, but was not chosen: {group}=[…] takes the place of a suite's choice, and "
                f"the suite's options stay; leave out {group}=… or the suite"
            )
    return [_make(entry, f"{group}.{name}", kind, name=name) for name, entry in cfg[group].items()]


def _make(described: DictConfig, group: str, kind: type, **arguments: Any) -> Any:
    try:
        made = instantiate(described, _convert_="all", **arguments)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(describe(cause or error, group)) from error
    if not isinstance(made, kind):
        raise UserError(f"{group}._target_={described.get('_target_')} makes no {kind.__name__}")
    return made


def read_options(model: type[Options], values: Mapping[str, Any]) -> Options:
    """Return a config's own options, checked.

    Raises:
        UserError: if one is of the wrong type or out of range.
    """
    given = {name: values.get(name) for name in model.model_fields}
    try:
        return model.model_validate(
            {name: plain(value) if isinstance(value, DictConfig) else value for name, value in given.items()}
        )
    except ValidationError as error:
        raise UserError(describe(error)) from error


def describe(error: BaseException, group: str = "") -> str:
    """Return one line about an error, with the full names of the options at fault.

    Args:
        error: what was raised.
        group: the config group it was raised in.
    """
    if isinstance(error, ValidationError):
        return "; ".join(_describe_option(details, group) for details in error.errors())
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{group}: {text}" if group else text


def _describe_option(details: Mapping[str, Any], group: str) -> str:
    name = ".".join(str(part) for part in (group, *details["loc"]) if part != "")
    message = details["msg"].removeprefix("Value error, ")
    got = f" (got {details['input']!r})" if details["loc"] else ""
    return f"{name}: {message[:1].lower()}{message[1:]}{got}" if name else message

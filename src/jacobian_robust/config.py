"""From a composed config to objects, with errors in one line that name the option."""

import functools
import inspect
import math
import os
import pkgutil
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from jacobian_robust.errors import UserError, describe

Options = TypeVar("Options", bound=BaseModel)

__all__ = ["build", "build_each", "check", "flat", "plain", "read_options", "secret", "without_none"]


def plain(cfg: DictConfig, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the resolved config as plain containers, less some of its top-level keys.

    Raises:
        UserError: if an interpolation or a mandatory value is missing.
    """
    try:
        return {str(key): _plain_value(cfg[key], complete=True) for key in cfg if key not in without}
    except OmegaConfBaseException as error:
        raise UserError(describe(error, str(error.full_key or ""))) from error
    except RecursionError as error:
        raise UserError("an interpolation, ${…}, leads back to itself") from error


def check(cfg: DictConfig, options: Collection[str], groups: Collection[str]) -> None:
    """Refuse what no option may be, whatever its kind.

    Args:
        cfg: the whole config.
        options: the names of its top-level options.
        groups: and those of its groups.

    Raises:
        UserError: if there is another, a group is no mapping, an interpolation leads nowhere, or a value is not finite,
            empty, of a type that YAML has no word for, or holds characters that cannot be printed or a secret.
    """
    values = plain(cfg)
    if unknown := [str(key) for key in values if key not in options and key not in groups]:
        raise UserError(f"{unknown[0]}: there is no such option; --cfg job shows all there are, --help the groups")
    for group in groups:
        if (chosen := values.get(group)) is not None and not (isinstance(chosen, dict) and chosen):
            raise UserError(f"{group}: choose of those in conf/{group}, {group}=NAME (got {chosen!r})")
    for name, value in flat(values, lists=True).items():
        if not name.isprintable():
            raise UserError(f"{name!r}: an option's name holds characters that cannot be printed")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: give a finite number (got {value})")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{name} is empty: give a value, or null for none")
        if isinstance(value, str) and not value.isprintable():
            raise UserError(f"{name}: holds characters that cannot be printed (got {value!r})")
        if isinstance(value, str) and (why := secret(value)):
            raise UserError(f"{name} {why}")
        if value is not None and not isinstance(value, bool | int | float | str):
            raise UserError(f"{name}: give a number, a text, true, false or null (got a {type(value).__name__})")


def secret(text: str) -> str | None:
    """Return what is wrong with a text that holds the W&B key or the password of a URL; ``None`` for any other."""
    key = os.environ.get("WANDB_API_KEY")
    if key and key in text:
        return "holds the W&B key, which would be written to files: the environment has it"
    if re.search(r"://[^/@\s:]*:[^/@\s]+@", text):
        return "holds a password, which would be written to files: leave it to the database's own, as ~/.pgpass"
    return None


def flat(config: Mapping[Any, Any], prefix: str = "", *, lists: bool = False) -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names; with ``lists``, also those of lists."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if lists and isinstance(value, list):
            value = dict(enumerate(value))
        name = f"{prefix}{key}"
        leaves |= flat(value, f"{name}.", lists=lists) if isinstance(value, Mapping) else {name: value}
    return leaves


def build(
    cfg: DictConfig, group: str, kind: type = object, *, optional: bool = False, partial: bool = False, **arguments: Any
) -> Any:
    """Return the object that a config group describes.

    Args:
        cfg: the whole config.
        group: one of its top-level keys.
        kind: what the object has to be.
        optional: return ``None`` for an empty group; otherwise that is an error.
        partial: return what makes the object from the arguments that are missing.
        arguments: further arguments of the group's ``_target_``.

    Raises:
        UserError: if the object cannot be made; the message names the option.
    """
    if optional and (not cfg.get(group) or _chosen_none(cfg, group)):
        return None
    if not cfg.get(group):
        raise UserError(f"{group} is empty: choose one, {group}=NAME, of those in conf/{group}")
    return _make(cfg[group], group, kind, partial=partial, **arguments)


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


def _make(described: DictConfig, group: str, kind: type, *, partial: bool = False, **arguments: Any) -> Any:
    # Not at the top: describe() serves the library, which works without Hydra.
    from hydra.errors import HydraException
    from hydra.utils import instantiate

    _check_target(described, group, kind)
    arguments |= {"_partial_": True} if partial else {}
    try:
        made = instantiate(described, _convert_="all", **arguments)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        within = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)  # a part that is made for another
        raise UserError(describe(cause or error, within[1] if within else group)) from error
    if not isinstance(made, functools.partial if partial else kind):
        raise UserError(f"{group}._target_={described.get('_target_')} makes no {kind.__name__}")
    return made


def without_none(cfg: DictConfig, groups: Iterable[str]) -> DictConfig:
    """Return the config, or a copy of it, with ``None`` for the groups whose choice is ``none``.

    This drops the options that an experiment has set there for another choice.
    """
    if none := [group for group in groups if _chosen_none(cfg, group)]:
        cfg = cfg.copy()
        with open_dict(cfg):
            for group in none:
                cfg[group] = None
    return cfg


def _chosen_none(cfg: DictConfig, group: str) -> bool:
    chosen = cfg.get(group)
    return isinstance(chosen, DictConfig) and "_target_" in chosen and chosen._target_ is None


def _check_target(described: Any, name: str, kind: type) -> None:
    """Raise a UserError unless a config's ``_target_``, and each one inside it, may be called.

    It must be a class of the wanted kind, or a function annotated to return one: a config cannot run other functions.
    """
    if not isinstance(described, DictConfig) or not isinstance(target := described.get("_target_"), str):
        raise UserError(f"{name}: names no class: give it a _target_")
    try:
        called = pkgutil.resolve_name(target)
    except Exception as error:  # an import can fail in any way
        raise UserError(f"{name}._target_={target}: {describe(error)}") from error
    parameters, returned = _signature(called)
    if not inspect.isclass(returned) or not issubclass(returned, kind) or _standard(called):
        of = "class" if kind is object else kind.__name__
        raise UserError(
            f"{name}._target_={target} is no {of}, nor a function that is annotated to return one (def f() -> {of})"
        )
    for key, value in zip(map(str, described), described.values(), strict=True):
        if key.startswith("_") and key not in ("_target_", "_partial_"):
            raise UserError(f"{name}.{key}: give arguments by their names")
        if key == "_partial_" and not isinstance(value, bool):
            raise UserError(f"{name}._partial_: give true or false (got {value!r})")
        _check_nested(value, f"{name}.{key}")
        if key in parameters and not (isinstance(value, DictConfig) and "_target_" in value):
            _check_type(_plain_value(value), parameters[key], f"{name}.{key}")


def _plain_value(value: Any, *, complete: bool = False) -> Any:
    return (
        OmegaConf.to_container(value, resolve=True, throw_on_missing=complete) if OmegaConf.is_config(value) else value
    )


def _check_nested(value: Any, name: str) -> None:
    if isinstance(value, ListConfig):
        for number, item in enumerate(value):
            _check_nested(item, f"{name}.{number}")
    elif isinstance(value, DictConfig) and "_target_" in value:
        _check_target(value, name, object)
    elif isinstance(value, DictConfig):
        for key in map(str, value):
            _check_nested(value[key], f"{name}.{key}")


def _signature(called: Any) -> tuple[dict[str, Any], Any]:
    """Return the types of the arguments, where they are known, and what is returned."""
    call = called.__init__ if inspect.isclass(called) else called
    try:
        types = get_type_hints(call)
    except Exception:  # annotations of another package that cannot be evaluated
        types = {}
    returned = types.pop("return", None)
    return types, called if inspect.isclass(called) else returned


def _standard(called: Any) -> bool:
    return str(getattr(called, "__module__", "builtins")).partition(".")[0] in sys.stdlib_module_names


def _check_type(value: Any, wanted: Any, name: str) -> None:
    """Raise a UserError unless a value has the type that is asked for, strictly: no ``true`` for 1."""
    try:
        adapter = TypeAdapter(wanted, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError):
        return  # a type that pydantic does not know
    for given in (value, tuple(value)) if isinstance(value, list) else (value,):  # YAML has no tuples
        try:
            adapter.validate_python(given)
            return
        except ValidationError as error:
            message = "; or ".join(dict.fromkeys(details["msg"].lower() for details in error.errors()))
    raise UserError(f"{name}: {message} (got {value!r})")


def read_options(model: type[Options], values: Mapping[str, Any]) -> Options:
    """Return a config's own options, checked.

    Raises:
        UserError: if one is of the wrong type or out of range.
    """
    try:
        return model.model_validate({name: _plain_value(values.get(name)) for name in model.model_fields})
    except ValidationError as error:
        raise UserError(describe(error)) from error

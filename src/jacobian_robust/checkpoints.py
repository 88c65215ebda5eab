"""Reading checkpoints, this project's and others', without running anything that is in them."""

import contextlib
import copy
import hashlib
import inspect
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from torch import Tensor, nn

from jacobian_robust import data, models, penalties, task_data
from jacobian_robust.data import ImageDataModule
from jacobian_robust.errors import UserError, describe
from jacobian_robust.geometry import families
from jacobian_robust.geometry.families import CATEGORICAL, Family
from jacobian_robust.penalties import Bound, Penalty, note_condition

__all__ = ["SUFFIXES", "Checkpoint", "export", "find_checkpoints", "load_checkpoint"]

_PREFIX = "model."
_DAMAGED = (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError)
"""What the readers raise at a damaged file."""

_METADATA = "jacobian_robust"
_REQUIRED = ("config", "epochs", "rows", "wandb")
_ADDED = ("condition_eps", "condition_bound")
"""What files of older versions lack."""

_WRAPPERS = ("module.", "model.", "_orig_mod.")
"""What DataParallel, a LightningModule and torch.compile put before the names of all weights."""

_MOVED = {
    "jacobian_robust.regularizers": "jacobian_robust.penalties",
    "jacobian_robust.constraints": "jacobian_robust.penalties",
}
"""Modules that checkpoints of older versions name."""

_WEIGHTS = ("state_dict", "model_state_dict", "model", "net")
"""Where others keep the weights in a dictionary."""

SUFFIXES = (".ckpt", ".safetensors")
"""Of this project's checkpoints and exports: what is looked for in a directory."""


class _Known(BaseModel):
    """What this project writes beside the weights, checked before anything is made of it."""

    model_config = ConfigDict(strict=True)

    config: dict[str, JsonValue]
    epochs: int | None = Field(ge=0)
    rows: list[dict[str, float | int]]
    wandb: str | None = Field(pattern=r"^[\w.-]+(/[\w.-]+){0,2}$")
    condition_eps: float | None = Field(None, gt=0, allow_inf_nan=False)
    condition_bound: Bound | None = None

    @field_validator("config")
    @classmethod
    def _shaped(cls, config: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if not isinstance(config.get("seed", 0), int):
            raise ValueError("its seed is no integer")
        for group in ("model", "data", "regularizer"):
            if not isinstance(config.get(group), dict | None):
                raise ValueError(f"its {group} is no mapping")
        return config


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of a classifier.

    Attributes:
        path: the file; ``None`` for a model that was named without one.
        sha256: its hash, in hexadecimal.
        config: the configuration it was trained with; empty for a file that is not of this project.
        state_dict: the classifier's parameters and buffers.
        epochs: finished epochs, where known.
        rows: the rows of ``metrics.csv`` so far.
        wandb: the W&B run that trained it, ``project/id``, where known.
        condition_eps: the ε of eq. 14 whose satisfaction ``rows`` records, where known.
        condition_bound: the distance of that condition.
        program: the classifier itself, of a file that holds it whole.
    """

    path: Path | None
    sha256: str | None
    config: dict[str, Any] = field(default_factory=dict)
    state_dict: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    rows: list[dict[str, float | int]] = field(default_factory=list)
    wandb: str | None = None
    condition_eps: float | None = None
    condition_bound: Bound | None = None
    program: nn.Module | None = None

    @property
    def brings_model(self) -> bool:
        """Whether the file itself says what the classifier is: holds it, or names one of :mod:`jacobian_robust.models`.

        One that was trained as a class of somebody's own does not: a file must not choose it.
        """
        return self.program is not None or self._names("model", models.__name__)

    @property
    def brings_data(self) -> bool:
        """Whether the file names data of this project."""
        return self._names("data", data.__name__) or self._names("data", task_data.__name__)

    def _names(self, group: str, module: str) -> bool:
        return str((self.config.get(group) or {}).get("_target_")).startswith(f"{module}.")

    def model(self, model: nn.Module | None = None) -> nn.Module:
        """Return the classifier with the checkpoint's weights, in evaluation mode.

        Args:
            model: a classifier to load the weights into a copy of, instead of the one that the checkpoint names; as
                it is where there is no file.

        Raises:
            UserError: if the checkpoint names a class outside :mod:`jacobian_robust.models`, which a file must not
                choose, if it names none, or if its weights do not fit.
        """
        if self.program is not None:
            return self.program
        if model is None and not self.config:
            raise UserError(
                f"checkpoint {self.path} holds weights alone: name the classifier they belong to, as model=NAME or "
                "+model._target_=PACKAGE.CLASS"
            )
        if model is None:
            model = _make(self, "model", models, nn.Module)
        else:
            with contextlib.suppress(Exception):  # some cannot be copied, as under torch's older weight_norm
                model = copy.deepcopy(model)
        if self.path is None:
            return model.eval()
        try:
            model.load_state_dict(_renamed(self.state_dict, model.state_dict()))
        except RuntimeError as error:
            other = f"of another architecture than the model, {type(model).__name__}"
            raise UserError(f"checkpoint {self.path} is {other}: {describe(error)}") from error
        models.compute_orthonormal_weights_once(model)
        return model.eval()

    def datamodule(self) -> ImageDataModule:
        """Return the data that the model was trained on.

        Raises:
            UserError: if the checkpoint names none, or a class outside :mod:`jacobian_robust.data`.
        """
        if not self.config:
            raise UserError("data=NAME is missing: the model does not say what to evaluate it on; choose data=mnist")
        named = str((self.config.get("data") or {}).get("_target_"))
        home = task_data if named.startswith(f"{task_data.__name__}.") else data
        datamodule: ImageDataModule = _make(self, "data", home, ImageDataModule)
        datamodule.fetches = False  # to a place of the file's choice
        return datamodule

    def family(self) -> Family:
        """Return the family of the model's task: the categorical one where the file says nothing else.

        Raises:
            UserError: if the file names a class outside :mod:`jacobian_robust.geometry.families`.
        """
        if not self.config.get("task"):
            return CATEGORICAL
        family: Family = _make(self, "task", families, Family)
        return family

    def penalty(self) -> Penalty | None:
        """Return the penalty that the model was trained with, if it was trained with one.

        Raises:
            UserError: if the checkpoint does not say, or names a class outside :mod:`jacobian_robust.penalties`.
        """
        if "regularizer" not in self.config:
            raise UserError(f"checkpoint {self.path} does not say which penalty the model was trained with")
        if not self.config["regularizer"]:
            return None
        penalty: Penalty = _make(self, "regularizer", penalties, Penalty)
        return penalty

    def condition(self, classes: int) -> tuple[float, Bound]:
        """Return the ε and the bound of eq. 14 whose satisfaction the training recorded.

        Of a checkpoint that does not hold them, those of its penalty, or the note's without one; an undefended twin of
        such an age was measured with its pair's.

        Args:
            classes: the number of classes.

        Raises:
            UserError: if the checkpoint says neither.
        """
        if self.condition_eps is not None and self.condition_bound is not None:
            return self.condition_eps, self.condition_bound
        penalty = self.penalty()
        condition = penalty.condition(classes) if penalty is not None else None
        return condition or note_condition(classes)


def _renamed(weights: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Return weights under a model's own names, where both differ by the prefixes of usual wrappers alone."""
    bare = dict(zip(_bare(own), own, strict=True))
    theirs = dict(zip(_bare(weights), weights.values(), strict=True))
    return {bare[name]: value for name, value in theirs.items()} if bare.keys() == theirs.keys() else dict(weights)


def _bare(names: Iterable[str]) -> list[str]:
    names = list(names)
    while prefix := next((p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return names


def _make(checkpoint: Checkpoint, group: str, module: ModuleType, base: type) -> Any:
    """Call a class of ``module`` that the checkpoint names, with the plain arguments it gives."""
    arguments = dict(checkpoint.config.get(group) or {})
    target = str(arguments.pop("_target_", ""))
    home, _, name = target.rpartition(".")
    home = _MOVED.get(home, home)
    cls = getattr(module, name, None)
    if home != module.__name__ or not (inspect.isclass(cls) and issubclass(cls, base)):
        raise UserError(
            f"checkpoint {checkpoint.path} asks for {group} {target!r}, which is no class of {module.__name__} and is "
            f"not run on a file's word; if you trust it, name it yourself: {group}=…"
        )
    try:
        return cls(**arguments)
    except Exception as error:  # a file can ask for more memory than there is
        raise UserError(f"checkpoint {checkpoint.path}: {describe(error, group)}") from error


def load_checkpoint(path: str | Path, *, trust: bool = False) -> Checkpoint:
    """Return what a file says of a classifier; only tensors and plain containers are read, no Python code.

    It is a checkpoint or an export of this project; or somebody else's: tensors by name (torch.save, safetensors); or,
    with ``trust``, a program of TorchScript or ``torch.export`` or a pickled module.

    Args:
        path: the file.
        trust: also read files whose reading can run any code that is in them.

    Raises:
        UserError: if the file is missing, damaged, of none of these kinds, or needs trust.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if path.suffix == ".safetensors":
        return _read_safetensors(path, content, sha256)
    members = _members(content)
    if any(name.endswith("/archive_format") for name in members):
        _needs_trust(path, "a program of torch.export", trust)
        return _program(path, sha256, lambda: _Exported(torch.export.load(io.BytesIO(content)).module()))
    if any(name.endswith("/constants.pkl") for name in members):
        _needs_trust(path, "a TorchScript program", trust)  # whose operators can write files
        return _program(path, sha256, lambda: torch.jit.load(io.BytesIO(content), map_location="cpu").eval())
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in any way
        if trust:
            return _unpickled(path, sha256, content)
        raise UserError(
            f"checkpoint {path} cannot be read as tensors and plain values: it is damaged, not a checkpoint, or a "
            f"pickle that could run code ({type(error).__name__}); trust=true reads it all the same, only do that if "
            "you know where it is from"
        ) from error
    return _read_stored(path, sha256, stored)


def _members(content: bytes) -> list[str]:
    try:
        return zipfile.ZipFile(io.BytesIO(content)).namelist()
    except zipfile.BadZipFile:
        return []


def _needs_trust(path: Path, what: str, trust: bool) -> None:
    if not trust:
        raise UserError(
            f"checkpoint {path} is {what}, which could do anything when it is read or run: trust=true if you know "
            "where it is from"
        )


def _program(path: Path, sha256: str, read: Callable[[], nn.Module]) -> Checkpoint:
    try:
        program = read()
    except UserError:
        raise
    except Exception as error:  # its reader can fail in any way
        raise UserError(f"checkpoint {path} cannot be read: {describe(error)}") from error
    return Checkpoint(path, sha256, program=program)


def _unpickled(path: Path, sha256: str, content: bytes) -> Checkpoint:
    """Return what a pickle holds: a classifier, or weights beside anything else."""
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except Exception as unreadable:  # its reader can fail in any way
        raise UserError(f"checkpoint {path} cannot be read: {describe(unreadable)}") from unreadable
    if isinstance(stored, nn.Module):
        return Checkpoint(path, sha256, program=stored.eval())
    if isinstance(stored, dict):
        return _read_stored(path, sha256, stored)
    raise UserError(f"checkpoint {path}: the pickle holds a {type(stored).__name__}, not a classifier")


class _Exported(nn.Module):
    """A program of ``torch.export``, which cannot change its mode."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.training = False

    def train(self, mode: bool = True) -> "_Exported":
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.program(images)
        return logits


def _read_stored(path: Path, sha256: str, stored: Any) -> Checkpoint:
    if isinstance(stored, dict) and _METADATA not in stored:
        found = next((stored[key] for key in _WEIGHTS if isinstance(stored.get(key), dict)), stored)
        if found and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
            return Checkpoint(path, sha256, state_dict=dict(found))
    try:
        config = stored[_METADATA]["config"]
        weights = stored["state_dict"]
        rows = stored["callbacks"]["EpochRecord"]["rows"]
        epochs = stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        state_dict = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
        condition = stored["callbacks"].get("JacobianMonitor") or {}
        condition = {"condition_eps": condition.get("eps"), "condition_bound": condition.get("bound")}
        if not isinstance(config, dict) or not isinstance(epochs, int):
            raise TypeError("a configuration")
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"checkpoint {path} was not written by jacobian_robust's train.py, and is no dictionary of tensors: it "
            f"lacks {error}"
        ) from error
    known = {"config": config, "epochs": epochs, "rows": rows, "wandb": stored[_METADATA].get("wandb"), **condition}
    return Checkpoint(path, sha256, state_dict=state_dict, **_known(path, known))


def _known(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says beside the weights.

    Raises:
        UserError: if it is not what this project writes.
    """
    try:
        return _Known.model_validate(stored).model_dump()
    except ValidationError as error:
        raise UserError(
            f"checkpoint {path} was changed, or not written by jacobian_robust: {describe(error)}"
        ) from error


def _read_safetensors(path: Path, content: bytes, sha256: str) -> Checkpoint:
    try:
        state_dict = safetensors.torch.load(content)
        with safetensors.safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
        stored = json.loads(metadata) if metadata else {}
        known = {key: stored[key] for key in _REQUIRED} | {key: stored.get(key) for key in _ADDED} if metadata else {}
        state_dict |= {name: _unpacked(state_dict[name]) for name in stored.get("extra", ())}
    except (*_DAMAGED, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} is damaged, or no safetensors file: {describe(error)}") from error
    return Checkpoint(path, sha256, state_dict=state_dict, **(_known(path, known) if known else {}))


def export(checkpoint: Checkpoint, path: Path) -> None:
    """Write the classifier of one of this project's checkpoints alone, as safetensors: enough to evaluate it.

    Args:
        checkpoint: as read from a file.
        path: the new file; it takes the place of an old one at once.
    """
    known = {key: getattr(checkpoint, key) for key in (*_REQUIRED, *_ADDED)}
    # Apart, though two names may share one tensor; and what is none, a layer's extra state, as the bytes of a file.
    weights = {
        name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else _packed(value)
        for name, value in checkpoint.state_dict.items()
    }
    known["extra"] = [name for name, value in checkpoint.state_dict.items() if not isinstance(value, Tensor)]
    if not known["extra"]:
        del known["extra"]
    scratch = path.with_name(f".{path.name}.part")
    safetensors.torch.save_file(weights, scratch, {_METADATA: json.dumps(known)})
    scratch.chmod(0o644)
    scratch.replace(path)


def _packed(value: Any) -> Tensor:
    stored = io.BytesIO()
    torch.save(value, stored)
    return torch.frombuffer(bytearray(stored.getvalue()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)


def find_checkpoints(places: Sequence[str | Path]) -> list[Path]:
    """Return the checkpoint files that files, run directories or directories of runs stand for.

    A run directory stands for its ``checkpoints/last.ckpt``; any other directory for every ``last.ckpt`` below it, and
    where there is none, for every ``.ckpt`` and ``.safetensors`` file.

    Raises:
        UserError: if nothing was named, or one of the places does not exist or holds no checkpoint.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"checkpoint={place}: no such file or directory")
        if place.is_file():
            candidates = [place]
        elif (place / "checkpoints" / "last.ckpt").is_file():
            candidates = [place / "checkpoints" / "last.ckpt"]
        else:
            below = list(place.rglob("last.ckpt")) or [
                path for suffix in SUFFIXES for path in place.rglob(f"*{suffix}")
            ]
            # The undefended network first: what the others cost is said beside it.
            candidates = sorted(below, key=lambda path: ("vanilla" not in path.with_suffix("").parts, path))
        if not candidates:
            raise UserError(f"checkpoint={place}: no .ckpt or .safetensors file in this directory or below it")
        found += candidates
    if not found:
        raise UserError("checkpoint=RUN_OR_FILE is missing: name a run directory, a .ckpt file, or a list of them")
    return list({path.resolve(): path for path in found}.values())

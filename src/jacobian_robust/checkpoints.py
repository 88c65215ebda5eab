"""Reading checkpoints without running anything that is in them."""

import copy
import hashlib
import inspect
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from jacobian_robust import data, models
from jacobian_robust.config import describe
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.errors import UserError

__all__ = ["Checkpoint", "find_checkpoints", "load_checkpoint"]

_PREFIX = "model."


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint of this project says.

    Attributes:
        path: the file.
        sha256: its hash, in hexadecimal.
        config: the configuration it was trained with.
        state_dict: the classifier's parameters and buffers.
        epochs: finished epochs.
        rows: the rows of ``metrics.csv`` so far.
    """

    path: Path
    sha256: str
    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    epochs: int
    rows: list[dict[str, float | int]]

    def model(self, model: nn.Module | None = None) -> nn.Module:
        """Return the classifier with the checkpoint's weights, in evaluation mode.

        Args:
            model: a classifier to load the weights into a copy of, instead of the one that the checkpoint names.

        Raises:
            UserError: if the checkpoint names a class outside :mod:`jacobian_robust.models`, which a file must not
                choose, or its weights do not fit.
        """
        model = _make(self, "model", models, nn.Module) if model is None else copy.deepcopy(model)
        try:
            model.load_state_dict(self.state_dict)
        except RuntimeError as error:
            raise UserError(
                f"checkpoint {self.path} is of another architecture than {type(model).__name__}: {describe(error)}"
            ) from error
        return model.eval()

    def datamodule(self) -> MNISTDataModule:
        """Return the data that the model was trained on.

        Raises:
            UserError: if the checkpoint names a class outside :mod:`jacobian_robust.data`.
        """
        datamodule: MNISTDataModule = _make(self, "data", data, MNISTDataModule)
        return datamodule


def _make(checkpoint: Checkpoint, group: str, module: ModuleType, base: type) -> Any:
    """Call a class of ``module`` that the checkpoint names, with the plain arguments it gives."""
    arguments = dict(checkpoint.config.get(group) or {})
    target = str(arguments.pop("_target_", ""))
    home, _, name = target.rpartition(".")
    cls = getattr(module, name, None)
    if home != module.__name__ or not (inspect.isclass(cls) and issubclass(cls, base)):
        raise UserError(
            f"checkpoint {checkpoint.path} asks for {group} {target!r}, which is no class of {module.__name__} and is "
            f"not run on a file's word; if you trust it, name it yourself: {group}=…"
        )
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint.path}: {describe(error, group)}") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint; only tensors and plain containers are read, no code.

    Raises:
        UserError: if the file is missing, damaged, or was not written by this project.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} does not exist") from error
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise UserError(
            f"checkpoint {path} cannot be read as tensors and plain values: it is damaged, or not a checkpoint of "
            f"jacobian_robust ({type(error).__name__})"
        ) from error
    try:
        config = stored["jacobian_robust"]["config"]
        weights = stored["state_dict"]
        rows = stored["callbacks"]["EpochRecord"]["rows"]
        epochs = stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        state_dict = {name.removeprefix(_PREFIX): value for name, value in weights.items() if name.startswith(_PREFIX)}
        if not isinstance(config, dict) or not isinstance(epochs, int):
            raise TypeError("a configuration")
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"checkpoint {path} was not written by jacobian_robust's train.py: it lacks {error}") from error
    return Checkpoint(path, hashlib.sha256(content).hexdigest(), config, state_dict, epochs, rows)


def find_checkpoints(places: Sequence[str | Path]) -> list[Path]:
    """Return the checkpoint files that files, run directories or directories of runs stand for.

    A run directory stands for its ``checkpoints/last.ckpt``; any other directory for every ``last.ckpt`` below it, and
    where there is none, for every ``.ckpt`` file.

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
            candidates = sorted(place.rglob("last.ckpt")) or sorted(place.rglob("*.ckpt"))
        if not candidates:
            raise UserError(f"checkpoint={place}: no .ckpt file in this directory or below it")
        found += candidates
    if not found:
        raise UserError("checkpoint=RUN_OR_FILE is missing: name a run directory, a .ckpt file, or a list of them")
    return list({path.resolve(): path for path in found}.values())

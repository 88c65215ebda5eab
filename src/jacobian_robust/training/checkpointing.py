"""Checkpoints of a running training: written whole or not at all, two of them, and enough to go on bit for bit."""

import contextlib
import os
import random
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from rich.console import Console

from jacobian_robust.errors import Terminated, UserError
from jacobian_robust.loading import ResumableLoader
from jacobian_robust.training.distributed import any_process, gathered
from jacobian_robust.training.options import Intervals

__all__ = ["Intervals", "RunCheckpoint", "newest_checkpoint"]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in a run's ``checkpoints`` directory, if there is one.

    A damaged one, as a failing disk leaves it, is named on the console, and set aside.
    """
    for path in (directory / LAST, directory / PREVIOUS):
        if not path.is_file():
            continue
        with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # its checksums are those of what it holds
                return path
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        Console().print(f"{path} is damaged: it is now {aside.name}, and the one before is tried", soft_wrap=True)
    return None


class RunCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` at intervals and at the end of each epoch, and keeps the one before as ``previous.ckpt``.

    The file is written beside the old one and renamed, so that a run that is killed at any moment leaves a whole one.
    A run that is asked to terminate (SIGTERM) writes another after the current step and ends.

    Python's, NumPy's and torch's random streams travel with it: what a model draws, as for dropout, goes on too. Of
    several processes the first one writes, with the streams of all.

    Args:
        directory: the run's ``checkpoints`` directory.
        intervals: how often.

    Raises:
        UserError: if a checkpoint cannot be written; those that were are left as they are.
        Terminated: after the checkpoint that SIGTERM asked for.
    """

    def __init__(self, directory: Path, intervals: Intervals) -> None:
        self.directory = directory
        self.intervals = intervals
        self._asked = False
        self._written_at = 0.0
        self._step = 0
        self._streams: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the random streams, as tensors and plain values."""
        version, words, gauss = random.getstate()
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002 (the global stream is what others may draw from)
        assert isinstance(numpy, dict)
        first, *others = gathered(
            {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "python": [version, list(words), gauss],
                "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
            }
        )
        return first | {"other_processes": others}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the training begins: its preparations draw too."""
        self._streams = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and go on with the random streams of a resumed run."""
        self._written_at, self._step = time.monotonic(), trainer.global_step
        if trainer.world_size > 1:
            # Lightning answers it by a broadcast from within the handler, which is lost among those of a step.
            signal.signal(signal.SIGTERM, self._ask)
        if self._streams is None:
            return
        saved = [self._streams, *self._streams.get("other_processes", [])]
        if trainer.global_rank >= len(saved):  # it is resumed on more devices
            return
        streams = saved[trainer.global_rank]
        torch.set_rng_state(streams["torch"].cpu())
        if len(streams["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in streams["cuda"]])
        version, words, gauss = streams["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(streams["numpy"])  # noqa: NPY002

    def _ask(self, *_: object) -> None:
        self._asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write a checkpoint if one is due, and end a run that was asked to."""
        if trainer.global_step == self._step:  # gradients are being accumulated: they are in no checkpoint
            return
        self._step = trainer.global_step
        if trainer.is_last_batch:  # the end of the epoch, which follows, writes one
            return
        every_steps, every_seconds = self.intervals.every_steps, self.intervals.every_seconds
        by_steps = every_steps is not None and self._step % every_steps == 0
        by_time = every_seconds is not None and time.monotonic() - self._written_at >= every_seconds
        # Clocks and signals differ: what one process wants to write or to end for, all do.
        due, asked = self._agreed(trainer, by_steps or by_time)
        if due or asked:
            self.write(trainer)
        if asked:
            raise Terminated

    def _agreed(self, trainer: pl.Trainer, due: bool = False) -> tuple[bool, ...]:
        """Return whether a checkpoint is due, and whether the run is asked to end, for all processes alike."""
        asked = trainer.received_sigterm or self._asked
        return any_process(due, asked, device=trainer.strategy.root_device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a checkpoint, and end a run that was asked to."""
        if isinstance(trainer.train_dataloader, ResumableLoader):
            trainer.train_dataloader.end_epoch()
        _, asked = self._agreed(trainer)
        self.write(trainer)
        if asked:
            raise Terminated

    def write(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt``; the old one becomes ``previous.ckpt``."""
        last, previous = self.directory / LAST, self.directory / PREVIOUS
        scratch = self.directory / f".{LAST}.part"
        try:
            if trainer.is_global_zero:
                self.directory.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(scratch)
            if trainer.is_global_zero:
                with scratch.open("rb") as file:
                    os.fsync(file.fileno())
                if last.exists():
                    last.replace(previous)
                scratch.replace(last)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise UserError(
                f"the checkpoint of step {trainer.global_step} cannot be written to {self.directory} ({error}); "
                "earlier ones are left as they are: make room, and go on with resume=true"
            ) from error
        self._written_at = time.monotonic()

"""The progress bar of a training."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm import tqdm

from jacobian_robust.training.module import RobustClassifier


class TrainingProgress(TQDMProgressBar):
    """Lightning's progress bar: the epoch's means so far, and the time left to the end of the training."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=50)
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        assert isinstance(pl_module, RobustClassifier)
        metrics |= {
            name: f"{value:.3f}" for name, value in pl_module.means("train").items() if name in ("loss", "accuracy")
        }
        done = trainer.global_step - self._first_step
        if done:
            left = (trainer.estimated_stepping_batches - trainer.global_step) / done
            metrics["all_done_in"] = tqdm.format_interval(int(left * (time.monotonic() - self._started)))
        return metrics

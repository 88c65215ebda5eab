"""Lightning's view of the data."""

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from jacobian_robust.data import ImageDataModule, ImageDataset

__all__ = ["LightningImages"]


class LightningImages(pl.LightningDataModule):
    """Hands the images of a datamodule to a Trainer: to its device, and to each process its share.

    Args:
        data: what is trained on.
    """

    def __init__(self, data: ImageDataModule) -> None:
        super().__init__()
        self.data = data

    @property
    def validation_name(self) -> Literal["validation", "test"]:
        """What the per-epoch validation curves are measured on."""
        return self.data.validation_name

    def split(self, name: Literal["train", "validation", "test"]) -> ImageDataset:
        """Return a split in memory; :meth:`setup` has been called."""
        return self.data.split(name)

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs and move it to the training device."""
        self.data.setup(stage)
        if self.trainer is not None:
            self.data.to(self.trainer.strategy.root_device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Return images and labels on a device; they usually are there already."""
        inputs, labels = batch
        return inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this process's training batches."""
        return self.data.train_dataloader(*self._process())

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return this process's validation batches."""
        return self.data.val_dataloader(*self._process())

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

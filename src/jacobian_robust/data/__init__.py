"""Datamodules: images handed out in batches as float32 pixels in [0, 1]. Checkpoints carry these names."""

from jacobian_robust.data.augmentation import Augmentation
from jacobian_robust.data.base import ImageDataModule, ImageDataset
from jacobian_robust.data.downloaded import CIFAR10DataModule, FashionMNISTDataModule, MNISTDataModule
from jacobian_robust.data.folder import ImageFolderDataModule
from jacobian_robust.data.tabular import TabularDataModule
from jacobian_robust.data.tensors import TensorsDataModule
from jacobian_robust.data.toy import ToyDataModule

__all__ = [
    "Augmentation",
    "CIFAR10DataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "TabularDataModule",
    "TensorsDataModule",
    "ToyDataModule",
]

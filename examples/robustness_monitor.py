"""The robust accuracy of any LightningModule after each epoch, logged as robust_accuracy."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from jacobian_robust.lightning import RobustnessMonitor


class Classifier(pl.LightningModule):
    """Your module: its forward takes pixels in [0, 1] and returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on the images as they are."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.2)


pl.seed_everything(0, verbose=False)
labels = torch.arange(600) % 2
images = 0.8 * torch.rand(600, 1, 8, 8)
images[labels == 1, :, :4] += 0.2  # brighter above
data = TensorDataset(images, labels)
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    callbacks=[RobustnessMonitor(eps=0.01, images=100)],
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
)
training, validation = torch.utils.data.random_split(data, [500, 100])
trainer.fit(Classifier(), DataLoader(training, batch_size=50), DataLoader(validation, batch_size=50))
print({name: round(float(trainer.callback_metrics[name]), 2) for name in ("accuracy", "robust_accuracy")})

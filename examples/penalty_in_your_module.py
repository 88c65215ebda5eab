"""A penalty in a LightningModule whose training_step you do not touch."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from jacobian_robust.lightning import JacobianPenalty
from jacobian_robust.penalties import LinearMargin


class Classifier(pl.LightningModule):
    """Your module: it knows nothing of the penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


pl.seed_everything(0, verbose=False)
labels = torch.arange(512) % 2
images = 0.8 * torch.rand(512, 1, 8, 8)
images[labels == 1, :, :4] += 0.2  # brighter above
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    callbacks=[JacobianPenalty(LinearMargin(eps=0.05, norm="linf"), weight=1.0)],
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
)
trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), batch_size=64))
print(f"jacobian_penalty of the last step {float(trainer.callback_metrics['jacobian_penalty']):.3f}")

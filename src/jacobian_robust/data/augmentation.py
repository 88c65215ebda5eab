"""Random changes of the training images: crops and flips."""

import torch
from jaxtyping import Float
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from jacobian_robust.options import STRICT

__all__ = ["Augmentation"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Augmentation:
    """Crops and flips each image of a training batch at random.

    Args:
        padding: pixels of zeros around the image, from which a part of its size is cropped; 0 for no crop.
        flip: mirror every other image, left to right.
    """

    padding: int = Field(0, ge=0, le=256)
    flip: bool = False

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], seed: int
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the images, changed as the seed says, in the same shape; torch's global stream is left alone."""
        generator = torch.Generator().manual_seed(seed)
        batch, _, height, width = images.shape
        rows = torch.arange(height).expand(batch, -1)
        columns = torch.arange(width).expand(batch, -1)
        if self.flip:
            mirrored = torch.rand(batch, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        if self.padding:
            images = torch.nn.functional.pad(images, [self.padding] * 4)
            top, left = torch.randint(2 * self.padding + 1, (2, batch, 1), generator=generator)
            rows, columns = rows + top, columns + left
        of = torch.arange(batch, device=images.device)[:, None, None]
        rows, columns = (index.to(images.device) for index in (rows, columns))
        return images[of, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

"""The gallery of a report: some images of each outcome, small enough for one file."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from jacobian_robust.reporting.figures import NORMS, SYMBOLS
from jacobian_robust.robustness.examples import Examples
from jacobian_robust.robustness.results import Details

__all__ = ["Tile", "tiles_of"]

SIDE = 64
"""Pixels of a picture's longer side at most: a larger one is scaled down."""

MOST = 400
"""Tiles of a report at most."""


@dataclass(frozen=True)
class Tile:
    """An image of the gallery.

    Attributes:
        model: that classified it.
        label: what its true class is called.
        outcome: in words.
        pictures: PNG files in base64, the clean image first, then the attacked one if there is one.
        said: what is predicted for each.
        number: of the image.
    """

    model: str
    label: str
    outcome: str
    pictures: list[str]
    said: list[str]
    number: int


def tiles_of(details: Sequence[Details]) -> list[Tile]:
    """Return some images of each model and outcome; none of points, or of another task than classification."""
    tiles = [tile for detail in details if detail.pictures and detail.said is None for tile in _tiles(detail)]
    step = -(-len(tiles) // MOST) or 1  # of too many every second, third, …
    return tiles[::step]


def _tiles(detail: Details) -> Iterator[Tile]:
    for number, swept in enumerate(detail.sweeps):
        seen: set[int] = set()
        for budget, examples in zip(swept.budgets, swept.examples, strict=True):
            for tile in _of(
                detail, examples, f"broken within {NORMS[swept.norm]} {SYMBOLS[swept.norm]} = {budget.eps:g}"
            ):
                if tile.number not in seen:  # a larger budget shows the smaller ones' examples where it has too few
                    seen.add(tile.number)
                    yield tile
        if swept.robust_examples is not None:
            yield from _of(detail, swept.robust_examples, f"robust in {NORMS[swept.norm]}")
        if swept.wrong_examples is not None and not number:
            yield from _of(detail, swept.wrong_examples, "wrong without an attack")


def _of(detail: Details, examples: Examples, outcome: str) -> Iterator[Tile]:
    if examples.index is None or examples.true_class is None:
        return
    attacked = outcome.startswith("broken")
    for i, number in enumerate(examples.index.tolist()):
        pictures = [examples.clean[i], *([examples.adversarial[i]] if attacked else [])]
        predicted = [
            (int(examples.clean_class[i]), float(examples.clean_confidence[i])),
            (int(examples.adversarial_class[i]), float(examples.adversarial_confidence[i])),
        ]
        yield Tile(
            model=detail.name,
            label=_called(detail, int(examples.true_class[i])),
            outcome=outcome,
            pictures=[_png(picture) for picture in pictures],
            said=[f"{_called(detail, label)}: {share:.0%}" for label, share in predicted[: len(pictures)]],
            number=number,
        )


def _called(detail: Details, label: int) -> str:
    return detail.class_names[label] if detail.class_names and label >= 0 else str(label)


def _png(image: Tensor) -> str:
    """Return an image ``(channels, height, width)`` as a PNG file in base64; of other than 1 or 3 channels the mean."""
    seen = image if len(image) in (1, 3) else image.mean(0, keepdim=True)
    pixels = (255 * seen.clamp(0, 1)).round().byte().cpu().movedim(0, -1).squeeze(-1).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()

"""Attacked images with what is predicted of them, for pictures, and the order in which they are chosen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from jacobian_robust.geometry.families import Categorical, Family

__all__ = ["Examples", "gather", "in_turn", "sample_order"]


@dataclass(frozen=True)
class Examples:
    """Images that an attack broke; or did not, and is ``adversarial`` then the clean ones.

    Attributes:
        clean: the images.
        adversarial: what broke them.
        clean_class: the classes predicted for the one.
        adversarial_class: and for the other.
        clean_confidence: the probability of the one's predicted class.
        adversarial_confidence: and of the other's.
        predicted: of another task than classification, whose classes are 0, right, and 1, wrong: the targets, and what
            is predicted for the clean images and for the others.
        true_class: the true classes, where they are known.
        index: the numbers of the images, where the classes are known.
    """

    clean: Float[Tensor, "examples *shape"]
    adversarial: Float[Tensor, "examples *shape"]
    clean_class: Int[Tensor, "examples"]
    adversarial_class: Int[Tensor, "examples"]
    clean_confidence: Float[Tensor, "examples"]
    adversarial_confidence: Float[Tensor, "examples"]
    predicted: tuple[Tensor, Tensor, Tensor] | None = None
    true_class: Int[Tensor, "examples"] | None = None
    index: Int[Tensor, "examples"] | None = None


def gather(
    model: nn.Module,
    images: Float[Tensor, "images *shape"],
    labels: Shaped[Tensor, "images *_"],
    predicted: Int[Tensor, "images"],
    family: Family,
    index: Int[Tensor, "examples"],
    adversarial: Float[Tensor, "examples *shape"],
    true_class: Int[Tensor, "images"] | None = None,
) -> Examples:
    """Return attacked images with what is predicted of them, and of the images ``index`` that they come from."""
    clean = images[index]
    if isinstance(family, Categorical):
        (before, _), (after, adversarial_class) = (_most_likely(model, x) for x in (clean, adversarial))
        found = Examples(clean, adversarial, predicted[index], adversarial_class, before, after)
        return found if true_class is None else replace(found, true_class=true_class[index], index=index)
    unknown = torch.full(index.shape, torch.nan, device=images.device)
    said: tuple[Tensor, Tensor, Tensor] | None = None
    if len(index):
        with torch.no_grad():
            said = (labels[index], family.predict(model(clean)), family.predict(model(adversarial)))
    return Examples(clean, adversarial, predicted[index], torch.ones_like(index), unknown, unknown, said)


def sample_order(labels: Int[Tensor, "images"], seed: int) -> Int[Tensor, "images"]:
    """Return the place of each image in a random order that takes the classes in turn.

    Args:
        labels: the classes.
        seed: of the order; torch's global random stream is left as it was.
    """
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(shuffled)
    for turn, label in enumerate(labels.unique()):
        of_class = shuffled[labels[shuffled] == label]
        place[of_class] = torch.arange(len(of_class)) * len(labels) + turn
    return place.argsort().argsort()


def in_turn(chosen: Sequence[int], *, order: Int[Tensor, "images"], labels: Int[Tensor, "images"]) -> list[int]:
    """Return the places of some images in their list so that their classes come in turn, each by an order.

    Of the images that an attack broke most may be of one class: an order of all images would show it again and again.

    Args:
        chosen: the numbers of these images.
        order: the place of each of all images in the order.
        labels: the classes of all images.
    """
    seen: Counter[int] = Counter()
    keys = []
    for place in sorted(range(len(chosen)), key=lambda place: int(order[chosen[place]])):
        label = int(labels[chosen[place]])
        keys.append((seen[label], label, place))
        seen[label] += 1
    return [place for *_, place in sorted(keys)]


def _most_likely(model: nn.Module, images: Float[Tensor, "n *shape"]) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Return the probability and the number of the predicted class."""
    if not len(images):
        return images.new_empty(0), images.new_empty(0, dtype=torch.long)
    with torch.no_grad():
        probability, predicted = model(images).softmax(-1).max(-1)
    return probability, predicted

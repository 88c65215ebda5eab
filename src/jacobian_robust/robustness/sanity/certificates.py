"""Each certificate is attacked: an image that is certified and broken shows that the certificate is wrong."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from jacobian_robust.attacks import FAB, Attack, distances
from jacobian_robust.geometry.families import Categorical
from jacobian_robust.robustness.budgets import attack_standing
from jacobian_robust.robustness.certificates import Certified
from jacobian_robust.robustness.sanity.base import Evaluated, Outcome

__all__ = ["certificate_check"]

NAMED = 10
"""Images that a sentence names at most."""


def certificate_check(evaluated: Evaluated, certified: Certified) -> Outcome:
    """Compare a certificate with the evaluation's attacks of all images and, on the sample, with attacks made for it.

    One image that is certified and broken is a failure.
    """
    name = certified.certificate.name
    if certified.certificate.smoothed:
        return "skip", (
            f"{name} certifies the smoothed classifier, not the network: an attack on the network does not break it"
        )
    images = int((certified.length >= 0).sum())
    if not images:
        return "skip", f"{name} certifies no image"
    broken = {*certified.broken(evaluated.result.smallest)}
    tried = f"{certified.pairs(evaluated.result)} pairs of a certified image and an attack of the evaluation"
    if anew := int((certified.length[: len(evaluated)] >= 0).sum()):
        broken |= {*certified.broken(_smallest_anew(evaluated, certified))}
        kinds = "PGD and FAB" if isinstance(evaluated.family, Categorical) else "PGD"
        tried += f", and {kinds} anew on {anew} images"
    if not broken:
        return "pass", f"none of the {images} certified images is broken ({tried})"
    named = ", ".join(map(str, sorted(broken)[:NAMED])) + (", …" if len(broken) > NAMED else "")
    return "fail", (
        f"{len(broken)} of the {images} certified images are broken within the certified length, so the certificate is "
        f"wrong: image {named} ({tried})"
    )


def _smallest_anew(evaluated: Evaluated, certified: Certified) -> Float[Tensor, "images"]:
    """Return by image the smallest change that PGD, at each certified budget, or, of classes, FAB found to break it."""
    sample = len(evaluated)
    longest = min(float(certified.length[:sample].max()), evaluated.images[0].numel() ** 0.5)  # no change is longer
    smallest = torch.full_like(evaluated.result.smallest, torch.inf)
    at = zip(certified.eps, certified.bounded.certified[:sample].unbind(-1), strict=True)
    tries: list[tuple[Attack, float, Tensor]] = [
        (replace(evaluated.white_box(eps, steps=40), loss="margin"), eps, chosen) for eps, chosen in at if eps > 0
    ]
    if isinstance(evaluated.family, Categorical):
        # a little beyond: the nearest example of an exact certificate lies on the border of its ball
        beyond = 1.01 * longest + 1e-6
        fab = FAB(name="fab", norm=evaluated.ball, eps=(beyond,), steps=20)
        tries.append((fab, beyond, certified.length[:sample] >= 0))
    for attack, eps, chosen in tries:
        for batch in attack_standing(
            *(evaluated.model, evaluated.images, evaluated.labels, chosen.clone(), attack, eps),
            seed=evaluated.seed,
            attackers=evaluated.attackers,
        ):
            found = batch.indices[batch.fallen]
            lengths = distances(evaluated.images[found], batch.adversarial[batch.fallen], evaluated.ball).clamp_max(eps)
            smallest[found] = torch.minimum(smallest[found], lengths)
    return smallest

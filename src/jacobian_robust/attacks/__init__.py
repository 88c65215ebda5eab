"""Attacks, from torchattacks and the reference AutoAttack, which are imported when an attack runs."""

from jacobian_robust.attacks.autoattack import AutoAttack
from jacobian_robust.attacks.base import Attack, Ball, Norm, check_pixels, distances
from jacobian_robust.attacks.noise import GaussianNoise, UniformNoise
from jacobian_robust.attacks.torchattacks import FAB, FGSM, PGD, SQUARES, DivergencePGD, Library, Square
from jacobian_robust.attacks.transfer import Transfer

__all__ = [
    "FAB",
    "FGSM",
    "PGD",
    "SQUARES",
    "Attack",
    "AutoAttack",
    "Ball",
    "DivergencePGD",
    "GaussianNoise",
    "Library",
    "Norm",
    "Square",
    "Transfer",
    "UniformNoise",
    "check_pixels",
    "distances",
]

"""Networks, inputs and norms that the tests of this folder share."""

import functools

import torch
from torch import nn

from jacobian_robust.jacobian import frobenius_norm, jacobian_norms, spectral_norm

NORMS = {
    "frobenius": frobenius_norm,
    "spectral": spectral_norm,
    "spectral to a tolerance": functools.partial(spectral_norm, columns=2, tolerance=1e-12),
    "both[0]": lambda logits, inputs: jacobian_norms(logits, inputs)[0],
    "both[1]": lambda logits, inputs: jacobian_norms(logits, inputs)[1],
}
ORDER = {"frobenius": "fro", "spectral": 2, "spectral to a tolerance": 2, "both[0]": "fro", "both[1]": 2}
SPECTRAL = [spectral_norm, NORMS["spectral to a tolerance"]]


def network(classes: int, seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), activation(), nn.Linear(16, classes)).double()


def random_inputs(seed: int, batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(norm, model, inputs, **kwargs):
    inputs = inputs.clone().requires_grad_()
    return norm(model(inputs), inputs, **kwargs)

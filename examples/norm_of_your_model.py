"""The Jacobian norm of your own classifier, and the radius that it guarantees to first order."""

import torch
from torch import nn

from jacobian_robust.geometry import distance_to_boundary
from jacobian_robust.jacobian import frobenius_norm

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))  # any network
images = torch.rand(8, 1, 28, 28).requires_grad_()  # before the forward pass

logits = model(images)
norms = frobenius_norm(logits, images, create_graph=False)  # exact; probes=3 for a cheap estimate
radii = distance_to_boundary(logits.softmax(-1)) / norms
for norm, radius in zip(norms.tolist(), radii.tolist(), strict=True):
    print(f"‖J_μ‖_F = {norm:.3f}, d/‖J_μ‖_F = {radius:.3f}")

"""``import jacobian_robust as jr``: what it offers, and what it does not load."""

import json
import subprocess
import sys

import pytest

import jacobian_robust as jr

FRAMEWORKS = ["hydra", "pytorch_lightning", "wandb", "torchattacks", "pyautoattack", "matplotlib"]


EVALUATE = """
import torch
from jacobian_robust.robustness.evaluate import evaluate_robustness
known()
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
evaluate_robustness(model, torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), [0.1], sanity_images=4)
"""


def loaded_by(*steps):
    """Return which of torch and the frameworks a new process has loaded after each step, and where one says so."""
    known = f"def known(): print('loaded', json.dumps([m for m in {['torch', *FRAMEWORKS]} if m in sys.modules]))"
    script = "\n".join(["import sys, json", known, *(f"{step}\nknown()" for step in steps)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("loaded ")]


def test_every_public_name_is_there():
    assert all(getattr(jr, name) is not None for name in jr.__all__)
    assert set(jr.__all__) <= set(dir(jr))


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = jr.nope


def test_what_is_used_is_loaded_and_no_more():
    """Norms, distances and penalties load torch alone; the plain function neither Hydra nor Lightning nor W&B."""
    used = "jr.frobenius_norm; jr.spectral_norm; jr.fisher_rao_distance; jr.Frobenius"
    imported, norms, ready, evaluated = loaded_by("import jacobian_robust as jr", used, EVALUATE)
    assert imported == []
    assert norms == ["torch"]
    assert "torchattacks" not in ready
    assert not {"hydra", "pytorch_lightning", "wandb"} & set(evaluated)

"""``import jacobian_robust as jr``: what it offers, and what it does not load."""

import json
import subprocess
import sys

import pytest

import jacobian_robust as jr

FRAMEWORKS = ["hydra", "pytorch_lightning", "wandb", "torchattacks", "pyautoattack", "matplotlib"]


def loaded_by(code):
    """Return which of torch and the frameworks a new process has loaded after the code."""
    script = f"import sys, json\n{code}\nprint(json.dumps([m for m in {['torch', *FRAMEWORKS]} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_public_name_is_there():
    assert all(getattr(jr, name) is not None for name in jr.__all__)
    assert set(jr.__all__) <= set(dir(jr))


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = jr.nope


def test_norms_distances_and_penalties_load_torch_alone():
    assert loaded_by("import jacobian_robust") == []
    used = "import jacobian_robust as jr; jr.frobenius_norm; jr.spectral_norm; jr.fisher_rao_distance; jr.Frobenius"
    assert loaded_by(used) == ["torch"]

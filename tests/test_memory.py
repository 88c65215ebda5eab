import gc
import subprocess
import sys

import pytest

from jacobian_robust.memory import keep_freed_memory, rare_garbage_collection

FAULTS = """
import resource, sys
import torch
from jacobian_robust.memory import keep_freed_memory
from jacobian_robust.models import LeNet
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no mallopt")
torch.set_num_threads(1)  # what helper threads free is kept in heaps of their own, and how is up to chance
model, images = LeNet(), torch.rand(32, 1, 28, 28)
for step in range(80):
    if step == 60:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(images).sum().backward()
    model.zero_grad()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.slow
def test_a_step_uses_the_memory_of_the_one_before():
    """Side by side: a few page faults a step, instead of a few hundred to three thousand (benchmarks/allocator.py)."""
    faults = {}
    for way in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True)
        if "no mallopt" in done.stderr:
            pytest.skip("not glibc")
        faults[way] = float(done.stdout)
    assert faults["keep"] < faults["give back"] / 4


def test_settings_of_the_user_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert keep_freed_memory() is False


@pytest.fixture
def unfrozen():
    """The tests run with all that was imported frozen."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    gc.freeze() if frozen else gc.unfreeze()


def test_garbage_collection_is_as_before_afterwards(unfrozen):
    thresholds = gc.get_threshold()
    with rare_garbage_collection():
        assert gc.get_threshold()[0] == 100 * thresholds[0]
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == thresholds
    assert gc.get_freeze_count() == 0


def test_what_the_caller_has_frozen_stays_frozen(unfrozen):
    gc.freeze()
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    with rare_garbage_collection():
        assert gc.get_threshold()[0] == 100 * thresholds[0]
        assert 0 < gc.get_freeze_count() <= frozen, "those made since are not"
    assert gc.get_threshold() == thresholds
    assert 0 < gc.get_freeze_count() <= frozen

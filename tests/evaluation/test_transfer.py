"""Where the source of a transfer comes from."""

import pytest

from jacobian_robust.checkpoints import Checkpoint
from jacobian_robust.evaluation.transfer import source_model
from jacobian_robust.models import MLP, LeNet


@pytest.mark.parametrize("target", ["jacobian_robust.models.MLP", "mylab.Net"])
def test_a_source_of_a_class_elsewhere_is_the_named_model(target, tmp_path):
    named = MLP(inputs=4, width=3)
    checkpoint = Checkpoint(tmp_path, "", {"model": {"_target_": target, "inputs": 4, "width": 3}}, named.state_dict())
    other = LeNet() if checkpoint.brings_model else named
    assert type(source_model(checkpoint, other, {"mean": 0.5})) is MLP  # pixels in [0, 1], as every training's

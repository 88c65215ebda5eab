from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError

from jacobian_robust.bounds import interval_bounds
from jacobian_robust.models import ConvSmall

CONF = Path(__file__).parents[2] / "conf"


def test_its_configuration_builds_it_and_it_has_bounds():
    model = instantiate(OmegaConf.load(CONF / "model" / "conv_small.yaml"), first=4, second=8, hidden=16)
    images = torch.rand(2, 1, 28, 28)
    assert [p.shape[0] for p in model.parameters() if p.dim() > 1] == [4, 8, 16, 10]
    for bound in interval_bounds(model, images, images):
        torch.testing.assert_close(bound, model(images))


@pytest.mark.parametrize("width", ["first", "second", "hidden"])
def test_widths_that_make_no_network_are_refused(width):
    with pytest.raises(ValidationError):
        ConvSmall(**{width: 0})

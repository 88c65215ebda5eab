"""What is checked of a training before its first step, of models and data of one's own."""

import pytest
import pytorch_lightning as pl
from torch import nn

from jacobian_robust.data import ToyDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.training.checks import check_all_used


def trainer(strategy, devices):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", strategy=strategy, devices=devices, **quiet)


class Spare(nn.Sequential):
    """Has a head beside the logits."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(2, 3))
        self.head = nn.Linear(3, 4)

    def forward(self, images):
        return self[1](self[0](images))


def test_a_weight_that_no_process_differentiates_is_named_before_they_wait_for_it():
    data = ToyDataModule()
    with pytest.raises(UserError, match=r"^model: head\.weight plays no part .*ddp_find_unused_parameters_true$"):
        check_all_used(Spare(), data, trainer("ddp", 2))
    check_all_used(Spare(), data, trainer("ddp_find_unused_parameters_true", 2))
    check_all_used(Spare(), data, trainer("auto", 1))
    check_all_used(nn.Sequential(nn.Flatten(), nn.Linear(2, 3)), data, trainer("ddp", 2))

import pytest
from omegaconf import OmegaConf

from jacobian_robust.training.options import label

AT = "jacobian_robust."


@pytest.mark.parametrize(
    ("penalty", "adversary", "name"),
    [
        (None, None, "vanilla"),
        ("penalties.Frobenius", None, "frobenius"),
        ("penalties.LinearMargin", "adversaries.Noise", "linear_margin+noise"),
        ("penalties.GloRo", "adversaries.PGD", "gloro+pgd"),
        ("penalties.VAT", None, "vat"),
    ],
)
def test_a_run_is_named_after_its_penalty_and_adversary(penalty, adversary, name):
    chosen = {"regularizer": penalty, "adversary": adversary}
    assert label(OmegaConf.create({k: v and {"_target_": AT + v} for k, v in chosen.items()})) == name

import pytest
from omegaconf import OmegaConf

from jacobian_robust.errors import UserError
from jacobian_robust.training.unused import check_used

NONE = OmegaConf.create({"regularizer": None, "eta": {"max": 0.006}, "amortization": {"every": 1}})
SOME = OmegaConf.merge(NONE, {"regularizer": {"_target_": "jacobian_robust.penalties.Frobenius"}})


@pytest.mark.parametrize("override", ["eta=constant", "eta.max=0.1", "++eta.max=0.1", "amortization.every=2"])
def test_the_weight_of_a_penalty_that_is_not_there_is_refused(override):
    name = override.lstrip("+").partition("=")[0]
    with pytest.raises(UserError, match=f"{name}: regularizer=none has no penalty for it; leave {name} out"):
        check_used(NONE, ["regularizer=none", override])
    check_used(SOME, [override])


@pytest.mark.parametrize("override", ["regularizer=none", "seed=1", "trainer.max_epochs=2", "eta_of_my_own=1"])
def test_defaults_and_other_options_are_not(override, capfd):
    check_used(NONE, [])
    check_used(NONE, [override])
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match=r"^eta\.max: "):  # named alone, whatever stands beside it
        check_used(NONE, [override, "eta.max=0.1"])

"""The cost of a training in plain steps."""

import copy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from pytorch_lightning.plugins.precision import Precision
from torch import nn

from jacobian_robust.adversaries import Free
from jacobian_robust.penalties import Amortization, Frobenius, Lagrangian, Margin
from jacobian_robust.training.build import Run
from jacobian_robust.training.cost import measure_cost
from jacobian_robust.training.module import RobustClassifier


def a_run(penalty=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 300), nn.Tanh(), nn.Dropout(), nn.Linear(300, 10))
    module = RobustClassifier(model, lambda p: torch.optim.SGD(p, lr=0.1), penalty, **options)
    module.eta = 0.5
    split = SimpleNamespace(first=lambda limit: (torch.rand(limit, 1, 4, 4), torch.arange(limit) % 10))
    run = Mock(
        spec=Run,
        module=module,
        datamodule=SimpleNamespace(batch_size=20, split=lambda name: split),
        trainer=SimpleNamespace(
            world_size=1,
            global_step=30,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            precision_plugin=Precision(),
        ),
    )
    run.name = "run"  # of a Mock, the argument is another
    return run


CONSTRAINT = Lagrangian(penalty=Margin(eps=1.0), rate=0.5, damping=1.0)


@pytest.mark.parametrize(
    ("penalty", "options"),
    [
        (None, {}),
        (Frobenius(eps=1.0), {"amortization": Amortization(every=3, fraction=0.5)}),
        (CONSTRAINT, {"adversary": Free(eps=0.1, replays=2)}),
    ],
)
def test_the_measurement_leaves_weights_state_and_random_numbers_as_they_are(penalty, options):
    run = a_run(penalty, **options)
    before = copy.deepcopy(run.module.state_dict())
    stream, probes = torch.get_rng_state(), run.module._generator.get_state()
    cost = measure_cost(run, 100.0)
    assert cost.step_ratio == pytest.approx(cost.step_seconds / cost.plain_step_seconds)
    assert cost.plain_step_equivalents == pytest.approx(30 * cost.step_ratio)
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(run.module._generator.get_state(), probes)
    assert all(torch.equal(value, before[name]) for name, value in run.module.state_dict().items())
    assert CONSTRAINT.multipliers is None


def test_a_failure_is_said_and_the_training_stands(capsys):
    run = a_run()
    run.datamodule.split = lambda name: 1 / 0
    assert measure_cost(run, 1.0) is None
    assert "run: its cost could not be measured: division by zero" in capsys.readouterr().out

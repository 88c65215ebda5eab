import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from jacobian_robust.penalties import Amortization, Frobenius, LogitJacobian, Margin
from jacobian_robust.training.callbacks.scheduled import ScheduledRate
from jacobian_robust.training.capture import EAGER_FIRST, CapturedSteps, NotCaptured
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.schedules import OneCycle


class Again:
    """Stands for a CUDA graph where there is no GPU: a replay reads and writes the same memory, and draws nothing.

    Attributes:
        replays: of all that were made.
    """

    replays = 0

    def __init__(self, generator):
        self._generator = generator

    def warm_up(self, compute):
        compute()

    def capture(self, compute):
        self._compute, self._draws = compute, self._generator.before
        self._outputs = [output.clone() for output in compute()]
        return self._outputs

    def replay(self):
        Again.replays += 1
        with self._draws.of(self._generator):
            for output, value in zip(self._outputs, self._compute(), strict=True):
                output.copy_(value)


class Deaf(Again):
    """Replays the first batch whatever it is given."""

    def replay(self):
        Again.replays += 1


class Unable(Again):
    def capture(self, compute):
        raise RuntimeError("operation not permitted when\nstream is capturing")


def as_tuple(rows):
    return tuple(map(torch.stack, zip(*rows, strict=True)))


def trained(penalty, graph=None, *, epochs=2, **options):
    """Train on 44 images, in batches of 8 and a last one of 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    images = torch.rand(44, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = DataLoader(TensorDataset(images, torch.arange(44) % 4), batch_size=8, collate_fn=as_tuple)
    module = RobustClassifier(model, lambda parameters: torch.optim.SGD(parameters, lr=0.3), penalty, **options)
    module.eta = 0.3
    if graph is not None:
        module.captured = CapturedSteps(list(model.parameters()), module._generator, lambda: graph(module._generator))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        callbacks=[ScheduledRate(OneCycle())],
    )
    trainer.fit(module, data)
    return module


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": Frobenius(delta_over_eps=1e-3, chart="sphere", probes=1)},
        {"penalty": Frobenius(delta_over_eps=1e-3, probes=2), "amortization": Amortization(every=2, fraction=0.5)},
        {"penalty": Margin(eps=0.5)},
        {"penalty": LogitJacobian(projections=2)},
        {"penalty": None},
    ],
    ids=["probe", "amortised", "margin", "projections", "plain"],
)
def test_replayed_steps_are_the_eager_ones(options):
    eager = trained(**options)
    Again.replays = 0
    replayed = trained(**options, graph=Again)
    assert replayed.captured is not None
    steps = 2 * 5  # of whole batches; the last one of each epoch comes twice alone
    kinds = 2 if "amortization" in options else 1
    assert Again.replays == steps - kinds * EAGER_FIRST + 2 * kinds  # two for the proof
    for ours, theirs in zip(replayed.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.equal(replayed._generator.get_state(), eager._generator.get_state())
    assert replayed.means("train").keys() == eager.means("train").keys()


@pytest.mark.parametrize(("graph", "why"), [(Deaf, "not the eager step"), (Unable, "not permitted when stream")])
def test_a_graph_that_is_not_proven_is_not_used(graph, why, capsys):
    penalty = Frobenius(delta_over_eps=1e-3, probes=1)
    eager, fallen_back = trained(penalty), trained(penalty, graph)
    assert fallen_back.captured is None
    assert why in capsys.readouterr().out
    for ours, theirs in zip(fallen_back.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(fallen_back._generator.get_state(), eager._generator.get_state())


def test_weights_in_other_memory_are_captured_anew():
    module = trained(Frobenius(delta_over_eps=1e-3), Again, epochs=1)
    parameters = list(module.parameters())
    images, labels = torch.rand(8, 3, 4, dtype=torch.float64), torch.arange(8) % 4

    def compute(inputs, labels, eta):
        terms = module.loss_terms((inputs, labels), eta=eta)
        return [terms.loss, terms.penalty]

    def step(eta):
        return module.captured(compute, images, labels, eta, "exact")

    assert [step(0.3) for _ in range(EAGER_FIRST)] == [None] * EAGER_FIRST
    for eta, factor in ((0.3, 1.0), (0.7, 1.5)):
        for parameter in parameters:
            parameter.data = parameter.data * factor  # in new memory
        module.eta = eta
        loss, penalty = step(eta)
        expected = module.loss_terms((images, labels))
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(penalty, expected.penalty.detach())
        ours = torch.autograd.grad(2 * loss, parameters)
        torch.testing.assert_close(ours, torch.autograd.grad(2 * expected.loss, parameters))


def test_a_loss_that_leaves_a_parameter_out_is_refused():
    unused = nn.Parameter(torch.ones(2))
    used = nn.Parameter(torch.ones(2))
    generator = RobustClassifier(nn.Linear(2, 2), torch.optim.SGD)._generator
    steps = CapturedSteps([used, unused], generator, lambda: Again(generator))
    batch = torch.ones(1, 2), torch.zeros(1, dtype=torch.long)
    for _ in range(EAGER_FIRST):
        assert steps(lambda x, y, eta: [(x * used).sum()], *batch, 0.1, None) is None
    with pytest.raises(NotCaptured, match="not have been used"):
        steps(lambda x, y, eta: [(x * used).sum()], *batch, 0.1, None)

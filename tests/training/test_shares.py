"""The parts of a batch, put together, are the batch: samples, random numbers, losses and gradients."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import SequentialSampler

from jacobian_robust.data import ImageDataset
from jacobian_robust.penalties import Amortization, Frobenius, Margin
from jacobian_robust.training.loading import EpochSampler, ResumableLoader
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.shares import BatchShares, Share, SharedBatch, SharedGenerator, drawn

sizes = st.integers(1, 20)
processes = st.integers(1, 5)


@given(samples=sizes, of=processes)
def test_every_sample_counts_once_and_nobody_starves(samples, of):
    shares = [Share(first, of, samples) for first in range(of)]
    assert sorted(i for share in shares for i in list(share.indices)[: share.counted]) == list(range(samples))
    assert all(share.indices for share in shares)


@given(length=st.integers(1, 40), batch_size=sizes, of=processes)
def test_the_batches_are_those_of_one_process(length, batch_size, of):
    parts = [list(BatchShares(SequentialSampler(range(length)), batch_size, first, of)) for first in range(of)]
    for number, of_batch in enumerate(zip(*parts, strict=True)):
        whole = list(range(length))[number * batch_size : (number + 1) * batch_size]
        assert sorted(i for part in of_batch for i in part[: part.share.counted]) == whole


def test_a_resumed_loader_goes_on_behind_the_same_batch():
    data = ImageDataset(torch.arange(10.0).view(-1, 1, 1, 1), torch.arange(10))

    def loader(first):
        return ResumableLoader(data, EpochSampler(10, seed=3), 4, process=first, of=2, collate_fn=lambda batch: batch)

    for first in range(2):
        uninterrupted = [batch.labels.tolist() for batch in loader(first)]
        stopped = loader(first)
        next(iter(stopped))
        resumed = loader(first)
        resumed.load_state_dict(stopped.state_dict())
        assert [batch.labels.tolist() for batch in resumed] == uninterrupted[1:]
        assert len(uninterrupted) == len(loader(first)) == 3


@given(samples=sizes, of=processes, dim=st.sampled_from([0, 1]))
def test_the_random_numbers_are_those_of_one_process(samples, of, dim):
    def generator(share):
        made = SharedGenerator()
        made.manual_seed(0)
        made.share = share
        return made

    def draw(source):
        return lambda n: torch.randn(*(n, 3) if dim == 0 else (3, n), generator=source)

    alone = generator(None)
    whole = draw(alone)(samples)
    for first in range(of):
        share = Share(first, of, samples)
        source = generator(share)
        part = drawn(draw(source), len(share.indices), source, dim=dim)
        assert torch.equal(part, whole.index_select(dim, torch.tensor(list(share.indices))))
        assert torch.equal(source.get_state(), alone.get_state())


PENALTIES = {
    "none": None,
    "exact": Frobenius(delta_over_eps=1e-3, chart="sphere"),
    "1 probe": Frobenius(delta_over_eps=1e-3, chart="sphere", probes=1),
    "margin, 1 probe": Margin(eps=2.0, probes=1),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(
    ("samples", "of", "fraction"), [(8, 2, 1.0), (7, 2, 1.0), (7, 3, 0.5), (8, 4, 0.2), (2, 4, 1.0), (1, 2, 1.0)]
)
def test_the_mean_gradient_of_the_parts_is_that_of_the_batch(penalty, samples, of, fraction):
    """Uneven parts, parts without a sample, parts without a penalised one: in float64, to its rounding."""
    images = torch.rand(samples, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(samples) % 4

    def classifier():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        module = RobustClassifier(
            model, lambda p: torch.optim.SGD(p, lr=0.1), penalty, amortization=Amortization(every=3, fraction=fraction)
        )
        module.eta = 0.3
        module.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0)
        return module

    def gradient(module, loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    alone = classifier()
    expected = gradient(alone, alone.training_step((images, labels), 0))
    modules, gradients = [], []
    for first in range(of):
        share = Share(first, of, samples)
        index = torch.tensor(list(share.indices))
        modules.append(classifier())
        loss = modules[-1].training_step(SharedBatch(images[index], labels[index], share), 0)
        gradients.append(gradient(modules[-1], loss))
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected, rtol=1e-12, atol=1e-14)
    means = [module._means["train"] for module in modules]
    for other in means[1:]:
        means[0].load_state_dict(other.state_dict())
    # Sums of float64 values in another order.
    assert means[0].value() == pytest.approx(alone.means("train"), rel=1e-12)
    states = {tuple(module._generator.get_state().tolist()) for module in (*modules, alone)}
    assert len(states) == 1

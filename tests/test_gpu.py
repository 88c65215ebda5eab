import itertools

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import PGD
from jacobian_robust.jacobian import frobenius_norm, spectral_norm
from jacobian_robust.models import LeNet
from jacobian_robust.penalties import Frobenius, Margin
from jacobian_robust.robustness.budgets import sweep
from jacobian_robust.training.capture import EAGER_FIRST, CapturedSteps
from jacobian_robust.training.module import RobustClassifier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_norms_and_penalty_agree_with_the_cpu():
    torch.manual_seed(0)
    model, inputs = nn.Linear(6, 5), torch.randn(4, 6)
    generators = (torch.Generator().manual_seed(0), torch.Generator().manual_seed(0))
    values = []
    for device, generator in zip(("cpu", "cuda"), generators, strict=True):
        x = inputs.to(device).requires_grad_()
        logits = model.to(device)(x)
        values.append(
            [
                frobenius_norm(logits, x),
                spectral_norm(logits, x),
                frobenius_norm(logits, x, probes=1, generator=generator),
                Frobenius(delta_over_eps=1e-3)(logits, x),
            ]
        )
    for cpu, cuda in zip(*values, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-4, atol=1e-5)


def test_a_sweep_keeps_its_examples_on_the_device_and_the_random_streams():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).cuda().eval()
    images = torch.rand(20, 1, 4, 4, device="cuda")
    labels = model(images).argmax(-1)
    before = torch.cuda.get_rng_state()
    attack = PGD(name="pgd", norm="linf", eps=[0.5], steps=5, step_size=0.2)
    result = sweep(model, images, labels, [attack])
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert {t.device.type for t in vars(result.examples[0]).values()} == {"cuda"}


@pytest.mark.parametrize(
    "penalty",
    [None, Frobenius(delta_over_eps=1e-3), Frobenius(delta_over_eps=1e-3, probes=1), Margin(eps=4.0)],
    ids=["plain", "exact", "1 probe", "margin"],
)
def test_steps_from_a_cuda_graph_are_the_eager_ones(penalty):
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        module = RobustClassifier(LeNet().cuda(), torch.optim.SGD, penalty)
        module.eta = 0.004
        if captured:
            module.captured = CapturedSteps(list(module.parameters()), module._generator)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in itertools.repeat(None, EAGER_FIRST + 20):
            batch = torch.rand(32, 1, 28, 28, generator=generator).cuda(), torch.arange(32).cuda() % 10
            terms = module._captured_terms(batch, 1, 32) or module.loss_terms(batch, generator=module._generator)
            optimizer.zero_grad()
            module.backward(terms.loss)
            optimizer.step()
            losses.append(terms.loss.item())
            del terms  # as a trainer does: gradients of a graph that lives on would meet those that are captured
        assert (module.captured is not None) == captured
        ends.append((losses, module))
    (eager, one), (replayed, other) = ends
    assert replayed == pytest.approx(eager, rel=1e-3)
    assert torch.equal(one._generator.get_state(), other._generator.get_state())

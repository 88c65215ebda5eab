import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from jacobian_robust.data import ImageDataset
from jacobian_robust.jacobian import frobenius_norm
from jacobian_robust.penalties import Amortization, Frobenius
from jacobian_robust.training.module import RobustClassifier
from jacobian_robust.training.nonfinite import NonFiniteSteps

PENALTY = Frobenius(delta_over_eps=1e-3, chart="sphere")


def classifier(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    module = RobustClassifier(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1), **options)
    module.eta = 0.3
    return module


def a_batch(size=6):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 3, 4, generator=generator, dtype=torch.float64), torch.arange(size) % 4


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


def test_the_loss_is_equation_16():
    module, (images, labels) = classifier(penalty=PENALTY), a_batch()
    terms = module.loss_terms((images, labels))
    inputs = images.clone().requires_grad_()
    logits = module(inputs)
    alpha = PENALTY(logits, inputs).mean()
    expected = 0.7 * nn.functional.cross_entropy(logits, labels) + 0.3 * alpha
    torch.testing.assert_close(terms.loss, expected)
    for ours, theirs in zip(gradients(module, terms.loss), gradients(module, expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@given(every=st.integers(1, 7), rounds=st.integers(1, 5), start=st.integers(0, 3))
def test_weights_of_the_steps_make_up_for_those_left_out(every, rounds, start):
    amortization = Amortization(every=every)
    steps = range(start * every, (start + rounds) * every)
    assert sum(amortization.weight(step) for step in steps) == len(steps)


@given(fraction=st.floats(0.001, 1), batch=st.integers(1, 100))
def test_a_fraction_is_at_least_one_image_and_at_most_all(fraction, batch):
    samples = Amortization(fraction=fraction).samples(batch)
    assert 1 <= samples <= batch
    assert abs(samples - fraction * batch) <= max(0.5, 1 - fraction * batch)


def test_a_step_without_the_penalty_minimises_the_rest_of_the_loss():
    module, batch = classifier(penalty=PENALTY), a_batch()
    terms = module.loss_terms(batch, weight=0)
    assert terms.penalty is None
    torch.testing.assert_close(terms.loss, 0.7 * nn.functional.cross_entropy(module(batch[0]), batch[1]))
    heavy, once = (module.loss_terms(batch, weight=weight) for weight in (3, 1))
    torch.testing.assert_close(heavy.loss - once.loss, 2 * 0.3 * once.penalty)


def test_a_part_of_the_batch_is_penalised_and_all_of_it_classified():
    module, (images, labels) = classifier(penalty=PENALTY), a_batch()
    part = module.loss_terms((images, labels), penalised=2)
    whole = module.loss_terms((images, labels))
    torch.testing.assert_close(part.cross_entropy, whole.cross_entropy)
    torch.testing.assert_close(part.logits, whole.logits)
    torch.testing.assert_close(part.penalty, module.loss_terms((images[:2], labels[:2])).penalty)
    # The parts of a split batch average to the whole.
    parts = [module.loss_terms((images.roll(-i, 0), labels.roll(-i, 0)), penalised=2) for i in (0, 2, 4)]
    mean = torch.stack([torch.cat([g.flatten() for g in gradients(module, p.loss)]) for p in parts]).mean(0)
    torch.testing.assert_close(mean, torch.cat([g.flatten() for g in gradients(module, whole.loss)]))


def test_means_are_over_samples_and_begin_anew():
    module = classifier(penalty=PENALTY)
    assert module.pop_means("train") == {}
    batches = [a_batch(6), a_batch(2)]
    terms = [module.loss_terms(batch) for batch in batches]
    for term, batch in zip(terms, batches, strict=True):
        module._means["train"].add(term, batch[1])
    means = module.means("train")
    assert means["loss"] == pytest.approx((6 * terms[0].loss + 2 * terms[1].loss).item() / 8)
    assert means["penalty"] == pytest.approx((6 * terms[0].penalty + 2 * terms[1].penalty).item() / 8)
    right = [(term.logits.argmax(-1) == batch[1]).sum() for term, batch in zip(terms, batches, strict=True)]
    assert means["accuracy"] == pytest.approx(sum(right).item() / 8)
    assert module.pop_means("train") == means
    assert module.means("train") == {}


def test_the_mean_penalty_is_over_the_steps_that_have_one():
    module, batch = classifier(penalty=PENALTY), a_batch()
    penalised = module.loss_terms(batch, weight=2)
    for terms in (penalised, module.loss_terms(batch, weight=0)):
        module._means["train"].add(terms, batch[1])
    assert module.means("train")["penalty"] == pytest.approx(penalised.penalty.item())


def test_training_asks_for_no_gradient_of_the_images():
    module, (images, labels) = classifier(penalty=PENALTY), a_batch()
    terms = module.loss_terms((images, labels))
    module.backward(terms.loss)
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert images.grad is None


def test_under_mixed_precision_loss_and_penalty_are_computed_in_single():
    seen = []

    class Recorded(Frobenius):
        def __call__(self, logits, inputs, labels=None, **options):
            seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
            return super().__call__(logits, inputs, labels, **options)

    module = classifier(penalty=Recorded(delta_over_eps=1e-3, chart="sphere")).float()
    images, labels = a_batch()
    single = module.loss_terms((images.float(), labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.model(images.float()).dtype == torch.bfloat16
        mixed = module.loss_terms((images.float(), labels))
    assert seen == [(torch.float32, False)] * 2
    assert mixed.loss.dtype == mixed.penalty.dtype == mixed.logits.dtype == torch.float32
    assert mixed.penalty.item() == pytest.approx(single.penalty.item(), rel=2**-6)  # of eight digits
    weights = list(module.parameters())
    for exact, near in zip(*(torch.autograd.grad(terms.loss, weights) for terms in (single, mixed)), strict=True):
        # Eight binary digits a product, and half a dozen products one after another.
        assert (near - exact).norm() < 6 * 2**-8 * exact.norm()


def test_dropout_and_the_norm_see_the_same_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    inputs = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    logits = model(inputs)
    kept = torch.stack([torch.autograd.grad(logits[:, k].sum(), inputs, retain_graph=True)[0] for k in range(3)], 1)
    theta = logits.softmax(-1)
    sigma = torch.diag_embed(theta) - theta[:, :, None] * theta[:, None, :]
    expected = (kept.mT @ sigma @ kept).diagonal(dim1=1, dim2=2).sum(-1).sqrt()
    torch.testing.assert_close(frobenius_norm(logits, inputs), expected)


def test_the_first_steps_of_a_loss_scale_are_no_divergence(tmp_path):
    module = classifier(penalty=PENALTY).float()
    before = [parameter.clone() for parameter in module.parameters()]
    images, labels = a_batch(40)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows float16 in more steps than may be skipped
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )  # fmt: skip
    trainer.fit(
        module, DataLoader(ImageDataset(images[:, None].float(), labels), batch_size=2, collate_fn=lambda batch: batch)
    )
    assert scaler.get_scale() <= 2.0**20
    assert module.nonfinite.skipped == 0
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert any(not torch.equal(parameter, old) for parameter, old in zip(module.parameters(), before, strict=True))


def test_without_a_scale_left_it_is_one():
    assert not NonFiniteSteps.of_the_scale(None)
    assert NonFiniteSteps.of_the_scale(torch.amp.GradScaler("cpu", init_scale=2.0))
    assert not NonFiniteSteps.of_the_scale(torch.amp.GradScaler("cpu", init_scale=1.0))

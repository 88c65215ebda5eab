import pytest
import torch
from torch import nn

from jacobian_robust.bounds import lipschitz_constant, lipschitz_margin
from jacobian_robust.lipschitz_models import SortedPairs
from jacobian_robust.models import LipschitzLeNet, LipschitzMLP, compute_orthonormal_weights_once


def models():
    pytest.importorskip("orthogonium")
    torch.manual_seed(0)
    made = [LipschitzLeNet(image_size=8, first=4, second=8, hidden=16), LipschitzMLP(inputs=64, width=16, depth=2)]
    for model in made:  # not where they were initialised
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def test_sorted_pairs_are_a_sort_and_stretch_nothing():
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    expected = x.unflatten(1, (2, 3)).sort(1, descending=True).values.flatten(1, 2)
    assert torch.equal(SortedPairs()(x), expected)
    assert lipschitz_constant(SortedPairs(), x) == 1


def test_the_constant_is_one_by_a_bound_of_the_weights_and_nearly_attained():
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for model in models():
        assert lipschitz_constant(model, x) == pytest.approx(1, abs=1e-6)
        slope = torch.autograd.functional.jacobian(lambda image, model=model: model(image)[0], x[:1]).flatten(1)
        assert 0.5 < torch.linalg.matrix_norm(slope, 2) < 1 + 1e-5
        labels = model(x).argmax(-1)
        best, second = model(x).topk(2).values.unbind(-1)
        torch.testing.assert_close(lipschitz_margin(model, x, labels).float(), (best - second) / 2**0.5)


def test_their_weights_are_the_same_at_each_pass_and_with_torchs_own_layers():
    x = torch.rand(4, 1, 8, 8)
    for model in models():
        before = model(x)
        assert torch.equal(before, model(x))
        compute_orthonormal_weights_once(model)
        assert {type(layer) for layer in model.layers} <= {nn.Linear, nn.Conv2d, nn.Flatten, SortedPairs}
        torch.testing.assert_close(model(x), before)

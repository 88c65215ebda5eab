import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jacobian_robust.penalties import Amortization


@given(st.integers(1, 12))
def test_the_weights_of_the_steps_are_one_in_the_mean(every):
    weights = [Amortization(every=every).weight(step) for step in range(3 * every)]
    assert sum(weights) == len(weights)
    assert weights[0] == every


@given(st.floats(1e-6, 1), st.integers(1, 10_000))
def test_a_share_of_a_batch_is_rounded_to_one_image_at_least_and_never_more_than_all(fraction, batch):
    samples = Amortization(fraction=fraction).samples(batch)
    assert 1 <= samples <= batch
    assert samples == 1 or abs(samples - fraction * batch) <= 0.5


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"fraction": 0}, {"fraction": 1.1}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        Amortization(**options)

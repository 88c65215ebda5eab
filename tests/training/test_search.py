import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hydra_plugins.jacobian_robust_search import distribution
from jacobian_robust.errors import UserError
from jacobian_robust.training.search import open_study


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.booleans())
def test_an_interval_is_where_its_ends_are(a, b, log):
    low, high = sorted((a, b))
    text = f"interval({low!r}, {high!r})"
    assert distribution("x", f"tag(log, {text})" if log else text) == FloatDistribution(low, high, log=log)


def test_integers_and_choices():
    assert distribution("x", "int(interval(1, 5))") == IntDistribution(1, 5)
    assert distribution("x", "tag(log, int(interval(1, 64)))") == IntDistribution(1, 64, log=True)
    assert distribution("x", "choice(none, frobenius)") == CategoricalDistribution(["none", "frobenius"])
    assert distribution("x", "1,2") == distribution("x", "range(1, 3)") == CategoricalDistribution(["1", "2"])


@pytest.mark.parametrize("text", ["3", "interval(5, 1)", "interval(", "", "tag(log, interval(0, 1))"])
def test_what_is_no_place_to_look_is_refused(text):
    with pytest.raises(UserError, match=r"eta\.max"):
        distribution("eta.max", text)


def test_a_study_is_kept(tmp_path):
    for storage in (str(tmp_path / "study.journal"), f"sqlite:///{tmp_path}/study.db"):
        study = open_study(storage, "s", direction="maximize")
        study.tell(study.ask({"x": FloatDistribution(0, 1)}), 0.5)
        assert open_study(storage, "s").best_value == 0.5

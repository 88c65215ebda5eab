"""Evaluations are put together only if they were made alike, and say where each was made."""

import sys

import pytest

from jacobian_robust.errors import UserError
from jacobian_robust.reporting import compare
from jacobian_robust.reporting.compare import gather
from jacobian_robust.robustness.schema import Results

from ..robustness.test_schema import model

ATTACKS = {"pgd_linf": {"norm": "linf"}, "pgd_l2": {"norm": "l2"}}


@pytest.fixture
def finished(tmp_path):
    """Leave the results of a model in a file, as any machine could have."""

    def leave(name, *, attacks=ATTACKS, device="cpu", versions=None):
        results = Results(
            split="test",
            independent=False,
            seed=0,
            device=device,
            versions={"torch": "2.14.1"} if versions is None else versions,
            attacks=attacks,
            models=[model(name, 0, 0.9, 0.5)],
        )
        (tmp_path / f"{name}.json").write_text(results.model_dump_json())
        return tmp_path / f"{name}.json"

    return leave


def test_evaluations_whose_attacks_came_in_another_order_are_not_put_together(finished):
    """What an attack meets depends on those before it, and the tables are read by position."""
    back = dict(reversed(ATTACKS.items()))
    assert back == ATTACKS
    places = [finished("a"), finished("b"), finished("c", attacks=back)]
    assert len(gather(places[:2]).models) == 2
    with pytest.raises(UserError, match=r"c was .*another order than .*/a, .*: pgd_l2, pgd_linf, not pgd_linf, pgd_l2"):
        gather(places)


def test_the_devices_and_versions_of_all_evaluations_are_named_once_each(finished, tmp_path):
    first = finished("a", device="cuda")
    second = finished("b", versions={"torch": "2.15.0", "torchattacks": "3.5.1"})
    together = gather([first, second])
    assert together.device == "cuda, cpu"
    assert together.versions == {"torch": "2.14.1 / 2.15.0", "torchattacks": "3.5.1"}
    (tmp_path / "both.json").write_text(together.model_dump_json())
    again = gather([tmp_path / "both.json", finished("c")])
    assert (again.device, again.versions) == (together.device, together.versions)


def test_a_wandb_project_without_a_name_is_one_line_and_leaves_nothing(finished, tmp_path, monkeypatch):
    place = str(finished("a"))
    monkeypatch.setattr(
        sys, "argv", ["compare", place, "--out", f"{tmp_path}/out", "--wandb", "offline", "--project", ""]
    )
    with pytest.raises(SystemExit, match=r"^error: --project: string should have at least 1 character"):
        compare.main()
    assert not (tmp_path / "out").exists()

"""The plain function for a model, images and labels."""

import json

import pytest
import torch
from torch import nn

from jacobian_robust.attacks import PGD
from jacobian_robust.errors import UserError
from jacobian_robust.robustness.evaluate import evaluate_robustness
from jacobian_robust.robustness.schema import Results


class Mean(nn.Module):
    """Two classes, divided by the mean pixel at 0.5: an ℓ∞ attack succeeds exactly when eps > |mean - 0.5|."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images):
        margin = self.dropout(self.scale * (images.flatten(1).mean(1) - 0.5))
        return torch.stack([-margin, margin], dim=1)


def a_case():
    means = torch.tensor([0.3, 0.42, 0.47, 0.52, 0.6, 0.75])
    images = means.reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    return Mean(), images, (means > 0.5).long()


def test_the_accounting_is_that_of_the_distances_and_the_model_is_left_as_it_was(tmp_path):
    model, images, labels = a_case()
    state = torch.get_rng_state()
    result = evaluate_robustness(model, images, labels, eps=[0.05, 0.15], sanity_images=6)
    assert model.training
    assert model.dropout.training
    assert torch.equal(state, torch.get_rng_state())
    assert result.robust_accuracy == {0.05: 4 / 6, 0.15: 2 / 6}
    assert result.verdict is not None
    shown = str(result)
    assert "66.7%" in shown
    assert "sanity" in shown
    result.save(tmp_path / "r")
    stored = Results.model_validate_json((tmp_path / "r" / "robustness.json").read_text())
    assert stored == result.results
    assert "commit" in json.loads((tmp_path / "r" / "robustness.json").read_text())
    assert len((tmp_path / "r" / "images.csv").read_text().splitlines()) == 7
    assert "Mean" in (tmp_path / "r" / "report.html").read_text()
    assert (tmp_path / "r" / "robustness.csv").is_file()
    with pytest.raises(UserError, match="already holds a result"):
        result.save(tmp_path / "r")


def test_attacks_are_given_by_name_or_as_objects():
    model, images, labels = a_case()
    mine = PGD(name="mine", norm="linf", eps=(0.3,), steps=5, step_size=0.05)
    result = evaluate_robustness(model, images, labels, [0.1], attacks=["fgsm", mine], sanity_images=0)
    assert [attack.attack for attack in result.results.models[0].threats[0].budgets[0].attacks] == ["fgsm", "mine"]
    assert result.results.attacks["mine"]["eps"] == [0.1]
    assert result.verdict is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(6, 1, 4, 4) + 1}, r"needs \[0, 1\]"),
        ({"images": torch.zeros(6, 1, 4, 4, dtype=torch.uint8)}, "float pixels"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, "6 integers"),
        ({"labels": torch.full((6,), 2)}, r"\[0, 1\], the model's classes"),
        ({"eps": []}, "one radius or more"),
        ({"norm": "l1"}, "choose linf or l2"),
        ({"norm": "l2", "attacks": ["fgsm"]}, "no 'fgsm' in l2"),
        ({"attacks": ["pgd", "pgd"]}, "another name"),
        ({"model": nn.Linear(3, 2)}, "takes no image of shape"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message):
    model, images, labels = a_case()
    given = {"model": model, "images": images, "labels": labels, "eps": [0.1], "sanity_images": 0} | change
    with pytest.raises(UserError, match=message) as refused:
        evaluate_robustness(**given)
    assert "\n" not in str(refused.value)
    assert model.training

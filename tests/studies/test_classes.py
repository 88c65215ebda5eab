"""Which class pays for the note's penalty."""

import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

from jacobian_robust.data import MNISTDataModule
from jacobian_robust.errors import UserError
from jacobian_robust.penalties import Frobenius
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.classes import CASES, PUBLISHED, Case, Record, Row, measure, train, trained_table

from ..end_to_end.conftest import ROOT


def test_a_class_is_right_where_the_model_says_so_and_pays_by_the_chart_of_the_case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    images, labels = torch.rand(600, 1, 4, 4), torch.arange(600) % 10
    row = measure(model, Case("x", "stereographic", last=3), images, labels, seed=0)
    predicted = model(images).argmax(-1)
    assert row.recall == pytest.approx([(predicted[labels == k] == k).double().mean().item() for k in range(10)])
    inputs = images[labels == 3].requires_grad_()
    order = [0, 1, 2, 4, 5, 6, 7, 8, 9, 3]
    alpha = Frobenius(delta_over_eps=1e-3)(model(inputs)[:, order], inputs, create_graph=False)
    assert row.penalty[3] == pytest.approx(alpha.double().mean().item(), rel=1e-5)


def test_the_table_is_of_means_over_the_seeds():
    rows = [Row("a", seed, [share] * 10, [1.0] * 10) for seed, share in ((0, 0.5), (1, 0.7))]
    assert trained_table(rows).splitlines()[-1] == "| a | 0, 1 |" + " 60.0 |" * 10


def test_the_committed_page_is_what_its_files_say(tmp_path):
    committed = ROOT / "docs" / "results"
    (tmp_path / "note").mkdir()
    for name in ("classes.md", "note/classes.json", *(f"note/{name}.json" for name in PUBLISHED)):
        shutil.copy(committed / name, tmp_path / name)
    record = Record(tmp_path)
    record.write()
    assert (tmp_path / "classes.md").read_text() == (committed / "classes.md").read_text()
    for name in PUBLISHED:
        (model,) = Results.model_validate_json((committed / f"note/{name}.json").read_bytes()).models
        weights = (committed / f"checkpoints/{name}.safetensors").read_bytes()
        assert model.sha256 == hashlib.sha256(weights).hexdigest(), "its classes are of these weights"
    (tmp_path / "note/classes.json").write_text(json.dumps({"rows": [{"case": "x"}]}))
    with pytest.raises(UserError, match=r"classes\.json is not what this command writes"):
        record.rows()


@pytest.mark.slow
def test_the_last_class_of_the_stereographic_chart_pays_and_none_on_the_sphere():
    data = MNISTDataModule(validation_size=5000)
    data.setup()
    training, held_out = (data.split(name).first(None) for name in ("train", "validation"))
    rows = {
        case.label: measure(train(case, *training, seed=0, epochs=1, eta=0.006), case, *held_out, seed=0)
        for case in CASES
    }
    plain, ninth, fourth, sphere = (rows[case.label].recall for case in CASES)
    assert ninth[9] < plain[9] - 0.05
    assert fourth[4] < plain[4] - 0.03
    assert ninth[4] > fourth[4] + 0.03
    assert fourth[9] > ninth[9] + 0.05
    assert min(sphere[9] - plain[9], sphere[4] - plain[4]) > -0.03

"""Certificates through the entry point: every output has them, and no certified image is broken."""

import csv
import json

import matplotlib.image
import pytest
import torch
from torch import nn

from jacobian_robust.attacks import PGD
from jacobian_robust.bounds import margin_bounds
from jacobian_robust.data import MNISTDataModule
from jacobian_robust.evaluation import journal as journal_of
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.models import ConvSmall
from jacobian_robust.reporting.compare import compare
from jacobian_robust.robustness import certificates
from jacobian_robust.robustness.certificates import CROWN, IntervalBounds
from jacobian_robust.robustness.evaluate import evaluate_robustness
from jacobian_robust.robustness.schema import Results

from . import wandb_records
from .conftest import ROOT, composed

CERTIFIED = [
    *("certificate=[interval,lipschitz,smoothing]", "certificate.smoothing.samples=60"),
    *("certificate.smoothing.batch_size=3", "certificate.smoothing.sigma=0.2"),
    *("attack=[pgd_linf,pgd_l2]", "attack.pgd_linf.eps=[0.002,0.05]", "attack.pgd_l2.eps=[0.0005,0.1]"),
    *("attack.pgd_linf.steps=4", "attack.pgd_l2.steps=4", "limit=12", "sanity_images=2", "geometry_images=0"),
    "reliability=false",
]


@pytest.mark.drawn("certified_linf.png", "certified_l2.png")
@pytest.mark.parametrize("logger", ["csv", pytest.param("wandb", marks=pytest.mark.slow)])
def test_every_output_has_the_certificates(logger, trained, tmp_path, capsys):
    place = [f"checkpoint={trained.directory}/vanilla", f"output_dir={tmp_path}/r"]
    results = evaluate(composed("evaluate", *CERTIFIED, f"logger={logger}", *place))
    printed = capsys.readouterr()
    (model,) = results.models
    assert json.loads((tmp_path / "r/robustness.json").read_text())["format"] == 5
    assert [c.certificate for c in model.certificates] == ["interval", "lipschitz", "smoothing"]
    interval, lipschitz, smoothing = model.certificates
    linf, l2 = model.threats
    assert [b.certified for b in linf.budgets] == [b.certified for b in interval.budgets]
    assert [b.certified for b in l2.budgets] == [b.certified for b in lipschitz.budgets]
    assert interval.budgets[0].certified > 0
    assert lipschitz.budgets[0].certified > 0
    for threat in model.threats:
        assert all(b.certified <= b.correct for b in threat.budgets)
    assert interval.pairs == sum(b.certified for b in interval.budgets)
    assert smoothing.smoothed
    assert smoothing.samples == 12 * 160
    status = {check.name: check.status for check in model.checks}
    assert (status["certificate interval"], status["certificate smoothing"]) == ("pass", "skip")
    linf_table = printed.out[printed.out.index("ℓ∞, worst case") : printed.out.index("ℓ2, worst case")]
    assert linf_table.count("certified ┃") == len(linf.budgets)
    assert "ℓ2, certified beside robust under attack" in printed.out
    assert "smoothing certifies the smoothed classifier" in " ".join(printed.out.split())
    assert "interval certificate of vanilla: 100%" in printed.err
    rows = list(csv.DictReader((tmp_path / "r/robustness.csv").open()))
    assert [row["certified_interval"] for row in rows] == [*(str(b.certified) for b in interval.budgets), "", ""]
    images = list(csv.DictReader((tmp_path / "r/images.csv").open()))
    for c in model.certificates:
        for b in c.budgets:
            assert sum(int(row[f"certified_{c.certificate}_{b.eps:g}"]) for row in images) == b.certified
    assert all(float(row["radius_lipschitz"]) >= 0 for row in images)
    report = (tmp_path / "r/report.html").read_text()
    assert "certified beside robust under attack" in report
    assert "<td>the smoothed classifier</td>" in report
    for norm in ("linf", "l2"):
        assert f'<figure id="certified_{norm}">' in report
        assert matplotlib.image.imread(tmp_path / f"r/certified_{norm}.png").std() > 0.05
    if logger == "csv":
        return
    (offline,) = (tmp_path / "r/wandb").glob("offline-run-*")
    logged = {key for row in wandb_records.history(wandb_records.read_records(offline)) for key in row}
    assert {"certified/linf/_type", "certified/l2/_type", "figures/certified_linf/_type"} <= logged


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_within_a_certificate(trained, tmp_path, monkeypatch):
    options = [*CERTIFIED, "sanity_images=0", "logger=csv", f"checkpoint={trained.directory}/vanilla"]
    whole = evaluate(composed("evaluate", *options, f"output_dir={tmp_path}/whole"))
    monkeypatch.setattr(journal_of.FileJournal, "SECONDS", 0.0)
    bound, seen = certificates.Smoothing.bound, []

    def interrupted(self, model, images, *rest):
        seen.append(len(images))
        if len(seen) == 4:  # the first is the trial before the attacks
            raise KeyboardInterrupt
        return bound(self, model, images, *rest)

    monkeypatch.setattr(certificates.Smoothing, "bound", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(composed("evaluate", *options, f"output_dir={tmp_path}/part"))
    again = evaluate(composed("evaluate", *options, f"output_dir={tmp_path}/part", "resume=true"))
    assert seen[4:] == [1, 3, 3], "the trial, and the two batches that were missing"
    assert again == whole


def test_a_comparison_shows_certificates_where_there_are_any(trained, tmp_path, capsys):
    options = ["attack.pgd_linf.eps=[0.01]", "attack.pgd_linf.steps=2", "limit=5", "sanity_images=0", "logger=csv"]
    options += ["geometry_images=0", "reliability=false"]
    for name, certificate in (("vanilla", []), ("frobenius", ["certificate=interval"])):
        place = [f"checkpoint={trained.directory}/{name}", f"output_dir={tmp_path}/{name}"]
        evaluate(composed("evaluate", *options, *certificate, *place))
    capsys.readouterr()
    together = compare([tmp_path / "vanilla", tmp_path / "frobenius"], tmp_path / "both")
    assert list(together.certificates) == ["interval"]
    printed = capsys.readouterr().out
    assert "certified ┃" in printed
    assert "– │" in printed, "of the one without a certificate"
    rows = list(csv.DictReader((tmp_path / "both/runs.csv").open()))
    assert [row["certified_accuracy_linf_0.01"] == "" for row in rows] == [True, False]


def test_a_results_file_of_before_certificates_is_read():
    old = json.loads((ROOT / "docs/results/standard/robustness.json").read_text())
    assert old["format"] < 5
    results = Results.model_validate(old)
    assert results.certificates == {}
    assert results.models[0].threats[0].budgets[0].certified is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["certificate=lipschitz"], "certificate.lipschitz certifies in l2, and no attack has a budget there"),
        (["certificate=interval", "certificate.crown.batch_size=2"], "certificate.crown.batch_size: there is no"),
        (["certificate=smoothing", "attack=pgd_l2", "certificate.smoothing.confidence=1"], "less than 1"),
        (
            ["certificate=lipschitz", "attack=pgd_l2", "model=resnet18", "data=mnist"],
            "the layer group_norm has no Lipschitz rule",
        ),
    ],
)
def test_what_cannot_be_certified_is_refused_in_one_line(options, said, trained, door, monkeypatch):
    monkeypatch.setattr(PGD, "perturb", lambda *_: pytest.fail("attacked"))
    where = [] if "model=resnet18" in options else [f"checkpoint={trained.directory}/vanilla"]
    channels = ["model.channels=1"] if not where else []
    assert said in door("evaluate", *where, *options, *channels, "logger=csv", "limit=2").error


def test_a_training_that_could_not_be_certified_is_refused_before_its_first_step(door):
    options = ["evaluate=true", "certificate=lipschitz", "attack=pgd_l2", "model=resnet18", "model.channels=1"]
    refused = door("train", *options, "regularizer=none", "logger=csv", "data.validation_size=200").error
    assert "certificate.lipschitz: model: the layer group_norm has no Lipschitz rule" in refused


def test_it_is_said_that_a_suites_settings_stay_without_its_attacks(trained, door):
    options = ["suite=note", "attack=fgsm", "attack.fgsm.eps=[0.1]", "limit=2", "sanity_images=0", "geometry_images=0"]
    done = door("evaluate", f"checkpoint={trained.directory}/vanilla", *options, "reliability=false", "logger=csv")
    assert "suite=note: attack=fgsm instead of its own; its other settings stay" in done.stdout


def certified_network(steps):
    """A small conv_small, trained for some steps by interval bounds on real digits, and test images."""
    torch.manual_seed(0)
    data = MNISTDataModule(root=str(ROOT / "data"), validation_size=0)
    for stage in ("fit", "test"):
        data.setup(stage)
    images, labels = data.split("train").first(64 * steps)
    model = ConvSmall(first=8, second=16, hidden=64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step, (x, y) in enumerate(zip(images.split(64), labels.split(64), strict=True)):
        bounds = margin_bounds(model, x, y, 0.1 * min(1.0, 2 * step / steps))
        loss = nn.functional.cross_entropy(model(x), y) + nn.functional.cross_entropy(bounds, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), *data.split("test").first(60)


def test_no_certified_digit_of_a_trained_network_is_broken():
    model, images, labels = certified_network(150)
    asked = [IntervalBounds(name="interval"), CROWN(name="crown")]
    attack = PGD(name="margin", norm="linf", eps=(1.0,), steps=40, step_size=0.01, loss="margin", restarts=2)
    result = evaluate_robustness(
        model, images, labels, [0.02, 0.05, 0.1], attacks=[attack], certificates=asked, sanity_images=0
    )
    interval, crown = result.results.models[0].certificates
    assert [b.certified for b in interval.budgets][1] > 20
    assert all(mine.certified >= b.certified for mine, b in zip(crown.budgets, interval.budgets, strict=True))
    assert interval.broken == crown.broken == []
    assert result.verdict == "pass"

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest

from jacobian_robust.errors import UserError
from jacobian_robust.evaluation.evaluate import evaluate
from jacobian_robust.reporting import figures as plots
from jacobian_robust.robustness.schema import Results
from jacobian_robust_studies.note import COST, NETWORKS, Network, Outcome, cost, reproduce, table

from ..end_to_end.conftest import ROOT, composed
from ..robustness.test_schema import model

VANILLA = Network("note_vanilla", "vanilla", (9740, 4138))


def outcome(seed):
    results = Results(
        split="test",
        independent=True,
        seed=0,
        device="cpu",
        versions={},
        attacks={},
        models=[model("vanilla", seed, 0.9, 0.5)],
    )
    return Outcome(VANILLA, seed, results, [])


def test_the_table_has_the_notes_row_ours_and_the_spread_of_the_seeds():
    lines = table([outcome(0), outcome(1)]).splitlines()
    assert "| vanilla, **the note** | | 9740 | 4138 (42%) | |" in lines
    assert "| vanilla | 1 | 90 | 50 (50.0%) | – |" in lines
    assert "| vanilla | mean ± s.d. | 90 ± 0 | 50 ± 0 | |" in lines


def test_the_presets_of_all_networks_exist():
    for network in NETWORKS:
        assert (ROOT / "conf" / "experiment" / f"{network.experiment}.yaml").is_file()


def test_the_committed_document_says_what_the_committed_files_do():
    """Where it does not, python -m jacobian_robust_studies.note writes it anew from them."""
    results = ROOT / "docs" / "results"
    outcomes = []
    for network in NETWORKS:
        for weights in sorted((results / "checkpoints").glob(f"{network.experiment}*.safetensors")):
            if found := re.fullmatch(rf"{network.experiment}(?:_seed(\d+))?", weights.stem):
                name = f"{weights.stem}_{network.model}" if network.model else weights.stem
                stored = Results.model_validate_json((results / "note" / f"{name}.json").read_bytes())
                assert stored.models[0].sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
                outcomes.append(Outcome(network, int(found[1] or 0), stored, []))
    assert len(outcomes) >= len(NETWORKS)
    _, _, rest = (
        (results / "note.md").read_text().partition("<!-- written by python -m jacobian_robust_studies.note -->")
    )
    written, _, _ = rest.partition("<!-- end of what it writes -->")
    assert written.startswith(f"\n\n{table(outcomes)}\n{cost(ROOT / COST)}\n![")


def test_what_is_known_of_other_networks_stays_in_the_document(tmp_path, monkeypatch):
    committed = ROOT / "docs" / "results"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jacobian_robust_studies.note.run_entry_point", lambda *_: pytest.fail("nothing is missing"))
    monkeypatch.setattr(plots, "save", lambda *_: None)
    for name in ("checkpoints", "note"):
        (tmp_path / name).symlink_to(committed / name)
    shutil.copy(committed / "note.md", tmp_path)
    one = [network for network in NETWORKS if network.experiment == "note_vanilla"]
    outcomes = reproduce(one, [0], results=tmp_path, runs=tmp_path / "runs")
    assert len(outcomes) > 5
    assert (tmp_path / "note.md").read_text() == (committed / "note.md").read_text()


def test_the_costs_are_the_measured_ones_and_a_bias_is_told(tmp_path):
    measured = json.loads((ROOT / COST).read_text())
    measured["steps"]["1 probe"]["ratio"] = 1.96
    measured["errors"]["1 probe"] |= {"bias_of_square": -0.05, "standard_error": 0.01}
    path = tmp_path / "step_cost.json"
    path.write_text(json.dumps(measured))
    told = cost(path)
    assert "| 2.0 |" in told
    assert "do not agree in value" in told
    assert "-5.00% ± 1.00% with 1 probe" in told
    path.write_text("{}")
    with pytest.raises(UserError, match=r"not what benchmarks/step_cost\.py writes"):
        cost(path)


def test_outside_a_clone_it_says_where_to_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="in a clone"):
        reproduce([VANILLA], [0], results=tmp_path, runs=tmp_path / "runs")


def test_a_document_without_its_marks_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "note.md").write_text("Written by hand.")
    with pytest.raises(UserError, match="put both back"):
        reproduce([VANILLA], [0], results=tmp_path, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_committed_weights_attacked_again_are_the_recorded_ones(tmp_path):
    """The record is of three attacks together, with other starts: what PGD alone breaks, it has as broken."""
    with (ROOT / "docs" / "results" / "standard" / "images.csv").open() as file:
        recorded = [row for row in csv.DictReader(file) if row["name"] == "note_vanilla"][:30]
    weights = ROOT / "docs" / "results" / "checkpoints" / "note_vanilla.safetensors"
    options = ["attack=pgd_linf", "attack.pgd_linf.eps=[0.1,0.15,0.2,0.3]", "limit=30", "sanity_images=0", "logger=csv"]
    options += ["geometry_images=0", "reliability=false", f"output_dir={tmp_path}/r"]
    evaluate(composed("evaluate", *options, f"checkpoint={weights}"))
    with (tmp_path / "r" / "images.csv").open() as file:
        again = list(csv.DictReader(file))
    for ours, theirs in zip(again, recorded, strict=True):
        assert (ours["label"], ours["predicted"]) == (theirs["label"], theirs["predicted"])
        assert float(ours["confidence"]) == pytest.approx(float(theirs["confidence"]), abs=1e-5)
        for eps in ("0.1", "0.15", "0.2", "0.3"):
            assert ours[f"robust_linf_{eps}"] == "1" or theirs[f"robust_linf_{eps}"] == "0"
    assert sum(row["robust_linf_0.1"] == "0" for row in again) > 5
    assert sum(row["robust_linf_0.3"] == "0" for row in again) > 25


@pytest.mark.slow
def test_it_makes_what_is_missing_only_and_keeps_what_was_written_by_hand(tmp_path):
    def run():
        command = [
            sys.executable,
            "-m",
            "jacobian_robust_studies.note",
            "--experiments",
            "note_vanilla",
            "--limit",
            "20",
        ]
        places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
        short = ["--", "trainer.max_epochs=1", "trainer.limit_train_batches=20", "trainer.limit_val_batches=2"]
        done = subprocess.run([*command, *places, *short], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    document = tmp_path / "results" / "note.md"
    first = run()
    assert "train.py experiment=note_vanilla seed=0" in first
    assert "evaluate.py" in first
    written = document.read_text()
    assert "| vanilla, **the note** | | 9740 |" in written
    document.write_text(f"{written}\nBy hand.\n")
    again = run()
    assert ".py" not in again
    assert document.read_text() == f"{written}\nBy hand.\n"
    weights = tmp_path / "results" / "checkpoints" / "note_vanilla.safetensors"
    weights.unlink()
    assert "evaluate.py" not in run(), "the run that is there gives the same weights, which were attacked already"

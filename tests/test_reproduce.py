import subprocess
import sys

import pytest

from jacobian_robust.errors import UserError
from jacobian_robust.reproduce import NETWORKS, Network, Outcome, reproduce, table
from jacobian_robust.results import Results

from .end_to_end.conftest import ROOT
from .test_results import model

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
def test_it_makes_what_is_missing_only_and_keeps_what_was_written_by_hand(tmp_path):
    def run():
        command = [sys.executable, "-m", "jacobian_robust.reproduce", "--experiments", "note_vanilla", "--limit", "20"]
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

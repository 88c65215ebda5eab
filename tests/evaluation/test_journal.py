"""What an evaluation keeps of its progress, and shows of it."""

import pytest

from jacobian_robust.errors import UserError
from jacobian_robust.evaluation import journal as journal_of


def test_progress_of_other_weights_is_not_taken(tmp_path, monkeypatch):
    journal = journal_of.FileJournal(tmp_path / "progress" / "0_linf.pt", {"sha256": "a"})
    monkeypatch.setattr(journal_of.FileJournal, "SECONDS", 0.0)
    journal.save(lambda: {"stage": 1})
    assert journal.load() == {"stage": 1}
    with pytest.raises(UserError, match="another evaluation"):
        journal_of.FileJournal(tmp_path / "progress" / "0_linf.pt", {"sha256": "b"}).load()


def test_the_bar_of_noise_shows_its_standard_deviation(capsys):
    bars = journal_of.Bars("vanilla", "gaussian")
    bars("gaussian_noise", 0.2, 0, 10, 10)
    bars.close()
    assert "gaussian_noise σ=0.2 on vanilla" in capsys.readouterr().err

"""The comparison of defences, whose command was replaced: its page says what its files say."""

import json
from pathlib import Path

import pytest

from .test_result_tables import rows

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("page", ["defences.md", "defences/appendix.md"])
def test_the_tables_under_autoattack_are_what_the_files_say(page):
    written = {row[0].partition(" (")[0]: row for row in rows(RESULTS / page, "% | adversarial examples")[-26:]}
    for name, cells in written.items():
        (model,) = json.loads((RESULTS / "defences" / f"{name}_autoattack.json").read_text())["models"]
        robust = [budget["robust_accuracy"] for threat in model["threats"] for budget in threat["budgets"]]
        shares = [f"{100 * share:.1f}" for share in (model["clean_accuracy"], *robust)]
        assert shares == [cell for cell in cells[2:] if cell != "1"][:6]
    assert len(written) == (19 if page == "defences.md" else 26)

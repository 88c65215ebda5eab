"""What the documents say of the tests is so, and what they link to is there."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from .conftest import COLLECTED
from .end_to_end.conftest import composed
from .end_to_end.test_fuzz import BASES, VALUES, leaves

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCUMENT.splitlines() if "`test_" in line]


def test_every_fault_has_as_many_cases_as_the_document_says(request):
    found, totals = Counter(request.config.stash[COLLECTED]), []
    named = [re.findall(r"`([\w/]+\.py)`", row[-1]) for row in ROWS]
    assert all((ROOT / "tests" / file).is_file() for file in set().union(*named))
    if not set().union(*named) <= {file for file, _, _ in found}:
        pytest.skip("of all tests, which are not all here")
    for column, mark in ((2, "ordinary"), (3, "slow")):
        counts = [
            sum(found[file, test, mark] for file in files for test in re.findall(r"`(test_\w+)`", row[-1]))
            for files, row in zip(named, ROWS, strict=True)
        ]
        assert [row[column] for row in ROWS] == [str(count or "–") for count in counts]
        totals.append(sum(counts))
    assert f"{totals[0]} in the ordinary run, {totals[1]} more" in DOCUMENT


def test_as_many_wrong_values_are_tried_as_the_document_says():
    names = sum(
        name.startswith(group)
        for door, base, group in BASES
        for name in leaves(composed(door, *base, "output_dir=run"))
    )
    assert f"{names:,} values, `slow` {len(VALUES) * names:,}" in DOCUMENT


def test_nothing_imports_training_and_training_alone_evaluation():
    importing = {
        (module.stem, imported)
        for module in (ROOT / "src" / "jacobian_robust").glob("*.py")
        for imported in re.findall(
            r"^\s*(?:from|import) jacobian_robust(?:\.| import )(training|evaluation)\b",
            module.read_text(),
            re.MULTILINE,
        )
    }
    assert importing == {("training", "evaluation")}


def test_what_the_documents_link_to_is_part_of_the_project():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    files = {Path(name) for name in listed.stdout.split("\0") if name}
    places = files | {parent for file in files for parent in file.parents}
    links = [
        (document, target)
        for document in sorted(file for file in files if file.suffix == ".md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / document).read_text())
        if "://" not in target
    ]
    assert len(links) > 40
    missing = [
        f"{document}: {target}"
        for document, target in links
        if Path(os.path.normpath(document.parent / target)) not in places
    ]
    assert not missing

"""What the documents link to is there."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


def test_the_tests_that_the_page_of_faults_names_are_there():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 40
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)
    }
    assert not set(named) - defined
    assert not [file for file in re.findall(r"`([\w/]+\.py)`", text) if not (ROOT / "tests" / file).is_file()]

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


def sentences(text):
    """The numbers of words of a document's sentences: without headings, tables, code and what links lead to."""
    text = re.sub(r"```[\s\S]*?```|^\s*\|.*$|^#.*$|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", text)
    parts = [
        part for p in paragraphs for part in re.split(r"(?<=[.!?])\**\)?\s+(?=[A-Z0-9*(`‖ℓ])", " ".join(p.split()))
    ]
    return [words for part in parts if (words := len(re.findall(r"\S*\w\S*", part)))]


@pytest.mark.parametrize("document", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_sentences_are_short(document):
    words = sentences(document.read_text())
    assert not words or sum(words) / len(words) <= 20

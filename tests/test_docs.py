"""What README, CHANGELOG and guides say of the code is so: counts, paths, parts.

Run: pytest tests/test_docs.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glm4ft.testing.checks import all_checks
from glm4ft.testing.faults.registry import MADE_UP, all_faults
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.subjects.plain_loop import Subject

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")) if path.is_file()]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs docs/; the source distribution has none")

COUNTS = {
    r"(\d+) claims": len(all_checks()),
    # the practices are tried on the faults of the dense base
    r"\d+ of (\d+) \(\d+%\) \|": sum(f.subject.architecture == Subject.architecture for f in all_faults().values()),
    r"(\d+) bugs": len(all_faults()),
    r"(\d+) of them from public reports": sum(fault.evidence != MADE_UP for fault in all_faults().values()),
    r"silent on (\d+) of those": len(all_variations()),
    r"(\d+) harmless variations": len(all_variations()),
}


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_counts_agree_with_the_code(name: str) -> None:
    text = " ".join((ROOT / name).read_text("utf-8").split())
    told = [(pattern, int(found)) for pattern in COUNTS for found in re.findall(pattern, text)]
    assert len(told) >= 3
    assert [(pattern, found) for pattern, found in told if found != COUNTS[pattern]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    named = set(re.findall(r"\b(?:glm4ft|tests|docs)/[\w/]+\.\w+", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    missing = [name for name in named if not ((ROOT / name).exists() or (page.parent / name).exists())]
    assert missing == []


def test_architecture_names_what_there_is() -> None:
    """Each part of the package, and modules and functions of the two walks under the names that they have."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    parts = {path.stem for path in (ROOT / "glm4ft").iterdir() if path.suffix in ("", ".py")} - {
        "__init__", "__main__", "__pycache__", "demo", "_template",
    }  # fmt: skip
    described = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\*\*(.*?)\*\*", text, re.MULTILINE))))
    assert described == parts
    walks = text.split("## Walk 1")[1]
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "glm4ft").rglob("*.py"))
    for name in re.findall(r"`([\w/]+\.py)`", walks):
        assert list((ROOT / "glm4ft").rglob(name)), name
    for name in re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", walks):
        assert re.search(rf"\b(def|class) {name}\b", code), name

"""What the documents point to is there: tests, files, headings; and what compatibility and upgrade state is judged."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for path in ROOT.glob("*/README.md") if not path.parts[-2].startswith(".")),
    *sorted((ROOT / "tests").glob("*/README.md")),
]
JUDGED = ("compatibility", "upgrade", "install", "versioning")
"""Documents whose tables say of each statement what shows it."""

_LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def defined_in(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"def (test_\w+)", path.read_text()))


@cache
def files() -> dict[str, Path]:
    return {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}


def anchors(path: Path) -> set[str]:
    """The headings of a document, as links name them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def rows(text: str) -> list[list[str]]:
    """The cells of every table row but heads and rules, with the head's cells in front of each table's rows."""
    found = []
    head: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if head is None:
            head = cells
        elif not set(line) <= set("|-: "):
            found.append([head[-1], *cells])
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_is_named_exists(path):
    text = path.read_text()
    for name in re.findall(r"\b(tests/[\w./-]+\.(?:py|yaml))", text):
        assert (ROOT / name).is_file(), name
    everything = frozenset().union(*map(defined_in, files().values()))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named <= everything


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for link in _LINK.findall(path.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("name", JUDGED)
def test_every_statement_is_shown_by_something_or_said_not_to_be(name):
    """And a test that is named beside a file stands in that file."""
    found = [row for row in rows((ROOT / "docs" / f"{name}.md").read_text()) if row[0] in {"shown by", "by whom"}]
    assert len(found) > 5
    file: Path | None = None
    for _, *cells in found:
        shown = f"{cells[-1]} {cells[-2] if len(cells) > 2 else ''}"
        words = ("not tested", "not run", "by hand", "`make ", "vagrant")
        cited = [Path(each).name for each in re.findall(r"[\w./-]+\.(?:py|yaml)\b", cells[-1])]
        again = "same file" in cells[-1] or "same test" in cells[-1]
        assert cited or again or any(word in shown for word in words), cells
        pythons = [files()[each] for each in cited if each in files()]
        file = pythons[0] if pythons else file
        for test in re.findall(r"`(test_\w+)`", cells[-1]):
            homes = pythons or [file]
            assert any(home is not None and test in defined_in(home) for home in homes), test

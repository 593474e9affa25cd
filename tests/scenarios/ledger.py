"""The ledger: what shows each clause of the behaviour document.

`coverage.yaml` maps the clauses of sections 1 to 3 and 7 to 10 and the rows of section 11 to scenarios and tests that
cite them, or to the issue that will bring them, or to the reason why nothing does.  A test cites by its text (`NOD-6`,
`HC-20 to HC-23`) or by its name (`test_nod_6_...`).  `python -m tests.scenarios.ledger` adds the
scenarios and tests that cite a clause and keeps what people wrote; what is neither cited nor explained stays a gap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
from ryaml import loads  # type: ignore[attr-defined]  # its stubs don't export it

from tests.scenarios.schema import DIRECTORY, REPOSITORY, Scenario, load_all

COVERAGE = DIRECTORY / "coverage.yaml"
CLAUSES = REPOSITORY / "tests" / "data" / "clauses.txt"
SECTIONS = ("1", "2", "3", "7", "8", "9", "10", "11")

_HEAD = """\
# What shows each clause of sections 1 to 3 and 7 to 10 and each row of section 11 of the kube-proxy behaviour document:
# scenarios and test files that cite it; or the issue that will bring it; or why nothing does.  README.md says more.
# `python -m tests.scenarios.ledger` adds new citations.
"""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What shows one clause."""

    scenarios: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    issue: int = 0
    """The issue that will bring it."""
    why: str = ""
    """Why nothing shows it, or what is left when something does."""


def clauses() -> dict[str, str]:
    """Every clause id and its section, in the order of the document."""
    lines = (line.split() for line in CLAUSES.read_text().splitlines() if not line.startswith("#"))
    return {clause: section for section, clause in lines}


def read() -> dict[str, Entry]:
    """The ledger as it is."""
    return msgspec.convert(loads(COVERAGE.read_text()), dict[str, Entry])


def problems(ledger: Mapping[str, Entry], scenarios: list[Scenario]) -> list[str]:
    """What is wrong with a ledger: gaps, names that don't exist, and citations that nobody makes."""
    known = clauses()
    by_name = {scenario.name: scenario for scenario in scenarios}
    found = []
    for scenario in scenarios:
        found += [f"{scenario.name} cites {clause}, which does not exist" for clause in scenario.cites() - known.keys()]
    found += [f"there is no clause {clause}" for clause in ledger.keys() - known.keys()]
    for clause, section in known.items():
        entry = ledger.get(clause, Entry())
        if section in SECTIONS and entry == Entry():
            found.append(f"nothing shows {clause}, and nothing says why")
        for name in entry.scenarios:
            if name not in by_name:
                found.append(f"{clause}: there is no scenario {name}")
            elif clause not in by_name[name].cites():
                found.append(f"{clause}: {name} does not cite it")
        for test in entry.tests:
            path = REPOSITORY / test
            if not path.is_file():
                found.append(f"{clause}: there is no file {test}")
            elif clause not in cited(path.read_text()):
                found.append(f"{clause}: {test} does not cite it")
    return found


def cited(text: str) -> set[str]:
    """The clause ids in a text, and in the names of its tests."""
    found = set(re.findall(r"\b[A-Z]+-T?\d+\b", text))
    for kind, numbers in re.findall(r"\bdef test_([a-zA-Z]{2,4})_?(\d+(?:_(?:and_|to_)?\d+)*)_", text):
        text += f" {kind.upper()}-" + numbers.replace("_and_", "_").replace("_to_", " to ").replace(
            "_", f" {kind.upper()}-"
        )
    found |= set(re.findall(r"\b[A-Z]+-T?\d+\b", text))
    for kind, first, last in re.findall(r"\b([A-Z]+)-(\d+) to (?:\1-)?(\d+)\b", text):
        found |= {f"{kind}-{number}" for number in range(int(first), int(last) + 1)}
    return found


def refreshed(ledger: Mapping[str, Entry], scenarios: list[Scenario], tests: Mapping[str, str]) -> dict[str, Entry]:
    """A ledger with every citation of today: of scenarios, and of test files by their texts."""
    shown = {scenario.name: scenario.cites() for scenario in scenarios}
    citing = {name: cited(text) for name, text in tests.items()}
    result = {}
    for clause, section in clauses().items():
        entry = msgspec.structs.replace(
            ledger.get(clause, Entry()),
            scenarios=tuple(sorted(name for name, ids in shown.items() if clause in ids)),
            tests=tuple(sorted(name for name, ids in citing.items() if clause in ids)),
        )
        if section in SECTIONS:
            result[clause] = entry
    return result


def write(ledger: Mapping[str, Entry]) -> None:
    """A line per clause; JSON's flow style is YAML's too."""
    lines = (f"{clause}: {_flow(entry)}" for clause, entry in ledger.items())
    COVERAGE.write_text(_HEAD + "\n".join(lines) + "\n")


def _flow(entry: Entry) -> str:
    parts = (f"{name}: {msgspec.json.encode(value).decode()}" for name, value in msgspec.to_builtins(entry).items())
    return "{" + ", ".join(parts) + "}"


def _test_files() -> dict[str, str]:
    folders = (REPOSITORY / "tests" / "unit", REPOSITORY / "tests" / "netns")
    files: list[Path] = [file for folder in folders for file in sorted(folder.glob("test_*.py"))]
    # The ledger's own test names clauses as examples.
    return {str(file.relative_to(REPOSITORY)): file.read_text() for file in files if "ledger" not in file.name}


if __name__ == "__main__":
    write(refreshed(read() if COVERAGE.exists() else {}, load_all(), _test_files()))

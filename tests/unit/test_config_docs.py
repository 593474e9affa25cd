"""docs/configuration.md says what the schema does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from proxy.config import flags
from proxy.config.gates import GATES, PLANNED, Use
from proxy.config.schema import FIELDS, OWN_FIELDS
from proxy.config.values import render

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def test_the_tables_have_every_field_with_its_default_and_what_a_change_does():
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (live|restart) \|", TEXT, re.MULTILINE)
    expected = [
        (
            field.path,
            json.dumps(render(field.type, field.default)).strip('"') or '""',
            "live" if field.live else "restart",
        )
        for field in (*FIELDS, *OWN_FIELDS)
    ]
    assert rows == expected


def test_it_names_the_gates_that_matter_and_our_own_flags():
    for name in [*PLANNED, *(name for name, gate in GATES.items() if gate.use is not Use.OTHER)]:
        assert f"`{name}`" in TEXT
    for flag in flags.FLAGS:
        assert not flag.own or f"--{flag.name}" in TEXT

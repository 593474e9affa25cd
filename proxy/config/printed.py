"""The effective configuration in print: the v1alpha1 object of /configz, and what `sluice config` shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from proxy.config.merge import DEFAULT, Merged
from proxy.config.schema import FIELDS, GROUP_VERSION, KIND, OWN_FIELDS, OWN_GROUP_VERSION, OWN_KIND, Field
from proxy.config.values import render

_COLUMN = 48
"""Where comments begin, if the values leave room."""


def v1alpha1(merged: Merged) -> dict[str, Any]:
    """The configuration as kube-proxy prints it: only the section of the mode carries periods (CFG-13)."""
    values = dict(merged.values)
    for section in ("iptables", "ipvs", "nftables"):
        for name, nothing in (("syncPeriod", 0), ("minSyncPeriod", 0), ("masqueradeAll", False)):
            holds = section == ("iptables" if name == "masqueradeAll" and merged.section == "ipvs" else merged.section)
            if not holds and f"{section}.{name}" in values:
                values[f"{section}.{name}"] = nothing
    values["mode"] = values["mode"] or "iptables"
    return {"kind": KIND, "apiVersion": GROUP_VERSION, **_nested(FIELDS, values)}


def own(merged: Merged) -> dict[str, Any]:
    """Sluice's own document: what in it is not as it would be without."""
    fields = [field for field in OWN_FIELDS if merged.values[field.path] != field.default]
    if not fields:
        return {}
    return {"kind": OWN_KIND, "apiVersion": OWN_GROUP_VERSION, **_nested(fields, merged.values)}


def yaml_with_origins(merged: Merged) -> str:
    """Both documents as YAML that loads again, each value with a comment that says where it came from."""
    heads = ((GROUP_VERSION, KIND, FIELDS), (OWN_GROUP_VERSION, OWN_KIND, OWN_FIELDS))
    documents = (
        "\n".join((f"apiVersion: {version}", f"kind: {kind}", *_lines(fields, merged)))
        for version, kind, fields in heads
    )
    return "\n---\n".join(documents) + "\n"


def json_with_origins(merged: Merged) -> dict[str, Any]:
    """Both documents, and the origin of each field by its path."""
    return {
        "configuration": {"apiVersion": GROUP_VERSION, "kind": KIND, **_nested(FIELDS, merged.values)},
        "sluice": {"apiVersion": OWN_GROUP_VERSION, "kind": OWN_KIND, **_nested(OWN_FIELDS, merged.values)},
        "origins": {path: merged.origins.get(path, DEFAULT)._asdict() for path in merged.values},
    }


def _nested(fields: Iterable[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for field in fields:
        value = values[field.path]
        if field.omit_empty and not value:
            continue
        *sections, name = field.path.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = render(field.type, value)
    return result


def _lines(fields: Iterable[Field], merged: Merged) -> Iterator[str]:
    import json  # noqa: PLC0415  # next to its one use: JSON's scalars, lists and maps are YAML's too

    before: list[str] = []
    for field in fields:
        *sections, name = field.path.split(".")
        for depth, section in enumerate(sections):
            if sections[: depth + 1] != before[: depth + 1]:
                yield f"{'  ' * depth}{section}:"
        before = sections
        value = json.dumps(render(field.type, merged.values[field.path]), ensure_ascii=True)
        line = f"{'  ' * len(sections)}{name}: {value}"
        yield f"{line:<{_COLUMN}}  # {_one_line(str(merged.origins.get(field.path, DEFAULT)))}"


def _one_line(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")

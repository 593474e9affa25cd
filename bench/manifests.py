"""The objects of a cluster as files, as `kubectl get services,endpointslices -o json` (or yaml) prints them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench.cluster import Cluster

_PER_YAML_FILE = 20_000
"""Services; the agent refuses YAML files of more than 64 MiB."""


def write_json(cluster: Cluster, directory: Path) -> Path:
    """All in one file."""
    path = directory / "objects.json"
    items = [_shown(each) for each in (*cluster.all_services(), *cluster.all_slices())]
    path.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items}))
    return path


def write_yaml(cluster: Cluster, directory: Path) -> Path:
    """A file, or a directory of files where one would be too large."""
    path = directory / "objects"
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    services, slices = list(cluster.all_services()), list(cluster.all_slices())
    files = []
    for first in range(0, cluster.services, _PER_YAML_FILE):
        part = slice(first, first + _PER_YAML_FILE)
        files.append(path / f"objects-{first}.yaml")
        with files[-1].open("w") as file:
            file.write("apiVersion: v1\nkind: List\nitems:\n")
            for each in (*services[part], *slices[part]):
                file.writelines(_yaml(_shown(each), "- ", "  "))
    return path if len(files) > 1 else files[0]


def _shown(data: bytes) -> dict[str, Any]:
    """An object as kubectl shows it: without managedFields."""
    value: dict[str, Any] = msgspec.json.decode(data)
    value["metadata"].pop("managedFields", None)
    return value


def _yaml(value: dict[str, Any] | list[Any], first: str, indent: str) -> Iterator[str]:
    """Lines of a mapping or a list that is not empty; `first` stands before the first line, `indent` before others."""
    pairs = [(f"{name}:", each) for name, each in value.items()] if isinstance(value, dict) else None
    for head, each in pairs if pairs is not None else [("-", each) for each in value]:
        if isinstance(each, dict | list) and each:
            if head == "-":
                yield from _yaml(each, f"{first}- ", f"{indent}  ")
            else:
                yield f"{first}{head}\n"
                deeper = indent if isinstance(each, list) else f"{indent}  "
                yield from _yaml(each, deeper, deeper)
        else:
            yield f"{first}{head} {json.dumps(each)}\n"
        first = indent

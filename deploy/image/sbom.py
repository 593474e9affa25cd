# ruff: noqa: INP001 - a script, of no package
"""What is in a root file system, as a CycloneDX document (JSON, 1.5): Debian's packages and Python's distributions.

python3 sbom.py ROOT > sbom.cdx.json

It goes by what is installed, not by what was asked for: dpkg's status file, and the metadata beside each distribution.
The same root gives the same document, byte for byte.  It needs the standard library alone, so it runs in the image.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Iterator
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

_KERNELS = {"dev", "proc", "sys"}
"""What the kernel shows under a root that is in use."""


def debian(root: Path) -> Iterator[dict[str, Any]]:
    """The packages that dpkg has installed under a root; none where there is no dpkg."""
    status = root / "var/lib/dpkg/status"
    if not status.exists():
        return
    release = (root / "etc/os-release").read_text() if (root / "etc/os-release").exists() else ""
    named = dict(line.split("=", 1) for line in release.splitlines() if "=" in line)
    distribution = named.get("ID", "debian").strip('"')
    codename = named.get("VERSION_CODENAME", "").strip('"')
    for paragraph in status.read_bytes().split(b"\n\n"):
        package = BytesParser().parsebytes(paragraph.lstrip(b"\n"))
        if not package.get("Status", "").endswith(" installed"):
            continue
        name, version = package["Package"], package["Version"]
        where = f"arch={quote(package['Architecture'])}" + (f"&distro={quote(codename)}" if codename else "")
        yield {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/{distribution}/{quote(name)}@{quote(version, safe='')}?{where}",
        }


def python(root: Path) -> Iterator[dict[str, Any]]:
    """The distributions under a root, wherever an interpreter would find them."""
    tops = (each for each in sorted(root.iterdir()) if each.is_dir() and each.name not in _KERNELS)
    for metadata in (found for top in tops for found in top.glob("**/*.dist-info/METADATA")):
        about = BytesParser().parsebytes(metadata.read_bytes(), headersonly=True)
        name, version = about["Name"], about["Version"]
        component = {
            "type": "application" if name == "sluice-proxy" else "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{quote(name.lower().replace('_', '-'))}@{quote(version, safe='')}",
        }
        if licence := _licence(about):
            component["licenses"] = [{"license": {"name": licence}}]
        yield component


def _licence(about: Message) -> str:
    if expression := about.get("License-Expression"):
        return str(expression)
    classified = [each for each in about.get_all("Classifier", []) if each.startswith("License ::")]
    if classified:
        return ", ".join(each.rpartition(":: ")[2] for each in classified)
    lines = str(about.get("License") or "").splitlines()
    return lines[0] if lines else ""


def document(root: Path) -> dict[str, Any]:
    """The whole document for a root."""
    components = sorted([*debian(root), *python(root)], key=lambda each: str(each["purl"]))
    for each in components:
        each["bom-ref"] = each["purl"]
    digest = hashlib.sha256(json.dumps(components, sort_keys=True).encode()).digest()
    version = next((each["version"] for each in components if each["name"] == "sluice-proxy"), "unknown")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": "sluice", "version": version}},
        "components": components,
    }


def main() -> int:
    """Print the document for the root that is given."""
    match sys.argv[1:]:
        case [root] if Path(root).is_dir():
            json.dump(document(Path(root)), sys.stdout, indent=1, sort_keys=True)
            sys.stdout.write("\n")
            return 0
    sys.stderr.write("usage: sbom.py ROOT, a directory\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())

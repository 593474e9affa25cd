"""deploy/image/sbom.py on roots that were made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy/image/sbom.py"
STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 1:2.36-9+deb12u14
Description: a library
 in two lines

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    dpkg = tmp_path / "var/lib/dpkg"
    dpkg.mkdir(parents=True)
    (dpkg / "status").write_text(STATUS)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text("ID=debian\nVERSION_CODENAME=bookworm\n")
    for where, name, licence in (
        ("opt/sluice/lib", "sluice-proxy", "License-Expression: Apache-2.0"),
        ("usr/lib/python3", "Some_Thing", "Classifier: License :: OSI Approved :: MIT License"),
        ("proc/1/root", "of-another-root", ""),
    ):
        about = tmp_path / where / f"{name}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{licence}\n\nText: here\n")
    return tmp_path


def made(root: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-I", SCRIPT, root], check=True, capture_output=True)
    return json.loads(done.stdout)


def test_it_names_what_is_installed_by_package_url(root):
    assert {each["purl"] for each in made(root)["components"]} == {
        "pkg:deb/debian/libc6@1%3A2.36-9%2Bdeb12u14?arch=amd64&distro=bookworm",
        "pkg:pypi/sluice-proxy@1.0",
        "pkg:pypi/some-thing@1.0",
    }


def test_licences_are_taken_from_what_a_distribution_says(root):
    found = {each["name"]: each.get("licenses") for each in made(root)["components"]}
    assert found["sluice-proxy"] == [{"license": {"name": "Apache-2.0"}}]
    assert found["Some_Thing"] == [{"license": {"name": "MIT License"}}]


def test_the_same_root_gives_the_same_document_and_another_one_another_number(root):
    before = made(root)
    assert made(root) == before
    status = root / "var/lib/dpkg/status"
    status.write_text(status.read_text().replace("deb12u14", "deb12u15"))
    assert made(root)["serialNumber"] != before["serialNumber"]


def test_a_root_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "no"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: sbom.py ROOT, a directory\n")

"""What a purge of the Debian package removes of mode ipvs, by the programs of the system, as these would be called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rules.ipvs.marks import Role, scheme

POSTRM = Path(__file__).parents[2] / "deploy/debian/postrm"
ADDRESSES = """\
7: sluice-ipvs    inet 10.96.0.1/32 scope global sluice-ipvs\\       valid_lft forever preferred_lft forever
7: sluice-ipvs    inet6 fd00:10:96::1/128 scope global \\       valid_lft forever preferred_lft forever
"""
OURS, LAST = (scheme(1 << 14).mark(number, Role.EVERYBODY) for number in (1, 8_388_607))
SERVERS = f"""\
-A -t 10.96.0.1:80 -s rr
-a -t 10.96.0.1:80 -r 10.244.1.1:8080 -m -w 1
-A -u 10.96.0.1:53 -s rr
-A --sctp-service 10.96.0.1:80 -s rr
-A -t 10.96.0.10:80 -s rr
-A -t [fd00:10:96::1]:80 -s rr
-A -t [fd00:10:96::11]:80 -s rr
-A -f {OURS} -s rr
-A -f {LAST} -6 -s rr
-A -f 77 -s rr
"""
SETS = "SLUICE-CLUSTER-IP\nSLUICE6-CLUSTER-IP\nKUBE-CLUSTER-IP\nNOT-SLUICE-1\n"


def purge(directory: Path, programs: dict[str, str]) -> tuple[list[str], str]:
    """What the script calls of these programs, and says; each is a script, of which others know by `calls`."""
    calls = directory / "calls"
    for name, script in programs.items():
        program = directory / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{script}\n')
        program.chmod(0o755)
    for name in ("awk", "grep", "tr", "sh"):
        (directory / name).symlink_to(f"/usr/bin/{name}")
    # So that nothing of this machine is removed.
    (directory / "rm").write_text(f'#!/bin/sh\necho "rm $*" >> {calls}\n')
    (directory / "rm").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(POSTRM), "purge"], env={"PATH": str(directory)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines(), done.stdout + done.stderr


def printing(text: str) -> str:
    """A shell's words that print a text, without a program."""
    return f"while read -r line; do printf '%s\\n' \"$line\"; done <<'END'\n{text}END\n"


@pytest.fixture
def programs() -> dict[str, str]:
    return {
        "ip": f'case "$*" in *address*) {printing(ADDRESSES)};; esac',
        "ipvsadm": f'case "$*" in *--save*) {printing(SERVERS)};; esac',
        "ipset": f'case "$*" in *list*) {printing(SETS)};; esac',
    }


@pytest.mark.skipif(not os.access("/usr/bin/awk", os.X_OK), reason="awk is not installed")
def test_ours_goes_and_what_others_have_stays(tmp_path, programs):
    calls, said = purge(tmp_path, programs)
    deleted = [call.removeprefix("ipvsadm ") for call in calls if call.startswith("ipvsadm -D")]
    assert deleted == [
        "-D -t 10.96.0.1:80",
        "-D -u 10.96.0.1:53",
        "-D --sctp-service 10.96.0.1:80",
        "-D -t [fd00:10:96::1]:80",
        f"-D -f {OURS}",
        f"-D -f {LAST} -6",
    ]
    assert "ip link delete dev sluice-ipvs" in calls
    assert [call for call in calls if "destroy" in call] == [
        "ipset destroy SLUICE-CLUSTER-IP",
        "ipset destroy SLUICE6-CLUSTER-IP",
    ]
    assert "removed the device sluice-ipvs" in said


def test_without_ipvsadm_the_device_goes_and_a_line_says_what_is_left(tmp_path, programs):
    del programs["ipvsadm"]
    calls, said = purge(tmp_path, programs)
    assert "ip link delete dev sluice-ipvs" in calls
    assert "virtual servers of mode ipvs are left" in said


def test_where_mode_ipvs_never_was_nothing_is_asked_for(tmp_path):
    calls, said = purge(tmp_path, {"ip": "exit 1"})
    assert calls == ["ip link show dev sluice-ipvs", "rm -rf /etc/sluice /run/sluice"]
    assert said == ""

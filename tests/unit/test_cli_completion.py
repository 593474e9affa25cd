"""Completion of command lines, and the manual page: both from the definitions that the help is made of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import cli, manual
from proxy.config import flags

SLUICE = Path(sys.executable).parent / "sluice"


def completed(*words):
    """What bash is told for a command line, the last word of which is not whole; words as bash splits them."""
    ended = subprocess.run(
        [SLUICE],
        env=os.environ
        | {
            "_SLUICE_COMPLETE": "bash_complete",
            "COMP_WORDS": "\n".join(words),
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr == ""
    return [line.partition(",")[2] for line in ended.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sluice", "co"], {"completion", "config", "conntrack"}),
        (["sluice", "run", "--proxy-m"], {"--proxy-mode"}),
        (["sluice", "run", "--proxy-mode", "i"], {"iptables", "ipvs"}),
        (["sluice", "run", "--proxy-mode", "=", "i"], {"iptables", "ipvs"}),
        (["sluice", "run", "--v=2", "--drift-policy", "=", ""], {"repair", "report"}),
        (["sluice", "render", "--masquerade-all", "=", "t"], {"true"}),
        (["sluice", "run", "--feature-gates", "=", "AllAlpha=true,AllB"], {"AllAlpha=true,AllBeta=true"}),
        (["sluice", "dump", "-o", "ra"], {"raw"}),
        (["sluice", "completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_completion_knows_verbs_flags_and_values(words, expected):
    incomplete = words[-1]
    found = completed(*words)
    assert expected <= set(found)
    assert all(each.startswith(incomplete) for each in found)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_one(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "_SLUICE_COMPLETE=" + shell in told.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=told.out, text=True, check=True)


def test_the_manual_page_has_every_verb_and_flag_and_no_mistake(capsys):
    assert cli.main(["man"]) == 0
    page = capsys.readouterr().out
    for verb in cli.sluice.commands:
        assert f"\n.SS {verb} " in page
    for name in flags.BY_NAME:
        escaped = f"--{name}".replace("-", r"\-")
        assert f"\n.B {escaped}" in page
    if shutil.which("groff"):
        ended = subprocess.run(["groff", "-man", "-ww", "-z"], input=page, text=True, capture_output=True, check=True)
        assert ended.stderr == ""


def test_a_text_cannot_become_a_request_of_troff():
    assert manual._escape(".TH `x` \\n -1\n'a") == r"\&.TH x \en \-1" + "\n" + r"\&'a"

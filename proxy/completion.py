"""Completion of command lines: click's, with Go's `--flag=value` understood in every shell."""

from __future__ import annotations

import click
from click import shell_completion
from click.shell_completion import BashComplete, ShellComplete

VARIABLE = "_SLUICE_COMPLETE"


class Bash(BashComplete):
    """For bash, which splits words at `=`."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        if incomplete == "=":
            incomplete = ""
        elif args[-1:] == ["="]:
            args.pop()
        return args, incomplete


def know_shells() -> None:
    """Have click use ours."""
    shell_completion.add_completion_class(Bash)


def script(command: click.Command, shell: str) -> str:
    """The script for a shell that completes command lines of `sluice`, by asking it."""
    found = Bash if shell == "bash" else shell_completion.get_completion_class(shell)
    assert found is not None
    # Of the base class: bash's own wants to run a bash first, to look at its version.
    return ShellComplete.source(found(command, {}, "sluice", VARIABLE))

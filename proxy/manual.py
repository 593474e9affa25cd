"""The manual page, from the definitions of which the help is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import metadata

import click

from proxy.command_line import FlagOption, GoCommand

_FILES = (
    ("/etc/sluice/config.yaml", "the configuration, where the systemd unit looks for it"),
    ("/run/sluice/agent.sock", "where the agent answers the other verbs; for root only"),
)
_CODES = (
    ("0", "done"),
    ("1", "what was asked about is not so; every error of run"),
    ("2", "the command line is wrong, or something failed"),
)


def page(group: click.Group, root: click.Context) -> str:
    """All verbs and their options in one page, as troff with the macros of man(7)."""
    return "\n".join(_lines(group, root)) + "\n"


def _lines(group: click.Group, root: click.Context) -> Iterator[str]:
    yield f'.TH SLUICE 8 "" "sluice {metadata.version("sluice-proxy")}" "System Administration"'
    yield ".SH NAME"
    yield r"sluice \- a service proxy for Kubernetes nodes"
    yield ".SH SYNOPSIS"
    yield ".B sluice\n.I verb\n.RI [ options ]"
    yield ".SH DESCRIPTION"
    yield _escape(group.help or "")
    yield ".PP"
    yield r"Started under the name kube\-proxy, it takes kube\-proxy's command line, as"
    yield ".B sluice run\ndoes."
    yield ".SH VERBS"
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        if command is not None and not command.hidden:
            yield from _verb(command, click.Context(command, info_name=name, parent=root))
    yield ".SH EXIT STATUS"
    yield from _pairs(_CODES)
    yield ".SH FILES"
    yield from _pairs(_FILES)
    yield ".SH SEE ALSO"
    yield ".BR nft (8),\n.BR iptables (8),\n.BR conntrack (8)"


def _verb(command: click.Command, ctx: click.Context) -> Iterator[str]:
    yield f".SS {_escape(' '.join((ctx.info_name or '', *command.collect_usage_pieces(ctx))))}"
    for number, paragraph in enumerate((command.help or "").split("\n\n")):
        if number:
            yield ".PP"
        yield _escape(" ".join(paragraph.split()))
    flags = [each for each in command.params if isinstance(each, FlagOption)]
    if isinstance(command, GoCommand) and command.name == "run":
        ours, theirs = command.options(ctx)
        yield from _pairs(ours)
        yield ".PP\nAs in kube\\-proxy:"
        yield from _pairs(theirs)
        return
    yield from _pairs(
        record for each in command.params if each not in flags and (record := each.get_help_record(ctx)) is not None
    )
    if flags:
        yield ".PP\nAnd of the options of run:"
        yield _escape(", ".join(each.opts[0] for each in flags)) + "."


def _pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in pairs:
        if text:
            yield f".TP\n.B {_escape(term)}\n{_escape(text)}"


def _escape(text: str) -> str:
    """Text that troff takes as it is, without markup of ours."""
    text = re.sub(r"`([^`]*)`", r"\1", text).replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)

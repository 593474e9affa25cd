"""What the verbs of the command line share: kube-proxy's flags as options of click, and how errors are told.

The flags are data in `proxy.config.flags`; from the same data come the help, shell completion and the manual page.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from proxy.config import flags
from proxy.config.errors import ConfigError
from proxy.config.flags import Flag
from proxy.config.values import Type, parse_bool

if TYPE_CHECKING:
    from proxy.config.settings import Settings

NODE_FLAGS = (
    "config",
    "proxy-mode",
    "hostname-override",
    "cluster-cidr",
    "service-cidrs",
    "nodeport-addresses",
    "bind-address",
    "detect-local-mode",
    "pod-bridge-interface",
    "pod-interface-name-prefix",
    "masquerade-all",
    "iptables-masquerade-bit",
    "iptables-localhost-nodeports",
    "feature-gates",
    "iptables-backend",
    "strict-config",
)
"""The flags of `run` on which depends what a node's tables are, and by what its kernel is read."""
READING_FLAGS = frozenset(("config", "iptables-backend", "run-directory"))
"""Those of them that mean something where a kernel or an agent is asked, without manifests."""

_FIRST = ("config", "kubeconfig")
"""Flags of kube-proxy that stand among the first in the help."""
_COLUMN = 44

METAVARS = {
    Type.STRING: "TEXT",
    Type.BOOL: "BOOL",
    Type.INT: "N",
    Type.FLOAT: "N",
    Type.DURATION: "DURATION",
    Type.FLUSH: "DURATION",
    Type.QUANTITY: "QUANTITY",
    Type.STRINGS: "LIST",
    Type.GATES: "GATES",
    Type.VMODULE: "PATTERN=N,...",
}


class GoCommand(click.Command):
    """A command that takes flags of `proxy.config.flags` in any of Go's spellings."""

    def __init__(self, *args: Any, flag_names: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flags = [flags.BY_NAME[name] for name in flag_names]
        self.params.extend(map(FlagOption, self.flags))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = {flag.name for flag in self.flags}
        try:
            normal = flags.normalise(args, names)
        except ConfigError:
            if not ctx.resilient_parsing:
                raise
            normal = flags.normalise(args[:-1], names)  # completion, of the value that is not there yet
        if not any(isinstance(param, click.Argument) for param in self.params):
            normal = [each for each in normal if each]  # `$(EXTRA_ARGS)` of a DaemonSet, with nothing in it (CFG-1)
        return super().parse_args(ctx, normal)

    def options(self, ctx: click.Context) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Spellings and help of all options: Sluice's own, then those as in kube-proxy."""
        ours: list[tuple[str, str]] = []
        theirs: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            flag = param.flag if isinstance(param, FlagOption) else None
            if record is not None:
                (ours if flag is None or flag.own or flag.name in _FIRST else theirs).append(record)
        return ours, theirs

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        ours, theirs = self.options(ctx)
        with formatter.section("Options"):
            formatter.write_dl(ours, col_max=_COLUMN)
        if theirs:
            with formatter.section("Options as in kube-proxy"):
                formatter.write_dl(theirs, col_max=_COLUMN)

    def given(self, params: dict[str, Any]) -> list[tuple[str, str]]:
        """The flags that were given, with their texts; taken out of `params`."""
        return [(flag.name, text) for flag in self.flags for text in params.pop(_variable(flag), ())]


class FlagOption(click.Option):
    """A flag as an option; its text is read by `proxy.config`, which knows Go's forms."""

    def __init__(self, flag: Flag) -> None:
        self.flag = flag
        text = flag.help
        if flag.default:
            text += f" [{flag.default}]"
        if not flag.honoured:
            text += " (no effect)"
        spellings = (f"--{flag.name}", "-v") if flag.name == "v" else (f"--{flag.name}",)
        super().__init__((*spellings, _variable(flag)), multiple=True, metavar=METAVARS[flag.type], help=text)

    def shell_complete(self, _ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What the value may be."""
        if self.flag.name in flags.PATHS:
            return [CompletionItem(incomplete, type="file")]
        if self.flag.type is Type.GATES:
            return _complete_gates(incomplete)
        words = ("true", "false") if self.flag.type is Type.BOOL else self.flag.words
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _complete_gates(incomplete: str) -> list[CompletionItem]:
    from proxy.config.gates import GATES, Use  # noqa: PLC0415  # only completion needs them on the command line

    before, comma, name = incomplete.rpartition(",")
    own = [each for each, gate in GATES.items() if gate.use is Use.OWN and not gate.locked and each.startswith(name)]
    return [CompletionItem(f"{before}{comma}{each}={word}") for each in own for word in ("true", "false")]


def _variable(flag: Flag) -> str:
    return "flag_" + flag.name.replace("-", "_")


class ReaderGoneError(Exception):
    """Nobody reads what is printed any more."""


class Verbs(click.Group):
    """The verbs; click would turn a reader that leaves into exit code 1, which means something else here."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGoneError from None


def given_flags(ctx: click.Context, params: dict[str, Any]) -> list[tuple[str, str]]:
    """The flags that a command was given, with their texts; taken out of `params`."""
    command = ctx.command
    assert isinstance(command, GoCommand)
    return command.given(params)


def settings_of(ctx: click.Context, given: list[tuple[str, str]]) -> Settings:
    """The effective configuration, its warnings told; of a verb that may have nothing to configure."""
    from proxy.config.settings import Settings  # noqa: PLC0415  # so that help does not load it

    if not given:
        return Settings()  # loading would cost more than all the rest of such a verb
    from proxy.config.load import load  # noqa: PLC0415  # likewise

    loaded = load(given)
    for warning in loaded.warnings:
        complain(ctx.command_path, warning)
    return loaded.settings


def is_true(texts: dict[str, str], name: str) -> bool:
    """Whether a flag was given and is true.

    Raises:
        ConfigError: it is neither true nor false.
    """
    try:
        return parse_bool(texts.get(name, "false"))
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None


def complain(command: str, message: str) -> None:
    """One line on standard error, whatever is in the message."""
    click.echo(f"{command}: {' '.join(message.split())}", err=True)

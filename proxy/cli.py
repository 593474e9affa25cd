"""The command line (DESIGN 5).

Verbs import what they need when they run, so that `sluice --help` and `sluice version` stay fast.  Errors are one line
each on standard error, without traces.  Exit codes: 0 done, 1 the thing asked about is not so, 2 usage or a failure;
`run` ends like kube-proxy, with 1 for every error (CFG-51).

Started under the name `kube-proxy`, this is `sluice run`.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy.config import flags
from proxy.config.errors import ConfigError
from proxy.config.flags import Flag
from proxy.config.values import Type

if TYPE_CHECKING:
    from proxy.config.settings import Settings

TRACEBACK = "SLUICE_TRACEBACK"
"""Environment variable: set, it shows where an internal error came from."""

_NODE_FLAGS = (
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
    "strict-config",
)
"""The flags of `run` on which tables depend."""

_FIRST = ("config", "kubeconfig")
"""Flags of kube-proxy that stand among the first in the help."""
_COLUMN = 44

_METAVARS = {
    Type.STRING: "TEXT",
    Type.BOOL: "BOOL",
    Type.INT: "N",
    Type.FLOAT: "N",
    Type.DURATION: "DURATION",
    Type.STRINGS: "LIST",
    Type.GATES: "GATES",
    Type.VMODULE: "PATTERN=N,...",
}


class GoCommand(click.Command):
    """A command that takes flags of `proxy.config.flags` in any of Go's spellings."""

    def __init__(self, *args: Any, flag_names: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flags = [flags.BY_NAME[name] for name in flag_names]
        self.params.extend(map(_option, self.flags))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, flags.normalise(args, {flag.name for flag in self.flags}))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        by_name = {f"--{flag.name}": flag for flag in self.flags}
        ours: list[tuple[str, str]] = []
        theirs: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            flag = by_name.get(param.opts[0])
            if record is not None:
                (ours if flag is None or flag.own or flag.name in _FIRST else theirs).append(record)
        with formatter.section("Options"):
            formatter.write_dl(ours, col_max=_COLUMN)
        if theirs:
            with formatter.section("Options as in kube-proxy"):
                formatter.write_dl(theirs, col_max=_COLUMN)

    def given(self, params: dict[str, Any]) -> list[tuple[str, str]]:
        """The flags that were given, with their texts."""
        return [(flag.name, text) for flag in self.flags for text in params.pop(_variable(flag), ())]


def _variable(flag: Flag) -> str:
    return "flag_" + flag.name.replace("-", "_")


def _option(flag: Flag) -> click.Option:
    text = flag.help
    if flag.default:
        text += f" [{flag.default}]"
    if not flag.honoured:
        text += " (not supported yet)"
    spellings = (f"--{flag.name}", "-v") if flag.name == "v" else (f"--{flag.name}",)
    return click.Option((*spellings, _variable(flag)), multiple=True, metavar=_METAVARS[flag.type], help=text)


class ReaderGoneError(Exception):
    """Nobody reads what is printed any more."""


class Verbs(click.Group):
    """The verbs; click would turn a reader that leaves into exit code 1, which means something else here."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGoneError from None


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="sluice-proxy", message="sluice %(version)s")
def sluice() -> None:
    """A Kubernetes service proxy that can be read, replayed and questioned."""


@sluice.command(cls=GoCommand, flag_names=flags.BY_NAME, short_help="The agent.")
@click.pass_context
def run(ctx: click.Context, /, **params: Any) -> int:
    """The agent: watch Services and EndpointSlices, and program this node's kernel.

    Objects come from an API server, or with --manifests from a directory or a file.  A configuration file and flags
    of kube-proxy work as they do there; with --config most flags are ignored, as there.
    """
    given = _given(ctx, params)
    if (texts := dict(given)).get("version", "false") != "false":
        return _print_version()
    parsed = {name: flags.BY_NAME[name].type for name in texts}
    if "cleanup" in parsed and _is_true(texts, "cleanup"):
        from proxy import cleanup as verb  # noqa: PLC0415  # see the head of this module

        return min(verb.main(), 1)
    from proxy import logs  # noqa: PLC0415  # likewise
    from proxy.config.load import load  # noqa: PLC0415  # likewise

    loaded = load(given)
    settings = loaded.settings
    logs.configure(settings.log_format, settings.verbosity)
    log = logs.get_logger("sluice.config")
    for warning in loaded.warnings:
        log.warning(warning)
    if texts.get("write-config-to"):
        return _write_config(texts["write-config-to"], settings.configz)
    if _is_true(texts, "init-only"):
        log.warning("--init-only: sluice needs no preparations, nothing was done")
        return 0
    from proxy import agent  # noqa: PLC0415  # likewise

    return agent.main(settings)


@sluice.command(short_help="A cluster in network namespaces, and its Services at work.")
def demo() -> int:
    """A cluster in network namespaces: an agent, pods, Services of every type; it probes them and shows the balance.

    It needs root, and leaves nothing behind.
    """
    from proxy import demo as verb  # noqa: PLC0415  # see the head of this module

    return verb.main()


@sluice.command(cls=GoCommand, flag_names=_NODE_FLAGS, short_help="What would be programmed for manifests.")
@click.option("-f", "--filename", required=True, metavar="FILE|DIR", help="manifests; - reads standard input")
@click.option(
    "-o", "--output", type=click.Choice(["text", "wide", "json", "yaml"]), default="text", help="how to print it [text]"
)
@click.pass_context
def render(ctx: click.Context, /, filename: str, output: str, **params: Any) -> int:
    """What would be programmed for manifests on one node, without root or a cluster.

    The node is --hostname-override, else the one that has this machine's name, else the only one in the manifests.
    """
    from proxy import render as verb  # noqa: PLC0415  # see the head of this module
    from proxy.config.load import load  # noqa: PLC0415  # likewise

    loaded = load(_given(ctx, params))
    for warning in loaded.warnings:
        _complain(ctx.command_path, warning)
    return verb.main(loaded.settings, filename, "table" if output == "text" else output)  # type: ignore[arg-type]


@sluice.command(short_help="What the kernel holds now, by Service.")
@click.option("-n", "--namespace", default="", help="Services of this namespace")
@click.option("--service", default="", metavar="[NAMESPACE/]NAME[:PORT]", help="this Service")
@click.option("--address", default="", metavar="IP", help="frontends or backends with this address")
@click.option("--port", type=click.IntRange(1, 65535), help="frontends with this port")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml", "raw"]),
    default="table",
    help="how to print it; raw: the rules and elements themselves, each with its Service [table]",
)
def dump(namespace: str, service: str, address: str, port: int | None, output: str) -> int:
    """What the kernel holds now, by Service, decompiled from its own rules.  No agent needs to run."""
    from proxy import dump as verb  # noqa: PLC0415  # see the head of this module
    from proxy.addresses import lenient_address  # noqa: PLC0415  # likewise

    try:
        packed = lenient_address(address) if address else None
    except ValueError as error:
        raise click.UsageError(f"--address: {error}") from None
    wanted = verb.Filter(namespace, service, packed, port or 0)
    return verb.main(output, wanted)  # type: ignore[arg-type]  # click has checked it


@sluice.command(
    cls=GoCommand, flag_names=(*_NODE_FLAGS, "run-directory"), short_help="What becomes of one connection, and why."
)
@click.argument("target", metavar="ADDRESS:PORT[/PROTO]|NAMESPACE/SERVICE[:PORT]")
@click.option("--from", "source", default="", metavar="ADDRESS|pod|node|outside", help="who connects")
@click.option("--interface", default="", metavar="NAME", help="by which interface its packets come in")
@click.option("-f", "--filename", default="", metavar="FILE|DIR", help="explain manifests; - reads standard input")
@click.option("--live", is_flag=True, help="explain what this node's kernel holds; with -f, compare both")
@click.option("--node-addresses", default="", metavar="LIST", help="with -f: the node's addresses [of its Node object]")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def explain(ctx: click.Context, /, target: str, output: str, **params: Any) -> int:
    """What becomes of one connection to a Service, step by step, and why.

    By an address, or by a Service's name for all its frontends.  It goes by what the running agent wants, else by what
    the kernel holds; with -f by manifests, as one node would have it (see render).  Nothing is sent.

    Ends with 0 if the connection works, 1 if it does not, 2 if nobody can tell.
    """
    from proxy.config.settings import Settings  # noqa: PLC0415  # see the head of this module
    from proxy.explain import verb  # noqa: PLC0415  # likewise
    from proxy.explain.gather import Where  # noqa: PLC0415  # likewise

    given = _given(ctx, params)
    needless = next((name for name, _ in given if name != "run-directory"), None)
    if needless and not params["filename"]:
        raise click.UsageError(f"--{needless} says how manifests are meant: it needs -f")
    settings = Settings()
    if given or params["filename"]:
        from proxy.config.load import load  # noqa: PLC0415  # likewise

        loaded = load(given)
        settings = loaded.settings
        for warning in loaded.warnings:
            _complain(ctx.command_path, warning)
    where = Where(
        filename=params["filename"],
        node_addresses=tuple(filter(None, params["node_addresses"].split(","))),
        live=params["live"],
        run_directory=settings.run_directory,
    )
    return verb.main(target, params["source"], where, settings, interface=params["interface"], as_json=output == "json")


@sluice.command(cls=GoCommand, flag_names=(*_NODE_FLAGS, "run-directory"), short_help="Kernel against wanted table.")
@click.option(
    "-f", "--filename", default="", metavar="FILE|DIR", help="manifests, in place of the agent; - reads stdin"
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def verify(ctx: click.Context, /, filename: str, output: str, **params: Any) -> int:
    """Whether the kernel holds the wanted table: the running agent's, or what manifests come to.

    What differs is printed as a diff.  Ends with 0 if nothing does, 1 if something does, 2 if it cannot be told.
    """
    from proxy import verify as verb  # noqa: PLC0415  # see the head of this module

    given = _given(ctx, params)
    needless = next((name for name, _ in given if name not in {"config", "run-directory"}), None)
    if needless and not filename:
        raise click.UsageError(f"--{needless} says how manifests are meant: it needs -f")
    settings = _settings(ctx, given)
    return verb.main(settings, filename, output)  # type: ignore[arg-type]  # click has checked it


@sluice.command(cls=GoCommand, flag_names=("config", "run-directory"), short_help="The running agent.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def status(ctx: click.Context, /, output: str, **params: Any) -> int:
    """The running agent: mode, source, last syncs, drift, and what is wrong.

    Ends with 0 if the kernel holds what it should, 1 if a sync fails or drift is left, 2 if no agent answers.
    """
    from proxy import status as verb  # noqa: PLC0415  # see the head of this module

    settings = _settings(ctx, _given(ctx, params))
    return verb.main(output, settings.run_directory)  # type: ignore[arg-type]  # click has checked it


@sluice.command(cls=GoCommand, flag_names=("config", "run-directory"), short_help="Flows through Services.")
@click.option("--delete-stale", is_flag=True, help="delete the stale ones, and print those alone")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="how to print it [table]")
@click.pass_context
def conntrack(ctx: click.Context, /, delete_stale: bool, output: str, **params: Any) -> int:
    """Flows through Services: their clients and backends, and whether they are stale.

    UDP flows are stale when their endpoint serves no longer; TCP connections are left to drain.  Without a running
    agent an endpoint that terminates and still serves counts as gone.
    """
    from proxy import flows as verb  # noqa: PLC0415  # see the head of this module

    directory = _settings(ctx, _given(ctx, params)).run_directory
    return verb.main(output, delete_stale=delete_stale, run_directory=directory)  # type: ignore[arg-type]  # as above


@sluice.command(short_help="Remove everything of ours.")
def cleanup() -> int:
    """Remove everything of ours from the kernel, and nothing else."""
    from proxy import cleanup as verb  # noqa: PLC0415  # see the head of this module

    return verb.main()


@sluice.command(short_help="Print the version.")
def version() -> int:
    """Print the version."""
    return _print_version()


def main(arguments: Sequence[str] | None = None, *, name: str | None = None) -> int:
    """Run a command line and give its exit code; `arguments` and `name` are the process's unless given."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    program = Path(sys.argv[0] if name is None else name).name
    if program == "kube-proxy":
        args.insert(0, "run")
    verb = next((each for each in args if not each.startswith("-")), "")
    shown = f"sluice {verb}" if verb in sluice.commands else "sluice"
    if arguments is None and verb not in {"run", "demo"}:
        # A verb that ends soon leaves its garbage to the end: looking for it would double the time of a large dump.
        gc.disable()
    try:
        return int(sluice.main(args, prog_name="sluice", standalone_mode=False) or 0)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ReaderGoneError:
        # The interpreter would complain about it once again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        for line in _explain(error, shown):
            _complain(shown, line)
        return 1 if verb == "run" else 2


def _explain(error: Exception, command: str) -> Sequence[str]:
    """What an error says to a user, one line per problem."""
    if isinstance(error, ConfigError):
        return error.problems
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return ()
    if isinstance(error, click.ClickException):
        return [f"{error.format_message()}  (see {command} --help)"]
    if isinstance(error, OSError):
        return [f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")]
    return [f"internal error: {type(error).__name__}: {error}  ({TRACEBACK}=1 shows where)"]


def _given(ctx: click.Context, params: dict[str, Any]) -> list[tuple[str, str]]:
    command = ctx.command
    assert isinstance(command, GoCommand)
    return command.given(params)


def _settings(ctx: click.Context, given: list[tuple[str, str]]) -> Settings:
    """The effective configuration, its warnings told; of a verb that may have nothing to configure."""
    from proxy.config.settings import Settings  # noqa: PLC0415  # see the head of this module

    if not given:
        return Settings()  # PyYAML alone would cost more than all the rest of such a verb
    from proxy.config.load import load  # noqa: PLC0415  # likewise

    loaded = load(given)
    for warning in loaded.warnings:
        _complain(ctx.command_path, warning)
    return loaded.settings


def _is_true(texts: dict[str, str], name: str) -> bool:
    from proxy.config.values import parse_bool  # noqa: PLC0415  # next to its one use

    try:
        return parse_bool(texts.get(name, "false"))
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None


def _write_config(path: str, configz: Any) -> int:
    """Write the effective configuration as v1alpha1 YAML (CFG-2)."""
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415  # 20 ms that nothing else here needs

    Path(path).write_text(yaml.safe_dump(configz), encoding="utf-8")
    return 0


def _print_version() -> int:
    from importlib import metadata  # noqa: PLC0415  # 20 ms that other verbs do without

    click.echo(f"sluice {metadata.version('sluice-proxy')}")
    return 0


def _complain(command: str, message: str) -> None:
    """One line on standard error, whatever is in the message."""
    click.echo(f"{command}: {' '.join(message.split())}", err=True)

"""The verbs that ask what a node's rules are, should be, or do (DESIGN 5); see `proxy.cli` for the others."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy.command_line import NODE_FLAGS, READING_FLAGS, GoCommand, complain, given_flags, settings_of

if TYPE_CHECKING:
    from proxy.foreign.sources import Files


@click.command(cls=GoCommand, flag_names=NODE_FLAGS, short_help="What would be programmed for manifests.")
@click.option("-f", "--filename", required=True, metavar="FILE|DIR", help="manifests; - reads standard input")
@click.option(
    "-o", "--output", type=click.Choice(["text", "wide", "json", "yaml"]), default="text", help="how to print it [text]"
)
@click.pass_context
def render(ctx: click.Context, /, filename: str, output: str, **params: Any) -> int:
    """What would be programmed for manifests on one node, without root or a cluster.

    The node is --hostname-override, else the one that has this machine's name, else the only one in the manifests.
    """
    from proxy import render as verb  # noqa: PLC0415  # see the head of proxy.cli
    from proxy.config.load import load  # noqa: PLC0415  # likewise

    loaded = load(given_flags(ctx, params))
    for warning in loaded.warnings:
        complain(ctx.command_path, warning)
    return verb.main(loaded.settings, filename, "table" if output == "text" else output)  # type: ignore[arg-type]


_OF = click.option("--of", type=click.Choice(["sluice", "kube-proxy"]), help="whose rules [sluice's, where it has any]")


def _files(names: tuple[str, ...]) -> Files:
    """What was given with -f, by what is in it."""
    from proxy.foreign.sources import Files, sort_files  # noqa: PLC0415  # see the head of proxy.cli

    if not names:
        return Files("", ())
    try:
        return sort_files(names)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _bundle(names: tuple[str, ...]) -> str:
    """The archive of `sluice bundle` that was given with -f; empty: none was.

    Raises:
        UsageError: one was given, and something else.
    """
    from proxy.foreign.sources import STANDARD_INPUT  # noqa: PLC0415  # see the head of proxy.cli

    def is_bundle(name: str) -> bool:
        path = Path(name)
        if name == STANDARD_INPUT or not path.is_file():
            return False
        with contextlib.suppress(OSError), path.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"
        return False

    found = next((each for each in names if is_bundle(each)), "")
    if found and len(names) > 1:
        raise click.UsageError(f"{found} is a bundle, with which -f takes nothing else")
    return found


@click.command(
    cls=GoCommand,
    flag_names=("config", "iptables-backend", "run-directory"),
    short_help="What the kernel holds now, by Service.",
)
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
@_OF
@click.option(
    "-f", "--filename", multiple=True, metavar="FILE", help="rules of kube-proxy that were saved; - reads stdin"
)
@click.option("--counters", is_flag=True, help="what has passed them: connections, packets, bytes")
@click.pass_context
def dump(
    ctx: click.Context,
    /,
    *,
    namespace: str,
    service: str,
    address: str,
    port: int | None,
    output: str,
    of: str | None,
    filename: tuple[str, ...],
    counters: bool,
    **params: Any,
) -> int:
    """What the kernel holds now, by Service, decompiled from its own rules.  No agent needs to run.

    kube-proxy's rules are read as well: of this node, or from a file (iptables-save, nft list ruleset, with -j or not).
    """
    from proxy import dump as verb  # noqa: PLC0415  # see the head of proxy.cli
    from proxy.addresses import lenient_address  # noqa: PLC0415  # likewise

    try:
        packed = lenient_address(address) if address else None
    except ValueError as error:
        raise click.UsageError(f"--address: {error}") from None
    wanted = verb.Filter(namespace, service, packed, port or 0)
    if counters and (filename or of == "kube-proxy" or output == "raw"):
        raise click.UsageError("--counters are of this node and sluice's own rules, and not in -o raw")
    if saved := _bundle(filename):
        from proxy import bundle_verbs  # noqa: PLC0415  # likewise

        if output == "raw":
            raise click.UsageError("-o raw is of a kernel: in a bundle it stands in rules-*.txt")
        return bundle_verbs.dump(saved, output, wanted, of=of)  # type: ignore[arg-type]  # click has checked it
    from proxy.foreign import choice  # noqa: PLC0415  # likewise

    if filename or choice.another_is_meant(of, "dump", None):
        from proxy.foreign import dump as other  # noqa: PLC0415  # likewise

        if output == "raw":
            raise click.UsageError(
                "-o raw shows rules of sluice: those of kube-proxy are what iptables-save or nft print"
            )
        return other.main(filename, output, wanted)  # type: ignore[arg-type]  # click has checked it
    from proxy import modes  # noqa: PLC0415  # likewise

    settings = settings_of(ctx, given_flags(ctx, params))
    opener = modes.opener(settings)
    if counters:
        from proxy import traffic  # noqa: PLC0415  # likewise

        directory = settings.run_directory
        return traffic.main(output, wanted, run_directory=directory, open_dataplane=opener)  # type: ignore[arg-type]
    return verb.main(output, wanted, open_dataplane=opener)  # type: ignore[arg-type]  # click has checked it


@click.command(
    cls=GoCommand, flag_names=(*NODE_FLAGS, "run-directory"), short_help="What becomes of one connection, and why."
)
@click.argument("target", metavar="ADDRESS:PORT[/PROTO]|NAMESPACE/SERVICE[:PORT]")
@click.option("--from", "source", default="", metavar="ADDRESS|pod|node|outside", help="who connects")
@click.option("--interface", default="", metavar="NAME", help="by which interface its packets come in")
@click.option(
    "-f",
    "--filename",
    multiple=True,
    metavar="FILE|DIR",
    help="explain manifests; - reads standard input; or rules of kube-proxy that were saved, with manifests or without",
)
@_OF
@click.option("--live", is_flag=True, help="explain what this node's kernel holds; with -f, compare both")
@click.option("--node-addresses", default="", metavar="LIST", help="with -f: the node's addresses [of its Node object]")
@click.option("-w", "--watch", "again", is_flag=True, help="ask again and again, and print what is another, until ^C")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def explain(ctx: click.Context, /, target: str, output: str, again: bool, **params: Any) -> int:
    """What becomes of one connection to a Service, step by step, and why.

    By an address, or by a Service's name for all its frontends.  It goes by what the running agent wants, else by what
    the kernel holds; with -f by manifests, as one node would have it (see render).  Nothing is sent.

    Ends with 0 if the connection works, 1 if it does not, 2 if nobody can tell.
    """
    from proxy import modes  # noqa: PLC0415  # see the head of proxy.cli
    from proxy.config.settings import Settings  # noqa: PLC0415  # likewise
    from proxy.explain import verb  # noqa: PLC0415  # likewise
    from proxy.explain.gather import Means, Where  # noqa: PLC0415  # likewise
    from proxy.foreign import choice, sources  # noqa: PLC0415  # likewise

    if saved := _bundle(params["filename"]):
        from proxy import bundle_verbs  # noqa: PLC0415  # likewise

        if again:
            raise click.UsageError("--watch: nothing changes in a bundle")
        return bundle_verbs.explain(
            saved,
            target,
            params["source"],
            interface=params["interface"],
            as_json=output == "json",
            of=params["of"],
        )
    files = _files(params.pop("filename"))
    params["filename"] = files.manifests
    given = given_flags(ctx, params)
    needless = next((name for name, _ in given if name not in READING_FLAGS - {"config"}), None)
    if needless and not params["filename"]:
        raise click.UsageError(f"--{needless} says how manifests are meant: it needs -f")
    settings = Settings()
    if given or files.manifests:
        from proxy.config.load import load  # noqa: PLC0415  # likewise

        loaded = load(given)
        settings = loaded.settings
        for warning in loaded.warnings:
            complain(ctx.command_path, warning)
    asked_live = params["live"] or not files.manifests
    if files.rules or (asked_live and choice.another_is_meant(params["of"], "explain", settings.run_directory)):
        from proxy.foreign import explain as other  # noqa: PLC0415  # likewise

        beside = other.Where(
            files=files,
            node_addresses=sources.addresses(params["node_addresses"]),
            configured=not choice.FACTS.isdisjoint(name for name, _ in given),
        )
        return other.main(
            target,
            params["source"],
            beside,
            settings,
            interface=params["interface"],
            as_json=output == "json",
            again=again,
        )
    where = Where(
        filename=params["filename"],
        node_addresses=tuple(filter(None, params["node_addresses"].split(","))),
        live=params["live"],
        run_directory=settings.run_directory,
    )
    return verb.main(
        target,
        params["source"],
        where,
        settings,
        interface=params["interface"],
        as_json=output == "json",
        again=again,
        means=Means(modes.opener(settings)),
    )


@click.command(
    cls=GoCommand,
    flag_names=(*NODE_FLAGS, "kubeconfig", "master", "run-directory"),
    short_help="Kernel against wanted table.",
)
@click.option(
    "-f",
    "--filename",
    multiple=True,
    metavar="FILE|DIR",
    help="manifests, in place of the agent; - reads stdin; or saved rules of kube-proxy, in place of the kernel",
)
@_OF
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def verify(ctx: click.Context, /, filename: tuple[str, ...], output: str, of: str | None, **params: Any) -> int:
    """Whether the kernel holds the wanted table: the running agent's, or what manifests come to.

    kube-proxy's rules are compared as well, also with what an API server has (--kubeconfig).

    What differs is printed as a diff.  Ends with 0 if nothing does, 1 if something does, 2 if it cannot be told.
    """
    from proxy import modes  # noqa: PLC0415  # see the head of proxy.cli
    from proxy import verify as verb  # noqa: PLC0415  # likewise
    from proxy.foreign import choice  # noqa: PLC0415  # likewise

    if saved := _bundle(filename):
        from proxy import bundle_verbs  # noqa: PLC0415  # likewise

        return bundle_verbs.verify(saved, output, of=of)  # type: ignore[arg-type]  # click has checked it
    files = _files(filename)
    given = given_flags(ctx, params)
    names = {name for name, _ in given}
    settings = settings_of(ctx, given)
    agents = None if files.manifests else settings.run_directory
    if files.rules or choice.another_is_meant(of, "verify", agents):
        from proxy.foreign import verify as other  # noqa: PLC0415  # likewise

        asked = other.Asked(files, configured=not choice.FACTS.isdisjoint(names))
        return other.main(asked, settings, output)  # type: ignore[arg-type]  # click has checked it
    if server := sorted(names & {"kubeconfig", "master"}):
        raise click.UsageError(f"--{server[0]} is for rules of another proxy: --of kube-proxy")
    needless = next((name for name in names if name not in READING_FLAGS), None)
    if needless and not files.manifests:
        raise click.UsageError(f"--{needless} says how manifests are meant: it needs -f")
    opener = modes.opener(settings)
    return verb.main(settings, files.manifests, output, open_dataplane=opener)  # type: ignore[arg-type]  # as above


@click.command(cls=GoCommand, flag_names=("config", "run-directory"), short_help="The running agent.")
@click.option("-f", "--filename", default="", metavar="BUNDLE", help="what it said when a bundle was made")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def status(ctx: click.Context, /, filename: str, output: str, **params: Any) -> int:
    """The running agent: mode, source, last syncs, drift, and what is wrong.

    Ends with 0 if the kernel holds what it should, 1 if a sync fails or drift is left, 2 if no agent answers.
    """
    from proxy import status as verb  # noqa: PLC0415  # see the head of proxy.cli

    if filename:
        from proxy import bundle_verbs  # noqa: PLC0415  # likewise

        return bundle_verbs.status(filename, output)  # type: ignore[arg-type]  # as below
    settings = settings_of(ctx, given_flags(ctx, params))
    return verb.main(output, settings.run_directory)  # type: ignore[arg-type]  # click has checked it


@click.command(
    cls=GoCommand,
    flag_names=("config", "iptables-backend", "run-directory"),
    short_help="Flows through Services.",
)
@click.option("--service", default="", metavar="[NAMESPACE/]NAME[:PORT]", help="flows through this Service")
@click.option("--address", default="", metavar="IP", help="flows whose client, frontend or backend has this address")
@click.option("--stale", is_flag=True, help="stale ones alone")
@click.option("--delete-stale", is_flag=True, help="delete the stale ones, and print those alone")
@_OF
@click.option("-f", "--filename", default="", metavar="BUNDLE", help="those that were there when a bundle was made")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "count", "json"]),
    default="table",
    help="how to print it; count: by Service and backend [table]",
)
@click.pass_context
def conntrack(
    ctx: click.Context,
    /,
    *,
    service: str,
    address: str,
    stale: bool,
    delete_stale: bool,
    of: str | None,
    filename: str,
    output: str,
    **params: Any,
) -> int:
    """Flows through Services: their clients and backends, and whether they are stale.

    UDP flows are stale when their endpoint serves no longer; TCP connections are left to drain.  Without a running
    agent an endpoint that terminates and still serves counts as gone.
    """
    from proxy import flows as verb  # noqa: PLC0415  # see the head of proxy.cli
    from proxy import modes  # noqa: PLC0415  # likewise
    from proxy.addresses import lenient_address  # noqa: PLC0415  # likewise

    try:
        chosen = verb.Chosen(service, lenient_address(address) if address else b"", stale)
    except ValueError as error:
        raise click.UsageError(f"--address: {error}") from None
    if filename:
        from proxy import bundle_verbs  # noqa: PLC0415  # likewise

        if delete_stale:
            raise click.UsageError("--delete-stale is for a kernel, not for a bundle")
        return bundle_verbs.conntrack(filename, output, chosen)  # type: ignore[arg-type]  # click has checked it
    from proxy.foreign import choice  # noqa: PLC0415  # likewise

    settings = settings_of(ctx, given_flags(ctx, params))
    return verb.main(
        output,  # type: ignore[arg-type]  # click has checked it
        chosen=chosen,
        delete_stale=delete_stale,
        run_directory=settings.run_directory,
        open_dataplane=modes.opener(settings),
        other=choice.another_is_meant(of, "conntrack", settings.run_directory),
    )


@click.command(
    cls=GoCommand, flag_names=(*NODE_FLAGS, "run-directory"), short_help="All that is wrong on this node, worst first."
)
@click.option(
    "-f",
    "--filename",
    default="",
    metavar="FILE|DIR|BUNDLE",
    help="manifests, in place of the agent; - reads stdin; or a bundle, in place of this node",
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def doctor(ctx: click.Context, /, filename: str, output: str, **params: Any) -> int:
    """All that may keep connections from their Services on this node, worst first.

    It asks explain's questions of every Service at once: of the running agent, or with -f of manifests, and of this
    node's kernel.  Nothing is sent.

    Ends with 0 if nothing is wrong, 1 if something is, 2 if something could not be looked at.
    """
    from proxy import doctor as verb  # noqa: PLC0415  # see the head of proxy.cli
    from proxy import modes  # noqa: PLC0415  # likewise
    from proxy.explain.gather import Means  # noqa: PLC0415  # likewise

    if saved := _bundle((filename,) if filename else ()):
        from proxy import bundle_verbs  # noqa: PLC0415  # likewise

        return bundle_verbs.doctor(saved, output)  # type: ignore[arg-type]  # click has checked it
    given = given_flags(ctx, params)
    needless = next((name for name, _ in given if name not in READING_FLAGS), None)
    if needless and not filename:
        raise click.UsageError(f"--{needless} says how manifests are meant: it needs -f")
    settings = settings_of(ctx, given)
    means = Means(modes.opener(settings))
    return verb.main(settings, filename, output, means=means)  # type: ignore[arg-type]  # click has checked it


@click.command(
    cls=GoCommand,
    flag_names=("config", "iptables-backend"),
    short_help="Real connections through the node's rules.",
)
@click.option("--service", default="", metavar="[NAMESPACE/]NAME[:PORT]", help="connections to this Service")
@click.option("--address", default="", metavar="IP", help="connections to this address")
@click.option("--port", type=click.IntRange(1, 65535), help="connections to this port")
@click.option("--from", "source", default="", metavar="IP", help="connections from this address")
@click.option(
    "--seconds", type=click.FloatRange(0.1, 3600), default=10, metavar="S", help="end after so many seconds [10]"
)
@click.option("-n", "packets", type=click.IntRange(1, 1000), default=20, help="end after so many packets [20]")
@click.option(
    "--by",
    type=click.Choice(["rules", "conntrack"]),
    metavar="rules|conntrack",
    help="packets through the rules, or connection tracking's new entries [rules, where the mode has some]",
)
@_OF
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]")
@click.pass_context
def trace(
    ctx: click.Context,
    /,
    *,
    service: str,
    address: str,
    port: int | None,
    source: str,
    seconds: float,
    packets: int,
    by: str | None,
    of: str | None,
    output: str,
    **params: Any,
) -> int:
    """What the node does with real connections, by their first packets, as they are made.

    In modes nftables and iptables packets are followed through the kernel's rules; in mode userspace the workers tell.
    Tracing stops when this command ends, in whatever way.

    Ends with 0 if a packet was seen, 1 if none was, 2 if nothing can be traced.
    """
    from proxy import modes  # noqa: PLC0415  # see the head of proxy.cli
    from proxy.addresses import lenient_address  # noqa: PLC0415  # likewise
    from proxy.dump import Filter  # noqa: PLC0415  # likewise
    from proxy.trace import verb  # noqa: PLC0415  # likewise

    try:
        packed, client = (lenient_address(each) if each else b"" for each in (address, source))
    except ValueError as error:
        raise click.UsageError(f"--address, --from: {error}") from None
    wanted = Filter("", service, packed or None, port or 0)
    bounds = verb.Bounds(seconds, packets)
    opener = modes.opener(settings_of(ctx, given_flags(ctx, params)))
    as_json = output == "json"
    return verb.main(wanted, client, bounds, opener, by=by or "", of=of or "", as_json=as_json)  # type: ignore[arg-type]


@click.command(
    cls=GoCommand,
    flag_names=("config", "iptables-backend", "run-directory"),
    short_help="One archive for a bug report.",
)
@click.option("-o", "--output", default="", metavar="FILE", help="where to [sluice-bundle-NODE-TIME.tar.gz]")
@click.pass_context
def bundle(ctx: click.Context, /, output: str, **params: Any) -> int:
    """One archive for a bug report: tables, rules, objects, status, configuration, kernel facts, log.

    What could be a secret is taken out; look through it all the same before you give it away.  dump, explain, verify,
    doctor, status and conntrack read it with -f.
    """
    from proxy import bundle as verb  # noqa: PLC0415  # see the head of proxy.cli
    from proxy import modes  # noqa: PLC0415  # likewise

    given = given_flags(ctx, params)

    def configuration() -> Any:
        from proxy.config.load import load  # noqa: PLC0415  # see the head of proxy.cli
        from proxy.config.printed import json_with_origins  # noqa: PLC0415  # likewise

        return json_with_origins(load(given).merged)

    settings = settings_of(ctx, given)
    return verb.main(output, settings.run_directory, configuration, open_dataplane=modes.opener(settings))


VERBS = (render, dump, explain, verify, doctor, status, conntrack, trace, bundle)

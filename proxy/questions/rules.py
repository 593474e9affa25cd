"""Verbs that ask what a node's rules are or should be: render, dump, explain, verify."""

from __future__ import annotations

from typing import Any

import click

from proxy.command_line import NODE_FLAGS, READING_FLAGS, GoCommand, complain, given_flags, settings_of
from proxy.questions.options import (
    AS_TEXT_OR_JSON,
    OF,
    ONLY_OF_OTHERS,
    SERVER_FLAGS,
    address_in,
    bundle_in,
    log_warnings_alone,
    need_manifests,
    service_in,
    sorted_by_content,
)


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
@OF
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

    kube-proxy's rules are read as well: of this node, or from files (iptables-save, nft list ruleset, with -j or not;
    of ipvs mode ipvsadm -Sn, ipset save and ip -j addr too).
    """
    from proxy import dump as verb  # noqa: PLC0415  # see the head of proxy.cli

    wanted = verb.Filter(namespace, service_in(service), address_in("--address", address) or None, port or 0)
    if counters and (filename or of == "kube-proxy" or output == "raw"):
        raise click.UsageError("--counters are of this node and sluice's own rules, and not in -o raw")
    if saved := bundle_in(filename):
        from proxy.bundle import verbs as bundle_verbs  # noqa: PLC0415  # likewise

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
    cls=GoCommand,
    flag_names=(*NODE_FLAGS, *sorted(SERVER_FLAGS), "run-directory"),
    short_help="What becomes of one connection, and why.",
)
@click.argument("target", metavar="ADDRESS:PORT[/PROTO]|[NAMESPACE/]SERVICE[:PORT]")
@click.option("-n", "--namespace", default="", help="of a Service that is named without one [default]")
@click.option("--from", "source", default="", metavar="ADDRESS|pod|node|outside", help="who connects")
@click.option("--interface", default="", metavar="NAME", help="by which interface its packets come in")
@click.option(
    "-f",
    "--filename",
    multiple=True,
    metavar="FILE|DIR",
    help="explain manifests; - reads standard input; or rules of kube-proxy that were saved, with manifests or without",
)
@OF
@click.option("--live", is_flag=True, help="explain what this node's kernel holds; with -f, compare both")
@click.option("--node-addresses", default="", metavar="LIST", help="with -f: the node's addresses [of its Node object]")
@click.option("-w", "--watch", "again", is_flag=True, help="ask again and again, and print what is another, until ^C")
@AS_TEXT_OR_JSON
@click.pass_context
def explain(ctx: click.Context, /, target: str, namespace: str, output: str, again: bool, **params: Any) -> int:
    """What becomes of one connection to a Service, step by step, and why.

    By an address, or by a Service's name for all its frontends; svc/NAME is a Service too, as in kubectl.  It goes by
    what the running agent wants, else by what the kernel holds; with -f by manifests, as one node would have it (see
    render).  Nothing is sent.

    kube-proxy's rules are explained as well, also beside what an API server has (--kubeconfig).

    Ends with 0 if the connection works, 1 if it does not, 2 if nobody can tell.
    """
    from proxy import modes  # noqa: PLC0415  # see the head of proxy.cli
    from proxy.config.settings import Settings  # noqa: PLC0415  # likewise
    from proxy.explain import verb  # noqa: PLC0415  # likewise
    from proxy.explain.asked import qualified  # noqa: PLC0415  # likewise
    from proxy.explain.gather import Means, Where  # noqa: PLC0415  # likewise
    from proxy.foreign import choice, sources  # noqa: PLC0415  # likewise

    target = qualified(target, namespace)
    if saved := bundle_in(params["filename"]):
        from proxy.bundle import verbs as bundle_verbs  # noqa: PLC0415  # likewise

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
    files = sorted_by_content(params.pop("filename"))
    params["filename"] = files.manifests
    given = given_flags(ctx, params)
    server = sorted(SERVER_FLAGS & {name for name, _ in given})
    if server and again:
        raise click.UsageError(f"--watch: an API server is not listed again and again, leave out --{server[0]}")
    if files.manifests or server:
        log_warnings_alone(ctx)
    else:
        need_manifests(given, READING_FLAGS - {"config"})
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
    if server:
        raise click.UsageError(ONLY_OF_OTHERS.format(server[0]))
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
    flag_names=(*NODE_FLAGS, *sorted(SERVER_FLAGS), "run-directory"),
    short_help="Kernel against wanted table.",
)
@click.option(
    "-f",
    "--filename",
    multiple=True,
    metavar="FILE|DIR",
    help="manifests, in place of the agent; - reads stdin; or saved rules of kube-proxy, in place of the kernel",
)
@OF
@AS_TEXT_OR_JSON
@click.pass_context
def verify(ctx: click.Context, /, filename: tuple[str, ...], output: str, of: str | None, **params: Any) -> int:
    """Whether the kernel holds the wanted table: the running agent's, or what manifests come to.

    kube-proxy's rules are compared as well, also with what an API server has (--kubeconfig).

    What differs is printed as a diff.  Ends with 0 if nothing does, 1 if something does, 2 if it cannot be told.
    """
    from proxy import modes  # noqa: PLC0415  # see the head of proxy.cli
    from proxy import verify as verb  # noqa: PLC0415  # likewise
    from proxy.foreign import choice  # noqa: PLC0415  # likewise

    if saved := bundle_in(filename):
        from proxy.bundle import verbs as bundle_verbs  # noqa: PLC0415  # likewise

        return bundle_verbs.verify(saved, output, of=of)  # type: ignore[arg-type]  # click has checked it
    files = sorted_by_content(filename)
    given = given_flags(ctx, params)
    names = {name for name, _ in given}
    settings = settings_of(ctx, given)
    if files.manifests or SERVER_FLAGS & names:
        log_warnings_alone(ctx)
    agents = None if files.manifests else settings.run_directory
    if files.rules or choice.another_is_meant(of, "verify", agents):
        from proxy.foreign import verify as other  # noqa: PLC0415  # likewise

        asked = other.Asked(files, configured=not choice.FACTS.isdisjoint(names))
        return other.main(asked, settings, output)  # type: ignore[arg-type]  # click has checked it
    if server := sorted(SERVER_FLAGS & names):
        raise click.UsageError(ONLY_OF_OTHERS.format(server[0]))
    if not files.manifests:
        need_manifests(given)
    opener = modes.opener(settings)
    return verb.main(settings, files.manifests, output, open_dataplane=opener)  # type: ignore[arg-type]  # as above

"""Verbs that ask how a node fares: its agent, what is wrong, its flows and packets, and all of it in one archive."""

from __future__ import annotations

from typing import Any

import click

from proxy.command_line import NODE_FLAGS, GoCommand, given_flags, settings_of
from proxy.questions.options import (
    AS_TEXT_OR_JSON,
    OF,
    address_in,
    bundle_in,
    log_warnings_alone,
    need_manifests,
    service_in,
)


@click.command(cls=GoCommand, flag_names=("config", "run-directory"), short_help="The running agent.")
@click.option("-f", "--filename", default="", metavar="BUNDLE", help="what it said when a bundle was made")
@AS_TEXT_OR_JSON
@click.pass_context
def status(ctx: click.Context, /, filename: str, output: str, **params: Any) -> int:
    """The running agent: mode, source, last syncs, drift, and what is wrong.

    Ends with 0 if the kernel holds what it should, 1 if a sync fails or drift is left, 2 if no agent answers.
    """
    from proxy import status as verb  # noqa: PLC0415  # see the head of proxy.cli

    if filename:
        from proxy.bundle import verbs as bundle_verbs  # noqa: PLC0415  # likewise

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
@OF
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

    chosen = verb.Chosen(service_in(service), address_in("--address", address), stale)
    if filename:
        from proxy.bundle import verbs as bundle_verbs  # noqa: PLC0415  # likewise

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
@AS_TEXT_OR_JSON
@click.pass_context
def doctor(ctx: click.Context, /, filename: str, output: str, **params: Any) -> int:
    """All that may keep connections from their Services on this node, worst first.

    It asks explain's questions of every Service at once: of the running agent, or with -f of manifests, and of this
    node's kernel.  Nothing is sent.

    Ends with 0 if nothing is wrong, 1 if something is, 2 if something could not be looked at.
    """
    from proxy import modes  # noqa: PLC0415  # likewise
    from proxy.doctor import verb  # noqa: PLC0415  # see the head of proxy.cli
    from proxy.explain.gather import Means  # noqa: PLC0415  # likewise

    if saved := bundle_in((filename,) if filename else ()):
        from proxy.bundle import verbs as bundle_verbs  # noqa: PLC0415  # likewise

        return bundle_verbs.doctor(saved, output)  # type: ignore[arg-type]  # click has checked it
    given = given_flags(ctx, params)
    if filename:
        log_warnings_alone(ctx)
    else:
        need_manifests(given)
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
@OF
@AS_TEXT_OR_JSON
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
    from proxy.dump import Filter  # noqa: PLC0415  # likewise
    from proxy.trace import verb  # noqa: PLC0415  # likewise

    client = address_in("--from", source)
    wanted = Filter("", service_in(service), address_in("--address", address) or None, port or 0)
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
    from proxy import modes  # noqa: PLC0415  # likewise
    from proxy.bundle import making as verb  # noqa: PLC0415  # see the head of proxy.cli

    given = given_flags(ctx, params)

    def configuration() -> Any:
        from proxy.config.load import load  # noqa: PLC0415  # see the head of proxy.cli
        from proxy.config.printed import json_with_origins  # noqa: PLC0415  # likewise

        return json_with_origins(load(given).merged)

    settings = settings_of(ctx, given)
    return verb.main(output, settings.run_directory, configuration, open_dataplane=modes.opener(settings))

"""Whose rules are meant: Sluice's own, or another proxy's."""

from __future__ import annotations

import sys

from proxy import agent_socket
from proxy.agent_socket import AgentError, NoAgentError
from proxy.foreign.sources import PROXY, nft_tables

SLUICE = "sluice"

FACTS = frozenset(
    {
        "config",
        "cluster-cidr",
        "service-cidrs",
        "nodeport-addresses",
        "detect-local-mode",
        "pod-bridge-interface",
        "pod-interface-name-prefix",
        "masquerade-all",
        "iptables-masquerade-bit",
        "iptables-localhost-nodeports",
    }
)
"""Flags that say how the proxy is configured: with one of them the node's facts are compared too."""


def another_is_meant(of: str | None, verb: str, run_directory: str | None) -> bool:
    """Whether the rules of this node that a verb is about are another proxy's; a line says so where nobody said it.

    They are where somebody says so, else where nothing of Sluice's is there, neither rules nor an agent, and something
    of the other's is.

    Args:
        of: whose rules were asked for; None: nobody said it.
        verb: for the line.
        run_directory: where an agent would be found; None: agents don't matter.
    """
    if of:
        return of != SLUICE
    if (run_directory is not None and _has_agent(run_directory)) or not _only_theirs():
        return False
    sys.stderr.write(f"sluice {verb}: sluice has no rules here, and {PROXY} has: its rules are read (--of {PROXY})\n")
    return True


def _has_agent(run_directory: str) -> bool:
    try:
        agent_socket.status(run_directory)
    except NoAgentError:
        return False
    except AgentError:
        return True  # the verb says what is wrong with it
    return True


def _only_theirs() -> bool:
    tables = nft_tables()
    if SLUICE in tables:
        return False
    from proxy import modes  # noqa: PLC0415  # subprocess and the iptables tools: saved files do without
    from proxy.dump import read_all  # noqa: PLC0415  # likewise

    ours, failures = read_all(names=[name for name in modes.present() if name != "nftables"])
    if ours or failures:
        return False
    if PROXY in tables:
        return True
    from proxy.explain.surroundings import look  # noqa: PLC0415  # netlink, likewise
    from proxy.foreign.sources import on_node  # noqa: PLC0415  # likewise

    return on_node(look())

"""The verb: gather the evidence, answer, print."""

from __future__ import annotations

import json
import sys

from proxy.agent_socket import AgentError
from proxy.config.settings import Settings
from proxy.explain.answer import answer, exit_code
from proxy.explain.asked import Asked, AskedAddress, Client, parse_asked, parse_client
from proxy.explain.data import to_data
from proxy.explain.evidence import Evidence
from proxy.explain.gather import Means, UnanswerableError, Where, gather
from proxy.explain.text import lines
from proxy.explain.watching import watch
from rules.dataplane import DataplaneError
from rules.forwarding import family_of


def main(
    target: str,
    client: str,
    where: Where,
    settings: Settings,
    *,
    interface: str = "",
    as_json: bool = False,
    again: bool = False,
    means: Means = Means(),  # noqa: B008  # immutable
) -> int:
    """Answer a question on standard output; 0 it works, 1 it does not, 2 usage or nobody could tell.

    Args:
        target: `ADDRESS:PORT[/PROTO]` or `NAMESPACE/SERVICE[:PORT]`.
        client: an address, `pod`, `node` or `outside`; empty: whoever usually connects there.
        where: where to look for the evidence.
        settings: what manifests are computed with.
        interface: by which interface the client's packets come in; empty: not known.
        as_json: print JSON instead of text.
        again: go on asking, and print what is another, until ^C.
        means: how this node is read.
    """
    try:
        asked, who = parse_asked(target), parse_client(client, interface)
        _check_families(asked, who)
        if again:
            unanswered = (ValueError, UnanswerableError, AgentError, DataplaneError, OSError)
            return watch(asked, who, lambda: gather(where, settings, asked, who, means), unanswered, as_json=as_json)
        evidence = gather(where, settings, asked, who, means)
    except (ValueError, UnanswerableError) as error:
        sys.stderr.write(f"sluice explain: {error}\n")
        return 2
    return tell(asked, who, evidence, as_json=as_json)


def tell(asked: Asked, client: Client, evidence: Evidence, *, as_json: bool) -> int:
    """Print what the evidence says about a question; 0 it works, 1 it does not."""
    answers = answer(asked, client, evidence)
    for problem in answers.evidence.problems:
        sys.stderr.write(f"sluice explain: {problem}\n")
    if as_json:
        sys.stdout.write(json.dumps(to_data(answers), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in lines(answers))
    return exit_code(answers)


def _check_families(asked: Asked, client: Client) -> None:
    if client.address is None or not isinstance(asked, AskedAddress):
        return
    if len(client.address) != len(asked.address):
        raise ValueError(f"--from is {family_of(client.address).label}, and {asked} is not")

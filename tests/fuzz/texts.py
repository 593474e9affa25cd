"""Texts that programs of others print and people write: rules, sets, servers, addresses, flags, logs, credentials."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from proxy.bundle.secrets import cleaned, without_secrets
from proxy.config import flags
from proxy.config.errors import ConfigError
from proxy.config.load import load
from proxy.events import health_check_not_started, manifest, server_not_started
from proxy.objects import Key
from proxy.sources.credentials import CredentialsError, accept
from rules.foreign import (
    addresses_json,
    ipset_text,
    ipvs_text,
    kube_proxy_iptables,
    kube_proxy_ipvs,
    kube_proxy_nftables,
    nft_json,
    nft_text,
    parts,
    removal,
    saved,
)
from rules.foreign.comparison import as_held_by, capabilities_of
from rules.foreign.gathering import ForeignError, Reading
from rules.foreign.ipvs_state import State
from rules.forwarding import Family, check_route
from rules.iptables import text as iptables_text
from rules.iptables.spelling import respell
from rules.ipvs import chains as ipvs_chains


def _judge(reading: Reading) -> None:
    """What was read is a table that others can work with."""
    table = reading.table
    for frontend, route in table.routes.items():
        assert check_route(table.family, frontend, route) is None
    assert reading.vague <= table.routes.keys()
    assert all("\n" not in sentence for sentence in table.damage)
    assert capabilities_of(reading.mode)
    as_held_by(reading, table, configured=True)


def foreign_saved(data: bytes) -> None:
    """What iptables-save prints of kube-proxy, read family by family: never an error."""
    text = data.decode(errors="replace")
    for each in saved.split(text):
        if not kube_proxy_ipvs.is_meant(each) and (reading := kube_proxy_iptables.decode(each)) is not None:
            _judge(reading)


def foreign_rule_lines(data: bytes) -> None:
    """Rules line by line, in the spellings of all versions: never an error."""
    for line in data.decode(errors="replace").split("\n"):
        saved.options_of(line)
        respell(line)


def foreign_nft(data: bytes) -> None:
    """What nft lists, as text: never an error."""
    for table in nft_text.parse(data.decode(errors="replace")):
        _judge(kube_proxy_nftables.decode(table))


def foreign_nft_json(data: bytes) -> None:
    """The same as JSON."""
    with contextlib.suppress(ForeignError):
        for table in nft_json.parse(data):
            _judge(kube_proxy_nftables.decode(table))


def ipset_saved(data: bytes) -> None:
    """What ipset saves: never an error, and what was read is read the same again."""
    sets, faults = ipset_text.parse(data.decode(errors="replace").split("\n"))
    assert all("\n" not in each for each in faults)
    assert ipset_text.parse(ipset_text.lines(sets)) == (sets, [])


def ipvs_saved(data: bytes) -> None:
    """What ipvsadm saves or lists: likewise."""
    servers, faults = ipvs_text.parse(data.decode(errors="replace").split("\n"))
    assert all("\n" not in each for each in faults)
    by_address = {key: held for key, held in servers.items() if not key.mark}
    assert ipvs_text.parse(ipvs_text.lines(by_address)) == (by_address, [])


def addresses_listed(data: bytes) -> None:
    """What ip lists of addresses: likewise."""
    text = data.decode(errors="replace")
    if (found := addresses_json.parse_at(text, 0)) is not None:
        addresses, end = found
        assert 0 < end <= len(text)
        again = addresses_json.text_of(addresses)
        assert addresses_json.parse_at(again, 0) == (addresses, len(again))


def foreign_parts(data: bytes) -> None:
    """A text of several programs is cut into what each printed; with all that mode ipvs leaves, that is a table."""
    found = parts.split(data.decode(errors="replace"))
    sets, _ = ipset_text.parse(found.ipset or [])
    servers, _ = ipvs_text.parse(found.ipvsadm or [])
    rules = {each.family: each for each in saved.split(found.iptables)}
    for family in Family:
        _judge(kube_proxy_ipvs.decode(rules.get(family), State(servers, sets, found.addresses), family))


def foreign_removal(data: bytes) -> None:
    """What removes kube-proxy's rules touches nothing else, whatever iptables-save printed."""
    text = data.decode(errors="replace")
    rules = {line[len("-A ") :] for line in text.split("\n") if line.startswith("-A ")}
    for step in removal.removal(text).steps:
        table = ""
        assert step.endswith("COMMIT\n")
        for line in step[:-1].split("\n"):
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith("-D "):
                assert line[len("-D ") :] in rules
            elif line != "COMMIT":
                chain = line.removeprefix("-X ").removeprefix(":").removesuffix(" - [0:0]")
                assert removal.is_theirs(table, chain), line


def ipvs_rules(data: bytes) -> None:
    """Our own rules of mode ipvs, edited by others."""
    with contextlib.suppress(iptables_text.TextError):
        found = iptables_text.parse(data.decode(errors="replace"), iptables_text.IPVS_PREFIX, ipvs_chains.TABLES)
        for family in Family:
            ipvs_chains.damage(found, ipvs_chains.read(found, family), family)


def secrets(data: bytes) -> None:
    """A log that goes into a bundle: taking secrets out of it never fails, and never takes long."""
    text = data.decode(errors="replace")
    assert "-----BEGIN RSA PRIVATE KEY-----" not in without_secrets(text)
    cleaned({"log": [text], text: text})


_NOT_TAKEN = flags.PATHS
"""What would be read."""


def arguments(data: bytes) -> None:
    """Flags, as users spell them, one a line."""
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        given = flags.normalise(data.decode().split("\n"))
        pairs = [each.removeprefix("--").partition("=")[::2] for each in given if each.startswith("--") and "=" in each]
        load([(name, value) for name, value in pairs if name in flags.BY_NAME and name not in _NOT_TAKEN])


def credentials(data: bytes) -> None:
    """What the child says that reads credentials: it hands on what stands in a kubeconfig."""
    for answer in (data, msgspec.json.encode({"server": data.decode(errors="replace")})):
        with contextlib.suppress(CredentialsError):
            accept(answer)


def events(data: bytes) -> None:
    """Events name what others named."""
    text = data.decode(errors="replace")
    namespace, _, name = text.partition("/")
    for event in (
        server_not_started(text, "metrics", text),
        health_check_not_started(text, Key(namespace, name), 1, text),
    ):
        msgspec.json.encode(manifest(event, instance=text, nanoseconds=1))


TARGETS: tuple[Callable[[bytes], None], ...] = (
    *(foreign_saved, foreign_rule_lines, foreign_nft, foreign_nft_json, foreign_parts, foreign_removal),
    *(ipset_saved, ipvs_saved, addresses_listed, ipvs_rules, secrets, arguments, credentials, events),
)

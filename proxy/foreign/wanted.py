"""What another proxy's rules should come to, by the objects: of manifests, or of the API server, listed once."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from proxy.config.settings import Settings
from proxy.node import Interfaces, normal_node_name
from rules.forwarding import Family, ForwardingTable

if TYPE_CHECKING:
    from proxy.sources.manifest_objects import Loaded


class CannotTellError(Exception):
    """Nobody says what is wanted; the message says why and what to do."""


class Objects(NamedTuple):
    """The objects that say what is wanted."""

    loaded: Loaded
    by: str
    """Whose they are, for people."""


def of_given(manifests: str, settings: Settings) -> Objects | None:
    """The objects of what a verb was given: manifests, else an API server; None: neither.

    Args:
        manifests: a file or a directory; empty: none were given.
        settings: where the API server is (`kubeconfig`, `master`), and which node this is.

    Raises:
        CannotTellError: they cannot be had.
        ValueError: the node's name is empty (NOD-1).
    """
    if manifests:
        return of_manifests(manifests)
    if settings.kubeconfig or settings.master:
        return of_api_server(settings, normal_node_name(settings.hostname_override, socket.gethostname()))
    return None


def of_manifests(name: str) -> Objects:
    """The objects in a file or a directory; `-` is standard input.

    Raises:
        CannotTellError: they cannot be read or used.
    """
    from proxy.sources.manifest_files import Unreadable  # noqa: PLC0415  # YAML, which the API server does without
    from proxy.sources.manifest_loading import given  # noqa: PLC0415  # likewise
    from proxy.sources.manifest_objects import FileError  # noqa: PLC0415  # likewise

    try:
        loaded = given(name)
    except (Unreadable, FileError) as error:
        raise CannotTellError(str(error)) from None
    if loaded.unusable:
        raise CannotTellError(f"nothing in {name} can be used")
    return Objects(loaded, name)


def of_api_server(settings: Settings, node_name: str) -> Objects:
    """What the API server of the settings has, as kube-proxy on that node would list it.

    Raises:
        CannotTellError: it could not be asked.
    """
    from proxy.foreign.listing import listed  # noqa: PLC0415  # a client, which answers from manifests do without

    return listed(settings, node_name)


def tables(
    objects: Objects, settings: Settings, hostname: str, mode: str, interfaces: Interfaces | None
) -> tuple[dict[Family, ForwardingTable], tuple[str, ...]]:
    """What the objects come to where a proxy runs in some mode, and what is wrong with them.

    `interfaces` are the node's own; None: it has the addresses that its Node object says.

    Raises:
        ValueError: the node's name is empty (NOD-1).
    """
    from proxy.render import render  # noqa: PLC0415  # next to its one use: YAML

    rendered = render(objects.loaded, in_mode(settings, mode), hostname, interfaces=interfaces)
    return {table.family: table for table in rendered.tables}, rendered.problems


def in_mode(settings: Settings, mode: str) -> Settings:
    """The settings of a proxy that runs in another mode."""
    return msgspec.structs.replace(settings, mode=mode)

"""hypothesis strategies for the tables that the iptables dataplane holds: with health checks that INPUT lets in."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from rules.forwarding import Family, ForwardingTable
from tests import strategies

_PORTS = st.frozensets(st.integers(1, 65535), max_size=3)


@st.composite
def tables(draw: st.DrawFn, family: Family, *, with_node: bool = True) -> ForwardingTable:
    """See `tests.strategies.tables`."""
    table = draw(strategies.tables(family, with_node=with_node))
    return msgspec.structs.replace(table, node=msgspec.structs.replace(table.node, health_check_ports=draw(_PORTS)))

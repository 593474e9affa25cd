"""The messages that bring the static part of a table into being, and from one shape into another.

Only what differs is written, and elements of Services are left alone: a chain whose rules differ is emptied and
filled again, all in one transaction, so that no packet sees it empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rules.forwarding import Family
from rules.nftables.layout import TABLE, TABLE_COMMENT, Layout
from rules.nftables.messages import Element, add_elements, remove_elements
from rules.nftables.objects import (
    ChainSpec,
    SetSpec,
    TableSpec,
    add_chain,
    add_rule,
    add_set,
    add_table,
    delete_chain,
    delete_set,
    delete_table,
    flush_chain,
    set_policy,
)
from rules.nftables.sets import PICK
from rules.nftables.state import StaticState

_COMMENT_START = TABLE_COMMENT.rstrip("0123456789")


class Replacement(NamedTuple):
    """What turns one static part into another."""

    messages: list[bytes]
    """For one transaction, before those with elements; none: nothing differs."""
    recreated: bool
    """Whether the table is made anew: then it has no elements, and all must be added."""


def messages_to_create(layout: Layout) -> list[bytes]:
    """Make the table with its static part, where there is none."""
    family = layout.family
    return [
        add_table(family, layout.table),
        *(add_set(family, TABLE, each) for each in layout.sets),
        *(add_chain(family, TABLE, each) for each in layout.chains),
        *(message for each in layout.chains for message in _fill(family, each)),
        *add_elements(family, TABLE, PICK, layout.picks),
    ]


def messages_to_delete(family: Family) -> list[bytes]:
    """Delete the table with all in it, whether it is there or not."""
    return [add_table(family, TableSpec(TABLE)), delete_table(family, TABLE)]


def messages_to_recreate(layout: Layout) -> list[bytes]:
    """Make the table anew, whatever is there: the last resort, as affinity is forgotten with it."""
    return [*messages_to_delete(layout.family), *messages_to_create(layout)]


def messages_to_replace(present: StaticState | None, layout: Layout) -> Replacement:
    """Turn the static part that is there into the wanted one.

    Chains, rules and named sets that the layout lacks are deleted: let it have all counts that are there, for which
    see `rules.nftables.adopt.facts_of`, as deleting `pick-N` in a running table is neither cheap nor safe (LAYOUT.md).
    The kernel may refuse with EBUSY to delete what somebody else's elements still lead to; `messages_to_recreate`
    then does it.
    """
    if present is None:
        return Replacement(messages_to_create(layout), recreated=True)
    if _must_recreate(present, layout):
        return Replacement(messages_to_recreate(layout), recreated=True)
    family = layout.family
    wanted_sets = {each.name: each for each in layout.sets}
    wanted = {each.name: each for each in layout.chains}
    # A chain on a hook can be made anew in place: nothing leads to it.
    rehooked = {name for name, chain in wanted.items() if name in present.chains and _hook_differs(present, chain)}
    refilled = {
        name
        for name, chain in present.chains.items()
        if name in rehooked or name not in wanted or _steps(chain) != _steps(wanted[name])
    }
    strange_chains = [name for name in present.chains if name not in wanted]
    strange_sets = [name for name in present.sets if name not in wanted_sets]
    kept_picks = [element for element in layout.picks if _same(element) in set(map(_same, present.picks))]
    strange_picks = [element for element in present.picks if _same(element) not in set(map(_same, layout.picks))]
    messages = [
        *([add_table(family, layout.table)] if present.table.flags != layout.table.flags else []),
        *(flush_chain(family, TABLE, name) for name in sorted(refilled) if present.chains[name].rules),
        *remove_elements(family, TABLE, PICK, strange_picks),
        *(delete_set(family, TABLE, name) for name in strange_sets),
        *(delete_chain(family, TABLE, name) for name in [*strange_chains, *sorted(rehooked)]),
        *(add_set(family, TABLE, each) for each in layout.sets if each.name not in present.sets),
        *(
            add_chain(family, TABLE, each)
            for each in layout.chains
            if each.name not in present.chains or each.name in rehooked
        ),
        *_policies(family, present, layout.chains, rehooked),
        *(
            message
            for each in layout.chains
            if each.name in refilled or each.name not in present.chains
            for message in _fill(family, each)
        ),
        *add_elements(family, TABLE, PICK, (each for each in layout.picks if each not in kept_picks)),
    ]
    return Replacement(messages, recreated=False)


def same_set(one: SetSpec, other: SetSpec) -> bool:
    """Whether two sets do the same, however nft prints them."""
    return one._replace(userdata=b"") == other._replace(userdata=b"")


def _must_recreate(present: StaticState, layout: Layout) -> bool:
    """Whether something differs that the kernel cannot change in place, or that is of another version of ours."""
    comment = present.table.comment
    if comment != TABLE_COMMENT and comment.startswith(_COMMENT_START):
        return True
    if any(each.name in present.sets and not same_set(present.sets[each.name], each) for each in layout.sets):
        return True
    return any(
        each.name in present.chains and (present.chains[each.name].hook is None) != (each.hook is None)
        for each in layout.chains
    )


def _hook_differs(present: StaticState, chain: ChainSpec) -> bool:
    hook = present.chains[chain.name].hook
    return hook is not None and chain.hook is not None and hook[:3] != chain.hook[:3]


def _policies(family: Family, present: StaticState, chains: Iterable[ChainSpec], rehooked: set[str]) -> Iterable[bytes]:
    for chain in chains:
        there = present.chains.get(chain.name)
        if there is None or there.hook is None or chain.hook is None or chain.name in rehooked:
            continue
        if there.hook.policy != chain.hook.policy:
            yield set_policy(family, TABLE, chain.name, chain.hook.policy)


def _fill(family: Family, chain: ChainSpec) -> list[bytes]:
    return [add_rule(family, TABLE, chain.name, rule) for rule in chain.rules]


def _steps(chain: ChainSpec) -> list[object]:
    """What a chain does, without comments."""
    return [rule.expressions for rule in chain.rules]


def _same(element: Element) -> object:
    return element._replace(comment="")

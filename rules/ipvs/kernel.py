"""What mode ipvs holds in the kernel of one family, read and changed: sets, servers, addresses and rules.

A `Kernel` owns the sockets.  What it reads are values for `rules.ipvs.decode` and `rules.ipvs.plan`; what it is told to
do are their steps, one after the other.  It stops at a step of which the kernel refused something, and says what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from rules.dataplane import DataplaneError
from rules.forwarding import Address, Family, Prefix, Protocol
from rules.iptables.programs import Backend, available, choose, read_ours, remove
from rules.iptables.text import IPVS_PREFIX, Saved
from rules.ipvs import KUBE_PROXYS_DEVICE, chains, messages, sets
from rules.ipvs.chains import TABLES, Wanted
from rules.ipvs.device import Device
from rules.ipvs.layout import Server, State
from rules.ipvs.marks import scheme
from rules.ipvs.messages import Held, Key
from rules.ipvs.plan import (
    Add,
    Bind,
    Change,
    ChangeServer,
    Delete,
    NewReal,
    NewServer,
    Oddities,
    RemoveReal,
    RemoveServer,
    Serve,
    Step,
    Unbind,
    Weigh,
    WriteRules,
    key_of,
)
from rules.ipvs.services import Ipvs
from rules.ipvs.sets import KINDS, Set
from rules.netlink.ipset import Element, Extra, Ipsets


class Refused(NamedTuple):
    """Something that the kernel did not take."""

    what: Key | Element | Address
    why: str


class RefusedError(DataplaneError):
    """The kernel refused parts of a step; the other parts of it, and the steps before, were carried out."""

    def __init__(self, refused: Collection[Refused]) -> None:
        first = next(iter(refused))
        super().__init__(first.why if len(refused) == 1 else f"{first.why}; and {len(refused) - 1} refusals more")
        self.refused = tuple(refused)


class Found(NamedTuple):
    """What the kernel holds of ours, and what it holds beside."""

    saved: Saved
    state: State
    odd: Oddities
    servers: Mapping[Key, Held]
    """All virtual servers of the family, whoever made them."""
    own: frozenset[Address]
    """Addresses of other devices than ours."""
    missing: frozenset[Set]
    """Sets that aren't there."""
    damage: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether there is anything of ours."""
        return bool(self.saved or len(self.missing) < len(Set) or self.state.addresses)


class Kernel:
    """One family's part of the kernel, in the network namespace of the thread that opens it."""

    def __init__(self, family: Family, excluded: Iterable[Prefix] = (), backend: Backend | None = None) -> None:
        """Of a family; virtual servers at excluded networks are never removed (excludeCIDRs, IPVS-24).

        Raises:
            UnavailableError: the kernel has no IPVS or no ipset, or the node no iptables; the message says which.
        """
        self._family = family
        self._excluded = tuple(excluded)
        self._programs = choose(family, backend)
        with contextlib.ExitStack() as stack:
            self._ipvs = stack.enter_context(Ipvs())
            self._sets = stack.enter_context(Ipsets())
            self._device = stack.enter_context(Device())
            self._other_device = stack.enter_context(Device(KUBE_PROXYS_DEVICE))
            self._sockets = stack.pop_all()

    def close(self) -> None:
        """Give back the sockets."""
        self._sockets.close()

    @property
    def backend(self) -> Backend:
        """By which iptables programs rules are written."""
        return self._programs.backend

    @property
    def ipvs(self) -> Ipvs:
        return self._ipvs

    @property
    def sets(self) -> Ipsets:
        return self._sets

    @property
    def device(self) -> Device:
        return self._device

    # --- reading ---------------------------------------------------------------------------------------------

    def find(self, wanted: Collection[Key] = ()) -> Found:
        """Everything of ours; `wanted`: virtual servers that are ours whether or not a set says so.

        Raises:
            DataplaneError: the kernel could not be read.
        """
        saved = self._saved()
        elements, missing, damage = self._elements()
        servers = self._ipvs.dump(self._family)
        ours = scheme(chains.read(saved, self._family).facts.mark)
        addressed = {
            (each.protocol, each.address, each.port)
            for which in (*KINDS.values(), Set.OPEN)
            for each in elements[which]
        }

        def is_ours(key: Key) -> bool:
            if key in wanted:
                return True
            if key.mark:
                return ours.is_ours(key.mark)
            return (key.protocol, key.address, key.port) in addressed and not self._is_excluded(key.address)

        held = {key: each for key, each in servers.items() if is_ours(key)}
        state = State(
            elements,
            {key: _server(each) for key, each in held.items()},
            self._device.addresses(self._family),
        )
        odd = _oddities(held)
        damage += [f"the virtual server {decode_words(key)} is not as any of ours" for key in odd.broken]
        damage += [f"a real server of {decode_words(key)} has another weight than 1" for key, _ in odd.misweighed]
        own = self._device.elsewhere(self._family) - self._other_device.addresses(self._family)
        return Found(saved, state, odd, servers, own, missing, tuple(damage))

    def _saved(self) -> Saved:
        return read_ours(self._programs, IPVS_PREFIX, TABLES)

    def _elements(self) -> tuple[dict[Set, Mapping[Element, Extra]], frozenset[Set], list[str]]:
        """The elements of our sets; the sets that aren't there; what is wrong with those that are."""
        names = self._sets.names()
        elements: dict[Set, Mapping[Element, Extra]] = {}
        missing = set()
        damage = []
        for which in Set:
            spec = sets.spec(self._family, which)
            held = self._sets.held(spec.name) if spec.name in names else None
            if held is None or held.spec != spec:
                missing.add(which)
                damage.append(f"the set {spec.name} is {'missing' if held is None else 'of another type'}")
            elements[which] = held.elements if held is not None and held.spec == spec else {}
        known = {sets.name(self._family, which) for which in Set}
        damage += [
            f"the set {name} serves nothing" for name in sorted(names - known) if sets.is_ours(self._family, name)
        ]
        return elements, frozenset(missing), damage

    def _is_excluded(self, address: Address) -> bool:
        return any(address in network for network in self._excluded)

    # --- writing ---------------------------------------------------------------------------------------------

    def prepare(self, found: Found) -> None:
        """Make the device and the sets, where they are missing.

        Raises:
            DataplaneError: they cannot be made.
        """
        self._device.ensure()
        if not found.missing:
            return
        stale = [each for each in self._sets.names() if sets.is_ours(self._family, each)]
        known = {sets.name(self._family, which): which for which in Set}
        in_the_way = [name for name in stale if name not in known or known[name] in found.missing]
        if in_the_way:
            self.remove_rules()  # which refer to them
            for name in in_the_way:
                self._sets.destroy(name)
        for which in Set:
            self._sets.create(sets.spec(self._family, which))

    def perform(self, steps: Iterable[Step], wanted: Wanted) -> int:
        """Carry steps out in order; how many rules were written.

        Raises:
            RefusedError: the kernel refused parts of one, and the rest was not tried.
            DataplaneError: a step could not be carried out at all.
        """
        rules = 0
        for step in steps:
            match step:
                case Serve(changes):
                    self._serve(changes)
                case Add(which, elements):
                    refused = self._sets.add(sets.spec(self._family, which), elements)
                    self._check(which, ((each.element, each.reason) for each in refused))
                case Delete(which, gone):
                    refused = self._sets.delete(sets.spec(self._family, which), gone)
                    self._check(which, ((each.element, each.reason) for each in refused))
                case Bind(addresses):
                    self._bind(self._device.add, addresses, "takes")
                case Unbind(addresses):
                    self._bind(self._device.remove, addresses, "gives up")
                case WriteRules():
                    rules += self.write_rules(wanted)
        return rules

    def _serve(self, changes: Collection[Change]) -> None:
        refused = self._ipvs.send([_request(change) for change in changes])
        if refused:
            in_order = list(changes)
            raise RefusedError(
                [
                    Refused(key, f"IPVS refuses the virtual server {decode_words(key)}: {each.reason}")
                    for each in refused
                    for key in [key_of(in_order[each.place])]
                ]
            )

    def _check(self, which: Set, refused: Iterable[tuple[Element, str]]) -> None:
        name = sets.name(self._family, which)
        if found := [Refused(element, f"the set {name} refuses an element: {why}") for element, why in refused]:
            raise RefusedError(found)

    @staticmethod
    def _bind(
        change: Callable[[Iterable[Address]], Mapping[Address, str]], addresses: Iterable[Address], verb: str
    ) -> None:
        if refused := change(addresses):
            raise RefusedError(
                [Refused(address, f"the device never {verb} an address: {why}") for address, why in refused.items()]
            )

    def write_rules(self, wanted: Wanted) -> int:
        """Make the chains what they should be; how many lines that took.

        Raises:
            DataplaneError: iptables refused.
        """
        try:
            built = chains.build(wanted, self._family)
        except ValueError as error:
            raise DataplaneError(str(error)) from None
        lines = chains.difference(self._saved(), built)
        if lines:
            self._programs.apply("\n".join([*lines, ""]))
        return len(lines)

    def remove_rules(self) -> bool:
        """Remove our chains, by whichever programs they were written; whether there were any."""
        return remove(available(self._family).values(), _removal, IPVS_PREFIX, TABLES)

    def remove_other_rules(self) -> bool:
        """Remove those of the other kind of programs."""
        others = (each for each in available(self._family).values() if each.backend != self._programs.backend)
        return remove(others, _removal, IPVS_PREFIX, TABLES)

    def remove_sets(self) -> bool:
        """Destroy our sets, to which no rule refers any more; whether there were any."""
        ours = [name for name in self._sets.names() if sets.is_ours(self._family, name)]
        for name in sorted(ours):
            self._sets.destroy(name)
        return bool(ours)

    def remove_device(self) -> bool:
        """Remove the device, once no family has addresses on it; whether it was there."""
        if not self._device.exists() or any(self._device.addresses(family) for family in Family):
            return False
        return self._device.delete()


def decode_words(key: Key) -> str:
    """A virtual server as people call it."""
    from rules.ipvs.decode import server_words  # noqa: PLC0415  # for an error alone

    return server_words(key)


def _removal(saved: Saved) -> str:
    return "\n".join([*chains.removal(saved), ""])


def _server(held: Held) -> Server:
    key = held.server.key
    try:
        protocol = None if key.mark else Protocol(key.protocol)
    except ValueError:
        protocol = None
    reals = frozenset(target for target, real in held.reals.items() if real.weight)
    return Server(held.server, reals, protocol)


def _oddities(held: Mapping[Key, Held]) -> Oddities:
    reals = [(key, target, real) for key, each in held.items() for target, real in each.reals.items()]
    return Oddities(
        draining=frozenset((key, target) for key, target, real in reals if not real.weight),
        idle=frozenset((key, target) for key, target, real in reals if not real.connections),
        misweighed=frozenset((key, target) for key, target, real in reals if real.weight > 1),
        broken=frozenset(key for key, each in held.items() if each.foreign),
    )


def _request(change: Change) -> bytes:
    match change:
        case NewServer(server):
            return messages.add_server(server)
        case ChangeServer(server):
            return messages.set_server(server)
        case RemoveServer(key):
            return messages.delete_server(key)
        case NewReal(key, target):
            return messages.add_real(key, target)
        case Weigh(key, target, weight):
            return messages.set_real(key, target, weight)
        case RemoveReal(key, target):
            return messages.delete_real(key, target)

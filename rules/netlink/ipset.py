"""ipsets over netlink: made, filled, listed and destroyed.

    with Ipsets() as sets:
        sets.create(spec)
        refused = sets.add(spec, {Element(address, 6, 80): Extra(comment="default/web:http")})

Sets are named in one table for both families.  Additions and deletions go by some 500 elements to a message; every
element stands for itself, so that one that is refused leaves the others alone.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from rules.dataplane import DataplaneError, UnavailableError
from rules.netlink import ipset_messages
from rules.netlink.attributes import DecodeError
from rules.netlink.closing import Closing
from rules.netlink.errors import error_code
from rules.netlink.ipset_messages import NOTHING, Element, Extra, HeldSet, SetSpec, SetType, reason
from rules.netlink.served import closed_unless_served
from rules.netlink.transaction import NetfilterSocket

__all__ = [
    "NOTHING",
    "Element",
    "Extra",
    "HeldSet",
    "Ipsets",
    "RefusedElement",
    "SetSpec",
    "SetType",
]

T = TypeVar("T")

_AT_ONCE = 16
"""Messages of elements to a send: half a megabyte."""


class RefusedElement(NamedTuple):
    """An element that the kernel refused; the others were carried out."""

    element: Element
    errno: int

    @property
    def reason(self) -> str:
        """In words."""
        return reason(self.errno)


class Ipsets(Closing):
    """A socket to the ipsets of the network namespace of the calling thread.  One call at a time.

    The first one in a kernel has it load its module.

    Raises:
        UnavailableError: the kernel has no ipset, or we may not use it.
    """

    def __init__(self) -> None:
        self._socket = NetfilterSocket()
        with closed_unless_served(
            self._socket,
            denied="ipset may not be used: CAP_NET_ADMIN is needed",
            absent=lambda error: f"this kernel has no ipset ({_words(error)}): load ip_set",
        ):
            self._socket.request(ipset_messages.protocol_request())

    def close(self) -> None:
        """Give back the socket; the sets stay."""
        self._socket.close()

    # --- reading ---------------------------------------------------------------------------------------------

    def names(self) -> frozenset[str]:
        """The names of all sets, whoever made them.

        Raises:
            DataplaneError: the kernel refused.
        """
        return frozenset(self.sizes())

    def sizes(self) -> dict[str, int]:
        """The names of all sets, whoever made them, and how many elements they have; it costs little.

        Raises:
            DataplaneError: the kernel refused.
        """
        try:
            answers = self._socket.dump(ipset_messages.sizes_request())
            return dict(ipset_messages.decode_size(payload) for payload in answers)
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"ipsets could not be listed: {_words(error)}") from None

    def held(self, name: str) -> HeldSet | None:
        """A set with its elements; None: there is none.

        Raises:
            DataplaneError: the kernel refused, or said what makes no sense.
        """
        return self._held(name, elements=True)

    def any_set(self, name: str) -> tuple[SetSpec, frozenset[Element]] | None:
        """A set that others made, whatever its size and options, and its elements without what they carry.

        None: there is none, or it is of a type that nobody here knows.

        Raises:
            DataplaneError: the kernel refused, or said what makes no sense.
        """
        return self._listed(name, elements=True, decode=ipset_messages.decode_any_set)

    def _held(self, name: str, *, elements: bool) -> HeldSet | None:
        return self._listed(name, elements=elements, decode=ipset_messages.decode_set)

    def _listed(self, name: str, *, elements: bool, decode: Callable[[Iterable[bytes]], T | None]) -> T | None:
        try:
            return decode(self._socket.dump(ipset_messages.list_request(name, elements=elements)))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise DataplaneError(f"ipset {name} could not be read: {_words(error)}") from None
        except DecodeError as error:
            raise DataplaneError(f"ipset {name} could not be read: {error}") from None

    # --- writing ---------------------------------------------------------------------------------------------

    def create(self, spec: SetSpec) -> bool:
        """Make a set; whether it wasn't there.  One that is there as it should be keeps its elements.

        Raises:
            DataplaneError: there is one of the name that is another; the message says so.
            UnavailableError: the kernel doesn't know the type.
        """
        try:
            self._socket.perform(ipset_messages.create_request(spec))
        except OSError as error:
            if error.errno == ipset_messages.NO_SUCH_TYPE:
                raise UnavailableError(f"this kernel has no ipsets of type {spec.type.value}") from None
            if error.errno != errno.EEXIST:
                raise DataplaneError(f"ipset {spec.name} could not be made: {_words(error)}") from None
        else:
            return True
        # The kernel, asked to make it or else compare, takes sets of different families for the same.
        held = self._held(spec.name, elements=False)
        if held is None or held.spec != spec:
            raise DataplaneError(f"ipset {spec.name} could not be made: there is another of that name")
        return False

    def add(self, spec: SetSpec, elements: Mapping[Element, Extra]) -> list[RefusedElement]:
        """Add elements; one that is there gets what it carries replaced.

        Raises:
            DataplaneError: there is no such set, or they could not be handed to the kernel.
            ValueError: an element is none of such a set.
        """
        return self._change(spec, elements, ipset_messages.add_request)

    def delete(self, spec: SetSpec, elements: Iterable[Element]) -> list[RefusedElement]:
        """Delete elements; one that isn't there is no refusal.

        Raises:
            DataplaneError: as of `add`.
            ValueError: an element is none of such a set.
        """
        return self._change(spec, dict.fromkeys(elements, NOTHING), ipset_messages.delete_request)

    def destroy(self, name: str) -> bool:
        """Destroy a set; whether there was one.

        Raises:
            DataplaneError: rules refer to it.
        """
        try:
            self._socket.perform(ipset_messages.destroy_request(name))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise DataplaneError(f"ipset {name} could not be destroyed: {_words(error)}") from None
        return True

    def _change(
        self, spec: SetSpec, elements: Mapping[Element, Extra], request: Callable[[str, Sequence[bytes]], bytes]
    ) -> list[RefusedElement]:
        packed = ipset_messages.packed(spec, elements)
        refused: dict[int, int] = {}
        left = list(ipset_messages.spans(packed, 0, len(packed)))
        try:
            while left:
                now, left = left[:_AT_ONCE], left[_AT_ONCE:]
                answers = self._socket.refusals([request(spec.name, packed[begin:end]) for begin, end in now])
                for message, answer in answers:
                    code = error_code(answer.payload)
                    place = ipset_messages.refused_place(answer.payload)
                    begin, end = now[message]
                    if place is None or not begin <= place < end:
                        raise DataplaneError(f"ipset {spec.name} could not be changed: {reason(code)}")
                    refused[place] = code
                    if place + 1 < end:  # those after it were not looked at
                        left.append((place + 1, end))
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"ipset {spec.name} could not be changed: {_words(error)}") from None
        keys = list(elements) if refused else []
        return [RefusedElement(keys[place], code) for place, code in sorted(refused.items())]


def _words(error: Exception) -> str:
    return reason(error.errno) if isinstance(error, OSError) and error.errno else str(error)

"""The connection tracking table of a node: its flows read, and deleted.

What a kernel can do with a `Match` differs:

* from 6.8 on it deletes all entries that match in one request, however many;
* from 5.8 on it returns the entries that match the original tuple, and these are deleted one by one, in batches;
* before that it returns every entry of the family.

The last two take the same path here: ask for what may match, look at each entry again, delete those that do.  A kernel
that cannot delete by a match refuses it (EINVAL, EOPNOTSUPP), as the tuples of a match are never complete; so no kernel
takes one for a request to delete more.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator

from rules.forwarding import Family, Protocol
from rules.netlink.closing import Closing
from rules.netlink.conntrack import Flow, Match, decode, delete_one_request, delete_request, list_request
from rules.netlink.errors import NetlinkError
from rules.netlink.transaction import NetfilterSocket

_BATCH = 2048
"""Entries that are deleted in one send."""
_TRIES = 5
"""How often a dump is made that the kernel calls interrupted; what it showed counts all the same (CT-6)."""
_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class Conntrack(Closing):
    """The connection tracking table of one family, in the network namespace of the thread that first uses it.

    All methods block, in proportion to the table: the kernel walks it once for each match.  One call at a time.
    """

    def __init__(self, family: Family, *, open_socket: Callable[[], NetfilterSocket] = NetfilterSocket) -> None:
        self._family = family
        self._open = open_socket
        self._sockets: list[NetfilterSocket] = []
        self._deletes_by_match = True
        """Until the kernel has refused it."""

    def close(self) -> None:
        """Give back the sockets; the next use opens others."""
        for each in self._sockets:
            each.close()
        self._sockets = []

    def flows(self, protocol: Protocol, status: int = 0) -> Iterator[Flow]:
        """All flows of a protocol; interrupted by changes, it may miss some and show some twice.

        With status bits, kernels that can leave out flows that lack one of them; others tell those as well.

        Raises:
            OSError: the kernel refused.
            DecodeError: what came is no entry.
        """
        try:
            yield from self._flows(Match(self._family, protocol, status=status, mask=status))
        except NetlinkError as error:
            if error.errno != errno.EINTR:
                raise

    def delete(self, flows: Iterable[Flow]) -> int:
        """Delete these entries, and say how many of them were still there.

        Raises:
            OSError: the kernel refused.
            DecodeError: a flow's rest is malformed.
        """
        deleted = 0
        rest = iter(flows)
        while some := tuple(itertools.islice(rest, _BATCH)):
            requests = [delete_one_request(self._family, flow) for flow in some]
            # An entry that is gone by now (ENOENT) was not deleted here.
            deleted += len(requests) - len(self._socket(1).perform_each(requests))
        return deleted

    def delete_matching(self, match: Match) -> int:
        """Delete the entries that match, and say how many they were.

        Where there are any it is one request to the kernel, if the kernel takes it and compares rightly.

        Raises:
            OSError: the kernel refused.
            DecodeError: what came is no entry.
        """
        if self._deletes_by_match and match.comparable:
            try:
                return self._delete_by_match(match)
            except NetlinkError as error:
                if error.errno not in _REFUSED:
                    raise
                self._deletes_by_match = False
        return self.sweep(match, lambda _: True)

    def sweep(self, match: Match, stale: Callable[[Flow], bool]) -> int:
        """Look at every entry that matches and delete those that `stale` says; how many that were.

        Deletes go out while the dump comes in, so that the memory it takes does not grow with the table.

        Raises:
            OSError: the kernel refused.
            DecodeError: what came is no entry.
        """
        deleted = 0
        for _ in range(_TRIES):
            interrupted = False
            found: list[Flow] = []
            try:
                for flow in self._flows(match.coarse):
                    if match.admits(flow) and stale(flow):
                        found.append(flow)
                        if len(found) == _BATCH:
                            deleted += self.delete(found)
                            found = []
            except NetlinkError as error:
                if error.errno != errno.EINTR:
                    raise
                interrupted = True
            deleted += self.delete(found)
            if not interrupted:
                break
        return deleted

    def _flows(self, match: Match) -> Iterator[Flow]:
        for data, spans in self._socket(0).stream(list_request(match)):
            for start, end in spans:
                flow = decode(data, start, end)
                if flow is not None:
                    yield flow

    def _delete_by_match(self, match: Match) -> int:
        request = delete_request(match)
        # The kernel does not say how many it deletes.  Asked before, there is most often nothing to delete.
        count = 0
        try:
            for _, spans in self._socket(0).stream(list_request(match)):
                count += len(spans)
        except NetlinkError as error:
            if error.errno != errno.EINTR:
                raise
        if count:
            self._socket(1).perform(request)
        return count

    def _socket(self, number: int) -> NetfilterSocket:
        """The first is for reading, the second for deleting while the first still reads."""
        while len(self._sockets) <= number:
            self._sockets.append(self._open())
        return self._sockets[number]

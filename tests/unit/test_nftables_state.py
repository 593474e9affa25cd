"""Reading a table, where the kernel's dump cannot be trusted."""

import errno

import pytest

from rules.forwarding import Family
from rules.netlink.attributes import HEADER
from rules.netlink.errors import NetlinkError
from rules.nftables.layout import TABLE
from rules.nftables.messages import INTERVAL_END, Element, add_elements
from rules.nftables.state import read_elements, read_static


class Dumps:
    """A socket that answers one dump after the other, the last for ever."""

    def __init__(self, *dumps):
        self.dumps = list(dumps)
        self.asked = 0

    def dump(self, _message):
        self.asked += 1
        elements = self.dumps.pop(0) if len(self.dumps) > 1 else self.dumps[0]
        return [message[HEADER.size :] for message in add_elements(Family.IPV4, TABLE, "x", elements)]


ONE, TWO, THREE = (Element(bytes((number, 0, 0, 0))) for number in (1, 2, 3))


def test_a_dump_of_a_table_that_was_moving_is_taken_again():
    # One told twice is one not told at all.
    socket = Dumps([ONE, TWO, ONE], [ONE, TWO, THREE])
    assert read_elements(socket, Family.IPV4, "x") == [ONE, TWO, THREE]
    assert socket.asked == 2


def test_a_table_that_never_holds_still_is_an_error():
    with pytest.raises(NetlinkError) as raised:
        read_elements(Dumps([ONE, ONE]), Family.IPV4, "x")
    assert raised.value.errno == errno.EINTR


def test_an_end_and_a_start_with_one_key_are_two_elements():
    both = [ONE._replace(flags=INTERVAL_END), ONE]
    assert read_elements(Dumps(both), Family.IPV4, "x") == both


@pytest.mark.parametrize(("code", "found"), [(errno.ENOENT, True), (errno.EPERM, False)])
def test_only_a_table_that_is_not_there_is_none(code, found):
    class Refusing:
        def request(self, _message):
            raise NetlinkError(code, "refused")

    if found:
        assert read_static(Refusing(), Family.IPV4) is None
    else:
        with pytest.raises(NetlinkError):
            read_static(Refusing(), Family.IPV4)

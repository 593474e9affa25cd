"""Batches and answers of a netfilter socket, without a kernel."""

import errno
import socket
import struct
import sys

import pytest

from rules.netlink.attributes import ERROR, DecodeError, Message, be32, messages
from rules.netlink.errors import (
    Failure,
    LostAnswerError,
    NetlinkError,
    StaleGenerationError,
    TransactionError,
    error_code,
    raise_refusal,
)
from rules.netlink.transaction import NetfilterSocket, attributes_of, family_of, netfilter_message

_CAPPED, _TLVS = 0x100, 0x200


class FakeKernel:
    """Stands in for the kernel's end of the socket: keeps what is sent, and answers from a script."""

    def __init__(self, answer):
        self.answer = answer
        self.sent = []
        self.queue = []

    def sendto(self, data, _address):
        self.sent.append(data)
        self.queue += self.answer(list(messages(data)))

    def recv(self, _size, _flags=0):
        if not self.queue:
            raise BlockingIOError
        answer = self.queue.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def setsockopt(self, *args):
        pass

    def close(self):
        pass


@pytest.fixture
def talk(monkeypatch):
    def start(answer):
        kernel = FakeKernel(answer)
        kernel.bind = lambda _address: None
        monkeypatch.setattr(socket, "socket", lambda *_args: kernel)
        return kernel, NetfilterSocket()

    return start


def reply(kind, sequence, payload, flags=0):
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def error(message, code, text=b"", offset=0):
    tail = b""
    if text:
        tail += struct.pack("=HH", 5 + len(text), 1) + text + b"\0" * (4 - len(text) % 4)
    if offset:
        tail += struct.pack("=HHI", 8, 2, offset)
    header = struct.pack("=IHHII", 99, message.kind, message.flags, message.sequence, 0)
    return reply(2, message.sequence, struct.pack("=i", -code) + header + tail, _CAPPED | (_TLVS if tail else 0))


ONE = netfilter_message(0, 0, 2, b"")
TWO = netfilter_message(3, 0, 2, be32(1, 7))


def test_a_batch_is_one_send_with_numbered_messages_between_begin_and_end(talk):
    kernel, netfilter = talk(lambda sent: [error(sent[-1], 0)])
    netfilter.commit([ONE, TWO], generation=77)
    (batch,) = kernel.sent
    sent = list(messages(batch))
    assert [each.kind for each in sent] == [16, 10 << 8, 10 << 8 | 3, 17]
    assert [each.sequence - sent[0].sequence for each in sent] == [0, 1, 2, 3]
    assert attributes_of(sent[0].payload) == be32(1, 77)
    assert struct.unpack(">H", sent[0].payload[2:4]) == (10,)
    assert sent[3].flags & 4
    assert attributes_of(sent[2].payload) == be32(1, 7)


def test_a_kernel_that_ignores_the_wish_for_an_acknowledgement_is_done_when_it_is_silent(talk):
    kernel, netfilter = talk(lambda _sent: [])
    netfilter.commit([ONE])
    assert len(kernel.sent) == 1


def test_nothing_is_sent_for_no_messages(talk):
    kernel, netfilter = talk(lambda _sent: [])
    netfilter.commit([])
    assert kernel.sent == []


def test_every_refused_message_is_named_with_the_kernels_words(talk):
    _, netfilter = talk(lambda sent: [error(sent[1], errno.EEXIST), error(sent[2], errno.EINVAL, b"no such type", 24)])
    with pytest.raises(TransactionError) as raised:
        netfilter.commit([ONE, TWO])
    assert raised.value.errors == (
        Failure(0, errno.EEXIST, "", 0),
        Failure(1, errno.EINVAL, "no such type", 24),
    )
    assert str(raised.value) == "message 0: File exists; message 1: Invalid argument (no such type)"


@pytest.mark.parametrize("place", [0, -1])
def test_an_error_of_begin_or_end_is_that_of_the_whole(talk, place):
    _, netfilter = talk(lambda sent: [error(sent[place], errno.EPERM)])
    with pytest.raises(TransactionError) as raised:
        netfilter.commit([ONE])
    assert raised.value.errors == (Failure(-1, errno.EPERM, "", 0),)
    assert str(raised.value) == "the transaction: Operation not permitted"


def test_a_stale_generation_is_its_own_error(talk):
    _, netfilter = talk(lambda sent: [error(sent[0], errno.ERESTART)])
    with pytest.raises(StaleGenerationError):
        netfilter.commit([ONE], generation=1)


def test_lost_answers_are_not_taken_for_success(talk):
    _, netfilter = talk(lambda sent: [error(sent[1], errno.EEXIST), OSError(errno.ENOBUFS, "")])
    with pytest.raises(LostAnswerError) as raised:
        netfilter.commit([ONE])
    assert raised.value.errors[0] == Failure(0, errno.EEXIST, "", 0)


def test_answers_that_an_earlier_call_left_behind_are_not_this_ones(talk):
    kernel, netfilter = talk(lambda sent: [error(sent[-1], 0)])
    (stale,) = list(messages(ONE))
    kernel.queue = [error(stale._replace(sequence=2), errno.EEXIST)]
    netfilter.commit([ONE])


def dump_answers(*parts):
    def answer(sent):
        sequence = sent[0].sequence
        return [b"".join(reply(kind, sequence, payload, flags) for kind, payload, flags in part) for part in parts]

    return answer


DONE = (3, bytes(4), 2)


def test_a_dump_is_all_payloads_up_to_its_end(talk):
    kernel, netfilter = talk(dump_answers([(2561, b"aaaa", 2), (2561, b"bbbb", 2)], [(2561, b"cccc", 2), DONE]))
    assert netfilter.dump(ONE) == [b"aaaa", b"bbbb", b"cccc"]
    assert next(iter(messages(kernel.sent[0]))).flags & 0x300 == 0x300


def test_an_interrupted_dump_is_taken_again(talk):
    tries = []

    def answer(sent):
        tries.append(1)
        flags = 0x12 if len(tries) < 3 else 2
        return dump_answers([(2561, b"try%d" % len(tries), flags), DONE])(sent)

    _, netfilter = talk(answer)
    assert netfilter.dump(ONE) == [b"try3"]


def test_a_dump_that_is_always_interrupted_ends_with_an_error(talk):
    _, netfilter = talk(dump_answers([(2561, b"xxxx", 0x12), DONE]))
    with pytest.raises(NetlinkError) as raised:
        netfilter.dump(ONE)
    assert raised.value.errno == errno.EINTR


def test_a_refused_dump_says_why(talk):
    _, netfilter = talk(lambda sent: [error(sent[0], errno.ENOENT)])
    with pytest.raises(NetlinkError) as raised:
        netfilter.dump(ONE)
    assert raised.value.errno == errno.ENOENT


def test_a_kernel_that_never_answers_is_an_error_and_no_hang(talk):
    _, netfilter = talk(lambda _sent: [])
    with pytest.raises(NetlinkError) as raised:
        netfilter.request(ONE)
    assert raised.value.errno == errno.ETIMEDOUT


def test_the_family_of_a_payload_and_a_payload_without_one():
    assert family_of(netfilter_message(0, 0, 10, b"")[16:]) == 10
    with pytest.raises(DecodeError):
        family_of(b"\2")


def streamed(netfilter, message):
    return [data[start:end] for data, spans in netfilter.stream(message) for start, end in spans]


def test_a_stream_gives_its_answers_as_they_come_and_passes_over_others(talk):
    def answers(sent):
        number = sent[0].sequence
        yield reply(0x100, number, b"one!") + reply(0x100, number, b"two")
        yield reply(0x100, number + 9, b"gone")
        yield reply(0x100, number, b"last") + reply(3, number, bytes(4), 2)

    kernel, netfilter = talk(answers)
    assert streamed(netfilter, ONE) == [b"one!", b"two", b"last"]
    (sent,) = messages(kernel.sent[0])
    assert sent.flags == 0x301


def test_an_interrupted_stream_says_so_after_its_last_answer(talk):
    def answers(sent):
        yield reply(0x100, sent[0].sequence, b"one!", 0x10) + reply(3, sent[0].sequence, bytes(4))

    _, netfilter = talk(answers)
    stream = netfilter.stream(ONE)
    assert len(next(stream)[1]) == 1
    with pytest.raises(NetlinkError) as caught:
        next(stream)
    assert caught.value.errno == errno.EINTR


def test_a_refused_stream_names_the_error(talk):
    _, netfilter = talk(lambda sent: [error(sent[0], errno.EPERM, b"no")])
    with pytest.raises(NetlinkError, match="no"):
        streamed(netfilter, ONE)


@pytest.mark.parametrize("data", [b"short", reply(0x100, 1, b"x" * 8)[:-4]])
def test_a_stream_of_something_else_is_a_decode_error(talk, data):
    _, netfilter = talk(lambda _sent: [data])
    with pytest.raises(DecodeError):
        streamed(netfilter, ONE)


def test_requests_one_by_one_name_those_that_were_refused(talk):
    kernel, netfilter = talk(lambda sent: [error(sent[1], errno.ENOENT)])
    assert netfilter.perform_each([ONE, TWO, ONE]) == [Failure(1, errno.ENOENT, "", 0)]
    (joined,) = kernel.sent
    assert [each.sequence for each in messages(joined)] == [2, 3, 4]
    assert netfilter.perform_each([]) == []


def test_refusals_keep_their_places_and_what_the_kernel_sent_back(talk):
    _, netfilter = talk(lambda sent: [error(sent[1], errno.ENOENT, b"no such thing")])
    ((place, answer),) = netfilter.refusals([ONE, TWO, ONE])
    assert place == 1
    assert error_code(answer.payload) == errno.ENOENT
    assert b"no such thing" in answer.payload
    assert netfilter.refusals([]) == []


def test_a_code_that_no_kernel_gives_is_an_error_like_others():
    # One of its bytes is the sign: its opposite is no number that the C library takes.
    found = Message(ERROR, 0, 1, (-(1 << 31)).to_bytes(4, sys.byteorder, signed=True))
    with pytest.raises(NetlinkError, match="Unknown error"):
        raise_refusal(found)


def test_refusals_that_were_lost_are_no_success(talk):
    _, netfilter = talk(lambda _sent: [OSError(errno.ENOBUFS, "")])
    with pytest.raises(NetlinkError) as raised:
        netfilter.refusals([ONE])
    assert raised.value.errno == errno.ENOBUFS


def test_a_request_without_an_answer_asks_for_its_acknowledgement(talk):
    kernel, netfilter = talk(lambda sent: [error(sent[0], 0)])
    netfilter.perform(TWO)
    (sent,) = messages(kernel.sent[0])
    assert sent.flags & 4
    kernel.answer = lambda sent: [error(sent[0], errno.EINVAL)]
    with pytest.raises(NetlinkError):
        netfilter.perform(TWO)

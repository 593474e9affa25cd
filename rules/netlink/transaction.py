"""A netlink socket: dumps and requests, of netfilter or another protocol, and transactions of nftables.

A transaction is one `send` from the batch's begin to its end.  The kernel handles all of it before `send` returns,
and it applies all or nothing: every message that it refuses is answered by an error with that message's sequence
number, and the answers wait in the socket's receive buffer.  Recent kernels also acknowledge the batch's end; older
ones ignore that wish, so that no error in the queue means done.

The socket is the standard library's.  pyroute2's (0.9) is an asyncio endpoint that is opened again for every thread
and event loop that touches it; a synchronous send with its answers read from the same thread gains nothing from it,
and its import costs more time and memory than this module's users otherwise need.

A socket belongs to the network namespace in which its maker's thread was.  One call at a time.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
from collections.abc import Iterator, Sequence

from rules.netlink.attributes import (
    ACK,
    DONE,
    DUMP,
    DUMP_INTERRUPTED,
    ERROR,
    HEADER,
    REQUEST,
    U32,
    DecodeError,
    Message,
    attributes,
    be32,
    be32_of,
    message,
    messages,
)
from rules.netlink.closing import Closing
from rules.netlink.errors import (
    Failure,
    LostAnswerError,
    NetlinkError,
    StaleGenerationError,
    TransactionError,
    error_code,
    failure,
    raise_refusal,
)

AF_UNSPEC = socket.AF_UNSPEC
SUBSYSTEM_NFTABLES = 10

NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_BATCH_BEGIN = 16
_BATCH_END = 17
_BATCH_GENERATION = 1
_GET_GENERATION = SUBSYSTEM_NFTABLES << 8 | 16
_GENERATION_ID = 1

_NETFILTER_HEADER = struct.Struct(">BBH")
_TIMEVAL = struct.Struct("@ll")

_RECEIVE = 1 << 16
"""More than the kernel puts into one datagram of a dump."""
_SMALLEST_BUFFER = 1 << 20
_ERROR_COST = 2048
"""What one queued error takes from the receive buffer: the kernel counts its own bookkeeping too."""
_ANSWER_SECONDS = 30
_DUMP_TRIES = 20
_REQUEST_TRIES = 5
_PASSING = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOBUFS})
"""Errors of a reading that the next try may not meet: it changed meanwhile, or the answers did not fit."""


def netfilter_message(kind: int, flags: int, family: int, payload: bytes, subsystem: int = SUBSYSTEM_NFTABLES) -> bytes:
    """A request to a netfilter subsystem: `family` is an AF_ number, `payload` attributes."""
    return message(subsystem << 8 | kind, REQUEST | flags, _NETFILTER_HEADER.pack(family, 0, 0) + payload)


def attributes_of(payload: bytes) -> bytes:
    """The attributes of a netfilter message's payload.

    Raises:
        DecodeError: there is no netfilter header.
    """
    if len(payload) < _NETFILTER_HEADER.size:
        raise DecodeError("a netfilter message without its header")
    return payload[_NETFILTER_HEADER.size :]


def family_of(payload: bytes) -> int:
    """The AF_ number in a netfilter message's payload; raises DecodeError."""
    attributes_of(payload)
    return payload[0]


class NetfilterSocket(Closing):
    """A netlink socket to netfilter, or by another protocol's number, in the network namespace of the calling thread.

    Raises:
        OSError: the kernel has no such netlink.
    """

    def __init__(self, protocol: int = NETLINK_NETFILTER) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = itertools.count(1)
        self._send_buffer = self._receive_buffer = 0
        try:
            self._socket.bind((0, 0))
            for option in (_NETLINK_EXT_ACK, _NETLINK_CAP_ACK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            # A lost answer must not hold the agent for ever.  Not settimeout(): it would make recv wait in commit.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(_ANSWER_SECONDS, 0))
            self._grow(_SMALLEST_BUFFER, _SMALLEST_BUFFER)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    @property
    def port(self) -> int:
        """The socket's port id, by which the kernel names it as the cause of changes."""
        return int(self._socket.getsockname()[0])

    # --- reading ---------------------------------------------------------------------------------------------

    def request(self, message: bytes) -> bytes:
        """The payload of the answer to a request for one object.

        Raises:
            NetlinkError: the kernel refused (ENOENT: there is no such object).
            DecodeError: the answer is no netlink message.
        """
        for last in (*[False] * (_REQUEST_TRIES - 1), True):
            answers: list[bytes] = []
            try:
                self._converse(message, REQUEST, answers)
            except OSError as error:
                if last or error.errno not in _PASSING:
                    raise
                continue
            if answers:
                return answers[0]
            break
        raise NetlinkError(errno.EPROTO, "an answer without content")

    def dump(self, message: bytes) -> list[bytes]:
        """The payloads of all answers to a request for many objects.

        What changes while it is being read starts the dump again.

        Raises:
            NetlinkError: the kernel refused (ENOENT: no such table or set), or EINTR: it changed too often.
            DecodeError: an answer is no netlink message.
        """
        for _ in range(_DUMP_TRIES):
            answers: list[bytes] = []
            try:
                interrupted = self._converse(message, REQUEST | DUMP, answers)
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                continue
            if not interrupted:
                return answers
        raise NetlinkError(errno.EINTR, "it changed, or answers were lost, again and again while it was read")

    def stream(self, message: bytes) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
        """The answers to a request for very many objects, as they come in.

        Each item is a datagram and where in it the payloads of its answers begin and end.  Take it to its end, or
        close the socket, before the next request.

        Raises:
            NetlinkError: the kernel refused; EINTR, after the last answer: what was read changed meanwhile.
            DecodeError: an answer is no netlink message.
        """
        sequence = next(self._sequence) & 0xFFFFFFFF
        self._drain()
        self._socket.sendto(_numbered(message, REQUEST | DUMP, sequence), (0, 0))
        interrupted = False
        while True:
            data = self._receive()
            position, end = 0, len(data)
            spans = []
            done: Message | None = None
            while position < end:
                if end - position < HEADER.size:
                    raise DecodeError("a message is cut short")
                length, kind, flags, answered, _ = HEADER.unpack_from(data, position)
                if length < HEADER.size or position + length > end:
                    raise DecodeError(f"a message of {length} bytes does not fit")
                if answered == sequence:
                    interrupted = interrupted or bool(flags & DUMP_INTERRUPTED)
                    start = position + HEADER.size
                    if kind in (ERROR, DONE):
                        done = Message(kind, flags, answered, data[start : position + length])
                        break
                    spans.append((start, position + length))
                position += length + 3 & ~3
            if spans:
                yield data, spans
            if done is not None:
                raise_refusal(done)
                if interrupted:
                    raise NetlinkError(errno.EINTR, "it changed while it was read")
                return

    def perform(self, message: bytes) -> None:
        """Have one request carried out that has no answer but its acknowledgement.

        Raises:
            NetlinkError: the kernel refused.
            DecodeError: the acknowledgement is no netlink message.
        """
        self._converse(message, REQUEST | ACK, [])

    def perform_each(self, messages: Sequence[bytes]) -> list[Failure]:
        """Have requests carried out one by one, handed over in one send; those that the kernel refused.

        Refusals beyond what the receive buffer holds are not told.

        Raises:
            OSError: the requests could not be handed to the kernel.
        """
        first = self._hand_over(messages)
        return self._answers(first, len(messages))[0] if messages else []

    def refusals(self, messages: Sequence[bytes]) -> list[tuple[int, Message]]:
        """Likewise: the places of those that the kernel refused, each with its error as it came.

        Raises:
            NetlinkError: ENOBUFS: some refusals were lost.
            OSError: the requests could not be handed to the kernel.
        """
        first = self._hand_over(messages)
        errors, lost = self._refusals(first, len(messages)) if messages else ([], False)
        if lost:
            raise NetlinkError(errno.ENOBUFS, "the kernel's answers were lost")
        return errors

    def _hand_over(self, messages: Sequence[bytes]) -> int:
        """Send requests, if there are any; one less than the sequence number of the first."""
        first = next(self._sequence) & 0x3FFFFFFF
        if messages:
            self._sequence = itertools.count(first + len(messages) + 1)
            joined = _joined(messages, first + 1)
            self._drain()
            # Some subsystems send a whole request back with its error.
            self._grow(len(joined) + 4096, 2 * len(joined) + len(messages) * _ERROR_COST)
            self._socket.sendto(joined, (0, 0))
        return first

    def generation(self) -> int:
        """The number of the namespace's nftables generation: every transaction of anybody makes another.

        Raises:
            NetlinkError: the kernel refused.
            DecodeError: the answer makes no sense.
        """
        answer = self.request(netfilter_message(_GET_GENERATION & 0xFF, 0, AF_UNSPEC, b""))
        return be32_of(attributes(attributes_of(answer)), _GENERATION_ID)

    def _converse(self, message: bytes, flags: int, answers: list[bytes]) -> bool:
        """Send one request and collect its answers' payloads; whether what was read changed meanwhile."""
        sequence = next(self._sequence) & 0xFFFFFFFF
        self._drain()
        self._socket.sendto(_numbered(message, flags, sequence), (0, 0))
        interrupted = False
        while True:
            for answer in messages(self._receive()):
                if answer.sequence != sequence:
                    continue
                interrupted = interrupted or bool(answer.flags & DUMP_INTERRUPTED)
                if answer.kind in (ERROR, DONE):
                    raise_refusal(answer)
                    return interrupted
                answers.append(answer.payload)
            if answers and not flags & DUMP:
                return interrupted

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE)
        except BlockingIOError:
            raise NetlinkError(errno.ETIMEDOUT, f"no answer from the kernel for {_ANSWER_SECONDS} s") from None

    # --- writing ---------------------------------------------------------------------------------------------

    def commit(self, messages: Sequence[bytes], generation: int | None = None) -> None:
        """Apply all of `messages` in one transaction; nothing happens when there are none.

        With `generation` it is applied only if nobody changed nftables since that generation.

        Raises:
            TransactionError: nothing was applied; its `errors` name the messages that were refused.
            StaleGenerationError: nothing was applied, as the generation is another by now.
            LostAnswerError: the answers were lost; read what is there.
            OSError: the transaction could not be handed to the kernel.
        """
        if not messages:
            return
        # Sequence numbers: the first is the batch's begin, then the messages, the last is its end.
        first = next(self._sequence) & 0x3FFFFFFF
        self._sequence = itertools.count(first + len(messages) + 2)
        batch = _batch(messages, first, generation)
        self._drain()
        self._grow(len(batch) + 4096, len(messages) * _ERROR_COST)
        try:
            self._socket.sendto(batch, (0, 0))
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            self._send_buffer = 0  # ask again the next time: the limit may have been raised
            raise OSError(
                errno.EMSGSIZE,
                f"a transaction of {len(batch)} bytes is more than the socket may send: set the sysctl"
                f" net.core.wmem_max to {len(batch)} at least, or run sluice with CAP_NET_ADMIN of the host",
            ) from None
        errors, lost = self._answers(first, len(messages))
        if any(error.message < 0 and error.errno == errno.ERESTART for error in errors):
            raise StaleGenerationError(errors)
        if lost:
            raise LostAnswerError([*errors, Failure(-1, errno.ENOBUFS, "the kernel's answers were lost", 0)])
        if errors:
            raise TransactionError(errors)

    def _answers(self, first: int, count: int) -> tuple[list[Failure], bool]:
        errors, lost = self._refusals(first, count)
        return [failure(place if place < count else -1, answer) for place, answer in errors], lost

    def _refusals(self, first: int, count: int) -> tuple[list[tuple[int, Message]], bool]:
        errors: list[tuple[int, Message]] = []
        lost = False
        while True:
            try:
                data = self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return errors, lost
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            for answer in messages(data):
                place = answer.sequence - first - 1
                if answer.kind != ERROR or not -1 <= place <= count:
                    continue
                if error_code(answer.payload):
                    errors.append((place, answer))

    def _drain(self) -> None:
        """Forget answers that an interrupted call left behind."""
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise

    def _grow(self, send: int, receive: int) -> None:
        if send > self._send_buffer:
            self._set_buffer(_SO_SNDBUFFORCE, socket.SO_SNDBUF, send)
            self._send_buffer = send
        if receive > self._receive_buffer:
            self._set_buffer(_SO_RCVBUFFORCE, socket.SO_RCVBUF, receive)
            self._receive_buffer = receive

    def _set_buffer(self, forced: int, plain: int, size: int) -> None:
        size = min(size, (1 << 30) - 1)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, plain, size)


def _numbered(message: bytes, flags: int, sequence: int) -> bytes:
    numbered = bytearray(message)
    length, kind, old, _, _ = HEADER.unpack_from(numbered)
    HEADER.pack_into(numbered, 0, length, kind, old | flags, sequence, 0)
    return bytes(numbered)


def _batch(messages: Sequence[bytes], first: int, generation: int | None) -> bytes:
    resting = be32(_BATCH_GENERATION, generation) if generation is not None else b""
    begin = message(_BATCH_BEGIN, REQUEST, _NETFILTER_HEADER.pack(AF_UNSPEC, 0, SUBSYSTEM_NFTABLES) + resting)
    end = message(_BATCH_END, REQUEST | ACK, _NETFILTER_HEADER.pack(AF_UNSPEC, 0, SUBSYSTEM_NFTABLES))
    return _joined([begin, *messages, end], first)


def _joined(every: Sequence[bytes], first: int) -> bytes:
    """Messages one after the other, numbered from `first`."""
    joined = bytearray().join(every)
    position = 0
    for sequence, each in enumerate(every, first):
        U32.pack_into(joined, position + 8, sequence)
        position += len(each)
    return bytes(joined)

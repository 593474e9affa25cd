"""The programs for the kernel, run by an interpreter of the few instructions that they use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.userspace.filters import MAX_INSTRUCTIONS, NO_SYN, Instruction, Stage, assemble, by_client
from rules.forwarding import Family, Prefix

_WHOLE = 0xFFFFFFFF


def run(  # noqa: C901, PLR0912  # a case for each instruction
    program: list[Instruction], *, network: bytes = b"", transport: bytes = b"", interface: int = 0
) -> int:
    """What a classic BPF program returns for a packet."""
    accumulator = index = place = 0
    while True:
        code, value, if_true, if_false = program[place]
        place += 1
        match code:
            case 0x20 if value == 0xFFFFF008:
                accumulator = interface
            case 0x20:
                start = value - 0xFFF00000
                accumulator = int.from_bytes(network[start : start + 4])
            case 0x30:
                accumulator = transport[value]
            case 0x54:
                accumulator &= value
            case 0x24:
                accumulator = accumulator * value & _WHOLE
            case 0x74:
                accumulator >>= value
            case 0x94:
                accumulator %= value
            case 0x0C:
                accumulator = accumulator + index & _WHOLE
            case 0x07:
                index = accumulator
            case 0x15:
                assert 0 <= if_true < 256
                assert 0 <= if_false < 256
                place += if_true if accumulator == value else if_false
            case 0x05:
                place += value
            case 0x06:
                return value
            case 0x16:
                return accumulator
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


def header(family: Family, source: bytes) -> bytes:
    """An IP header, as far as the source."""
    return bytes(12 if family is Family.IPV4 else 8) + source


@st.composite
def cases(draw: st.DrawFn) -> tuple[Family, list[Stage], bytes, int]:
    """Stages, and a source that is near to one of their prefixes."""
    family = draw(st.sampled_from(Family))
    size = family.address_bytes

    def prefix() -> Prefix:
        length = draw(st.integers(0, size * 8))
        number = int.from_bytes(draw(st.binary(min_size=size, max_size=size)))
        shift = size * 8 - length
        return Prefix((number >> shift << shift).to_bytes(size), length)

    stages = [
        Stage(
            tuple(prefix() for _ in range(draw(st.integers(0, 4)))),
            tuple(draw(st.lists(st.integers(1, 5), max_size=2))),
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    known = [each.address for stage in stages for each in stage.prefixes]
    source = draw(st.sampled_from(known)) if known else bytes(size)
    flipped = int.from_bytes(source) ^ (1 << draw(st.integers(0, size * 8 - 1)))
    return family, stages, draw(st.sampled_from([source, flipped.to_bytes(size)])), draw(st.integers(1, 5))


@given(cases())
def test_a_filter_admits_exactly_what_passes_every_stage(case: tuple[Family, list[Stage], bytes, int]) -> None:
    family, stages, source, interface = case
    program = assemble(family, stages)
    assert program is not None
    passes = all(interface in stage.interfaces or any(source in each for each in stage.prefixes) for stage in stages)
    assert run(program, network=header(family, source), interface=interface) == (_WHOLE if passes else 0)


def test_hundreds_of_prefixes_fit_and_too_many_are_told() -> None:
    def stage(count: int) -> Stage:
        return Stage(tuple(Prefix(n.to_bytes(3) + b"\0", 24) for n in range(count)))

    program = assemble(Family.IPV4, [stage(900)])
    assert program is not None
    assert len(program) <= MAX_INSTRUCTIONS
    assert run(program, network=header(Family.IPV4, (899).to_bytes(3) + b"\5")) == _WHOLE
    assert run(program, network=header(Family.IPV4, (900).to_bytes(3) + b"\5")) == 0
    assert assemble(Family.IPV4, [stage(1500)]) is None


@given(st.sampled_from(Family), st.integers(1, 8), st.data())
def test_a_client_always_meets_the_same_worker(family: Family, workers: int, data: st.DataObject) -> None:
    source = data.draw(st.binary(min_size=family.address_bytes, max_size=family.address_bytes))
    program = by_client(family, workers)
    assert 0 <= run(program, network=header(family, source)) < workers


def test_clients_that_differ_in_their_last_byte_are_spread() -> None:
    for family in Family:
        program = by_client(family, 2)
        start = bytes([10, 244]) + bytes(family.address_bytes - 3)
        met = [run(program, network=header(family, start + bytes([n]))) for n in range(256)]
        assert 90 < sum(met) < 166


def test_only_what_opens_a_connection_is_kept_out_of_a_listener_that_closes() -> None:
    flags = {"syn": 0x02, "syn with ecn": 0xC2, "ack": 0x10, "syn and ack": 0x12, "data": 0x18, "reset": 0x04}
    admitted = {name for name, value in flags.items() if run(list(NO_SYN), transport=bytes(13) + bytes([value]))}
    assert admitted == {"ack", "syn and ack", "data", "reset"}

"""What `ipvsadm -Sn` prints (and `ipvsadm -Ln`), read and written.  Pure.

    -A -t 10.96.0.1:443 -s rr -p 10800
    -a -t 10.96.0.1:443 -r 192.168.50.10:6443 -m -w 1

Servers by mark are others' (IPVS-9) and passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from socket import inet_pton

from rules.foreign.gathering import parse_port
from rules.foreign.ipvs_state import MOST_FAULTS
from rules.forwarding import Family, Protocol, format_host
from rules.ipvs.messages import PERSISTENT, SCHEDULER_1, SCHEDULER_2, Held, Key, Real, Target, VirtualServer

LISTING = "IP Virtual Server version "
LINE = re.compile(
    rf"-[Aa] (?:-[tuf]|--(?:tcp|udp|sctp|fwmark)-service)[ =]|{LISTING}|Prot LocalAddress:Port"
    r"|(?:TCP|UDP|SCTP) +\S+:\d+ +[a-z]+|FWM +\d+ |  -> (?:\S+:\d+ +(?:Masq|Route|Tunnel|Local) |RemoteAddress:Port)"
)
"""How its lines begin."""

_SERVICES = {
    "-t": Protocol.TCP,
    "--tcp-service": Protocol.TCP,
    "-u": Protocol.UDP,
    "--udp-service": Protocol.UDP,
    "--sctp-service": Protocol.SCTP,
}
_BY_MARK = frozenset({"-f", "--fwmark-service"})
_NAMES = {Protocol.TCP: "-t", Protocol.UDP: "-u", Protocol.SCTP: "--sctp-service"}
_FLAGS = {
    "flag-1": SCHEDULER_1,
    "flag-2": SCHEDULER_2,
    **{
        f"{name}-{flag}": bit
        for name in ("sh", "mh")
        for flag, bit in (("fallback", SCHEDULER_1), ("port", SCHEDULER_2))
    },
}
_USUAL = re.compile(r"-a (\S+ \S+) -r (\S+) -m -w (\d{1,9})")
"""Nearly all lines: ten thousand Services have 50,000 of these."""
_HOST = re.compile(r"(?:\[([^\]\s]+)\]|([^\[\]:\s]+)):(\d{1,5})")
_LISTED_SERVER = re.compile(r"(TCP|UDP|SCTP) +(\S+:\d+) +([a-z]+)(.*)")
_LISTED_REAL = re.compile(r"  -> (\S+:\d+) +(Masq|Route|Tunnel|Local) +(\d{1,9}) +(\d{1,9}) +(\d{1,9})")
_LONG = {"--scheduler": "-s", "--persistent": "-p", "--real-server": "-r", "--weight": "-w", "--masquerading": "-m"}
_HEADINGS = (LISTING, "Prot LocalAddress:Port", "  -> RemoteAddress:Port")


def parse(lines: Iterable[str]) -> tuple[dict[Key, Held], list[str]]:
    """Virtual servers with their real ones, and what is not understood, one sentence each."""
    reader = _Reader()
    for line in lines:
        reader.read(line.rstrip())
    return {key: _held(server, reader.reals[key]) for key, server in reader.servers.items()}, reader.faults


def lines(servers: Mapping[Key, Held]) -> Iterator[str]:
    """Servers by address as `ipvsadm -Sn` prints them; those by mark are left out."""
    for key in sorted(key for key in servers if not key.mark):
        server, reals, _ = servers[key]
        where = f"{_NAMES[Protocol(key.protocol)]} {format_host(key.address)}:{key.port}"
        sticky = f" -p {server.timeout}" if server.flags & PERSISTENT else ""
        flags = [name for name, bit in (("flag-1", SCHEDULER_1), ("flag-2", SCHEDULER_2)) if server.flags & bit]
        yield f"-A {where} -s {server.scheduler}{sticky}{' -b ' + ','.join(flags) if flags else ''}"
        for target, real in sorted(reals.items()):
            method = "-m" if real.masquerading else "-g"
            yield f"-a {where} -r {format_host(target.address)}:{target.port} {method} -w {real.weight}"


def _held(server: VirtualServer, reals: Mapping[Target, Real]) -> Held:
    return Held(server, reals, any(not each.masquerading for each in reals.values()))


class _Reader:
    """Takes line after line."""

    def __init__(self) -> None:
        self.servers: dict[Key, VirtualServer] = {}
        self.reals: dict[Key, dict[Target, Real]] = {}
        self.faults: list[str] = []
        self._keys: dict[str, Key] = {}
        """Of services that were made, as they stand in the text."""
        self._hosts: dict[str, tuple[Family, bytes, int]] = {}
        self._listed: Key | None = None
        """Of a listing, the server that the lines to come belong to."""

    def read(self, line: str) -> None:
        usual = _USUAL.fullmatch(line)
        if usual is not None and (key := self._keys.get(usual[1])) is not None:
            family, address, port = self._hosts.get(usual[2]) or (None, b"", 0)
            if family is key.family:
                self.reals[key][Target(address, port)] = Real(int(usual[3]))
                return
        if not line.strip() or line.startswith(_HEADINGS):
            return
        try:
            understood = self._saved(line.split()) if line.startswith("-") else self._in_listing(line)
        except (ValueError, KeyError, IndexError, OSError):
            understood = False
        if not understood and len(self.faults) < MOST_FAULTS:
            named = re.search(r"\S:[a-z]", line) is not None
            more = ": save it by ipvsadm -Sn, with numbers for names" if named else ""
            self.faults.append(f"a line of ipvsadm is not understood{more}: {' '.join(line.split())[:120]}")

    def _saved(self, words: list[str]) -> bool:
        """A line of -S; raises ValueError, KeyError, IndexError or OSError."""
        if words[1] in _BY_MARK:
            return True
        protocol = _SERVICES[words[1]]
        family, address, port = self._host(words[2])
        key = Key(family, protocol, address, port)
        options = _options(words[3:])
        if words[0] == "-A":
            self._add(key, options["-s"], options.get("-p"), options.get("-b", ""))
            self._keys[f"{words[1]} {words[2]}"] = key
            return options.keys() <= {"-s", "-p", "-b", "-M", "-o", "--ops", "pe", "--pe"}
        weight = int(options.get("-w", "1"))
        target = self._host(options["-r"])
        if target[0] is not family or key not in self.reals:
            return False
        self._add_real(key, Target(*target[1:]), weight, masquerading="-m" in options)
        return True

    def _in_listing(self, line: str) -> bool:
        """A line of -L; raises ValueError, KeyError or OSError."""
        if line.startswith("FWM "):
            self._listed = None
            return True
        if (real := _LISTED_REAL.match(line)) is not None:
            if self._listed is not None:
                family, address, port = self._host(real[1])
                if family is not self._listed.family:
                    return False
                self._add_real(self._listed, Target(address, port), int(real[3]), masquerading=real[2] == "Masq")
            return True
        server = _LISTED_SERVER.fullmatch(line)
        if server is None:
            return False
        family, address, port = self._host(server[2])
        key = Key(family, Protocol[server[1]], address, port)
        options = server[4].replace("(", " ").replace(")", " ").split()
        sticky = options[options.index("persistent") + 1] if "persistent" in options else None
        self._add(key, server[3], sticky, ",".join(each for each in options if set(each.split(",")) <= _FLAGS.keys()))
        self._listed = key
        return True

    def _host(self, text: str) -> tuple[Family, bytes, int]:
        """An address and a port; raises ValueError or OSError."""
        found = self._hosts.get(text)
        if found is None:
            hit = _HOST.fullmatch(text)
            if hit is None:
                raise ValueError(text)
            family = Family.IPV4 if hit[1] is None else Family.IPV6
            found = self._hosts[text] = family, inet_pton(family.af, hit[1] or hit[2]), parse_port(hit[3])
        return found

    def _add(self, key: Key, scheduler: str, sticky: str | None, flags: str) -> None:
        bits = PERSISTENT if sticky is not None else 0
        for name in filter(None, flags.split(",")):
            bits |= _FLAGS[name]
        timeout = int(sticky) if sticky else 0
        if not 0 <= timeout < 1 << 32:
            raise ValueError(sticky)
        self.servers.setdefault(key, VirtualServer(key, scheduler, timeout, bits))
        self.reals.setdefault(key, {})

    def _add_real(self, key: Key, target: Target, weight: int, *, masquerading: bool) -> None:
        if not 0 <= weight < 1 << 31:
            raise ValueError(weight)
        self.reals[key][target] = Real(weight, masquerading=masquerading)


def _options(words: list[str]) -> dict[str, str]:
    """Options with their values; long names as short ones."""
    options: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("-") or word == "pe":
            name = _LONG.get(word, word)
            options[name] = ""
        elif name:
            options[name] = word
            name = ""
        else:
            raise ValueError(word)
    return options

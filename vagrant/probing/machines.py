"""The lab's machines, seen from this host: commands over ssh, and the hosts that each machine stands for.

Each machine runs `hosts.py` of `sluice demo` and `wire.py` in its own network namespaces; requests and answers cross
ssh as lines of JSON.  `LabProbes` puts the three together, so that it looks like the one process of a local world.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from proxy.demo import plan
from proxy.demo.probes import Outcome, Probe, Probes, Server
from tests.netns.scapy_probes import outcome_of, read_arrival, read_error, sctp_init

LAB = Path(__file__).parent.parent
MACHINES = ("node1", "node2", "client")

T = TypeVar("T")


class LabError(Exception):
    """The lab is not as it should be; the message is one line, and says what to do where there is something."""


def machine_of(host: str) -> str:
    """The machine that a host of `proxy.demo.plan` lives on."""
    own = plan.HOSTS[host]
    return own.node or (host if host in MACHINES else "client")


def namespaces(machine: str) -> dict[str, Path]:
    """The network namespaces of a machine's hosts, there: the first is the machine's own."""
    own = "c" if machine == "client" else machine
    others = [name for name in plan.HOSTS if machine_of(name) == machine and name != own]
    return {own: Path("/proc/1/ns/net")} | {name: Path("/run/netns", name) for name in others}


class Machine:
    """One machine, over ssh; commands run as root."""

    def __init__(self, name: str, config: Path) -> None:
        self.name = name
        self._config = config

    def command(self, *words: str) -> list[str]:
        """The command line that runs another one there, whose words are for its shell."""
        return ["ssh", "-F", str(self._config), "-T", self.name, "sudo", "-n", *words]

    def run(self, *words: str, data: bytes | None = None, timeout: float = 300.0) -> str:
        """What a command prints.

        Raises:
            LabError: it fails, or takes longer than the time.
        """
        said = " ".join(words)
        try:
            done = subprocess.run(self.command(*words), input=data, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: {said}: no end within {timeout:.0f} s") from None
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise LabError(f"{self.name}: {said}: {reason[-1] if reason else f'ended with {done.returncode}'}")
        return done.stdout.decode()

    def write(self, path: str, data: bytes) -> None:
        """Replace a file there, as a whole."""
        new = str(Path(path).with_name(f".{Path(path).name}.new"))
        self.run("sh", "-c", f"'cat > {new} && mv {new} {path}'", data=data)

    def disconnect(self) -> None:
        """Let go of the connection that commands share: the machine behind it goes away."""
        command = ["ssh", "-F", str(self._config), "-O", "exit", self.name]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def find(names: Sequence[str] = MACHINES) -> dict[str, Machine]:
    """The machines, which must run.

    Raises:
        LabError: Vagrant does not know them, or they do not answer.
    """
    try:
        done = subprocess.run(["vagrant", "ssh-config", *names], cwd=LAB, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabError("there is no vagrant: vagrant/host-setup installs it") from None
    if done.returncode != 0:
        raise LabError(f"the machines do not run: `vagrant up` in {LAB} first")
    config = LAB / ".lab" / "ssh-config"
    shared = f"  ControlMaster auto\n  ControlPath {LAB}/.lab/ssh-%n\n  ControlPersist 600\n"
    alive = "  ConnectTimeout 60\n  ServerAliveInterval 15\n  ServerAliveCountMax 8\n"
    text = "".join(f"{block}{shared}{alive}" for block in _blocks(done.stdout))
    config.write_text(text)
    found = {name: Machine(name, config) for name in names}
    for machine in found.values():
        machine.disconnect()  # from one that may be gone, and another in its place
        machine.run("true")
    return found


def _blocks(text: str) -> Iterator[str]:
    """The part of each machine in what `vagrant ssh-config` prints."""
    for block in text.split("Host ")[1:]:
        yield "Host " + block.strip() + "\n"


class Wire:
    """Raw packets of one machine's hosts: the other end of `guest/wire.py`."""

    def __init__(self, machine: Machine) -> None:
        words = [f"{name}={path}" for name, path in namespaces(machine.name).items()]
        self._process = subprocess.Popen(
            machine.command("python3", "-I", "-S", "/opt/lab/wire.py", *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def ask(self, **request: object) -> Any:
        """The answer to a request."""
        pipes = self._process.stdin, self._process.stdout
        if pipes[0] is None or pipes[1] is None:
            raise LabError("wire.py has no pipes")
        pipes[0].write(json.dumps(request).encode() + b"\n")
        pipes[0].flush()
        line = pipes[1].readline()
        if not line:
            raise LabError("wire.py has ended")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait(timeout=60)


class LabProbes:
    """Servers and clients in all hosts of the lab, as `proxy.demo.probes.Probes` has them on one machine."""

    def __init__(self, machines: Mapping[str, Machine]) -> None:
        self._machines = machines
        self._pool = ThreadPoolExecutor(max_workers=2 * len(machines), thread_name_prefix="lab")
        self._probes: dict[str, Probes] = {}
        self._wires: dict[str, Wire] = {}
        self._streams: dict[str, str] = {}
        self.made: dict[str, int] = {}
        """How many connections were made so far, by the kind of host that made them; of SCTP's, `scapy`."""

    def __enter__(self) -> Self:
        try:
            self._each(self._machines, self.connect)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, name: str) -> None:
        """Start a machine's hosts; again, once it has booted anew."""
        machine = self._machines[name]
        program = machine.command("python3", "-I", "-S", "/opt/lab/hosts.py")
        self._probes[name] = Probes(namespaces(name), program)
        self._wires[name] = Wire(machine)

    def disconnect(self, name: str) -> None:
        """End a machine's hosts, or what is left of them here."""
        for each in (self._probes.pop(name, None), self._wires.pop(name, None)):
            if each is not None:
                each.close()

    def close(self) -> None:
        for name in list(self._probes):
            self.disconnect(name)
        self._pool.shutdown()

    def open(self, servers: Iterable[Server]) -> None:
        """Listen, in every host that lives somewhere."""
        wanted = list(servers)
        self._each(
            self._probes, lambda name: self._probes[name].open([s for s in wanted if machine_of(s.host) == name])
        )

    def shut(self, servers: Iterable[Server] | None = None) -> None:
        """Listen no longer there; without argument, anywhere."""
        chosen = None if servers is None else list(servers)

        def shut(name: str) -> None:
            here = None if chosen is None else [each for each in chosen if machine_of(each.host) == name]
            self._probes[name].shut(here)

        self._each(self._probes, shut)

    def probe(self, *probes: Probe) -> list[list[Outcome]]:
        """Make all connections of all probes at the same time; per probe, what came of each."""
        for probe in probes:
            self._count(_kind(probe.host), probe.count)
        chosen = {name: [n for n, each in enumerate(probes) if machine_of(each.host) == name] for name in self._probes}
        results: list[list[Outcome]] = [[] for _ in probes]

        def ask(name: str) -> None:
            if numbers := chosen[name]:
                found = self._probes[name].probe(*(probes[number] for number in numbers))
                for number, outcomes in zip(numbers, found, strict=True):
                    results[number] = outcomes

        self._each(self._probes, ask)
        return results

    def start(self, name: str, probe: Probe, interval: float) -> None:
        """Make a connection every `interval` seconds, until `stop`."""
        self._streams[name] = machine_of(probe.host)
        self._probes[self._streams[name]].start(name, probe, interval)

    def stop(self, name: str) -> list[Outcome]:
        """Stop, and return all outcomes."""
        outcomes = self._probes[self._streams.pop(name)].stop(name)
        self._count("stream", len(outcomes))
        return outcomes

    def sctp(self, probes: Sequence[Probe]) -> list[list[Outcome]]:
        """Send SCTP INITs, made by scapy, from all probes' hosts, and see where each arrives.

        "Answered" means that the INIT arrived at a host, under the address and port that it then had.
        """
        began = time.monotonic()
        results: list[list[Outcome]] = [[] for _ in probes]
        attempts: dict[int, tuple[str, int]] = {}
        owner: dict[int, int] = {}
        self._each(self._wires, lambda name: self._wires[name].ask(do="watch"))
        for number, probe in enumerate(probes):
            self._count("scapy", probe.count)
            own = plan.HOSTS[probe.host].ipv6 if ":" in probe.address else plan.HOSTS[probe.host].ipv4
            source = probe.source or own[0]
            packets = []
            for _ in range(probe.count):
                tag = random.getrandbits(32) | 1  # zero is no tag
                # A port of its own: an ICMP message quotes the ports and no tag.
                port = probe.source_port or 20000 + len(attempts) * 7 % 40000
                attempts[tag], owner[tag] = (source, port), number
                packets.append(base64.b64encode(sctp_init(tag, port, probe.port)).decode())
            self._wires[machine_of(probe.host)].ask(
                do="send", host=probe.host, source=source, address=probe.address, packets=packets
            )
        deadline = time.monotonic() + max((each.timeout for each in probes), default=0)
        while attempts and time.monotonic() < deadline:
            came = self._each(self._wires, lambda name: self._wires[name].ask(do="collect", seconds=1.0))
            for host, kind, peer, packet in (each for some in came for each in some):
                for number in [n for n, probe in enumerate(probes) if _concerns(kind, host, probe)]:
                    mine = {tag: own for tag, own in attempts.items() if owner[tag] == number}
                    data, v6 = base64.b64decode(packet), ":" in peer
                    left = dict(mine)
                    fields = (
                        read_error(data, peer, v6, left) if kind == "icmp" else read_arrival(host, data, peer, v6, left)
                    )
                    if fields:
                        results[number].append(outcome_of(fields, began))
                        for tag in mine.keys() - left.keys():
                            del attempts[tag]
        for tag in attempts:
            number = owner[tag]
            results[number].append(Outcome(kind="silent", began=began, seconds=probes[number].timeout))
        return results

    def _count(self, kind: str, count: int) -> None:
        self.made[kind] = self.made.get(kind, 0) + count

    def _each(self, names: Iterable[str], work: Callable[[str], T]) -> list[T]:
        """Do something for several machines at once."""
        return list(self._pool.map(work, list(names)))


def _kind(host: str) -> str:
    own = plan.HOSTS[host]
    return "pod" if own.node else "node" if host in ("node1", "node2") else "client"


def _concerns(kind: str, host: str, probe: Probe) -> bool:
    """Whether a packet may be about a probe: an error comes to its sender, an INIT to others or to a pod itself."""
    return host == probe.host if kind == "icmp" else host != probe.host or bool(plan.HOSTS[host].node)

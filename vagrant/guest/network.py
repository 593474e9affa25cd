"""A machine's place in the lab: `plan.py`, which says who lives where, spread over three machines.

    machine  hosts                      how
    node1    node1, pods p1 .. p4       the machine itself, and a namespace for each pod
    node2    node2, pods q1 .. q4
    client   c, x, upstream             the machine itself, and two namespaces, on a bridge with the private network

It is `proxy.demo.world` on real machines: the same routes, so that each connection passes node1 in both directions, and
the same neighbours.  Run on every boot, and again at will: what an earlier run made is removed first.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import plan

LAB_HARDWARE_PREFIX = "52:5c:00:00:32:"
BRIDGE = "br-lab"
SEGMENT = "eth1"
"""What the machine's interface on the private network is called, on whichever name it came up."""
HERE = ""
"""The machine's own namespace."""
PLACES = {
    "node1": (plan.NODE1, plan.PODS1),
    "node2": (plan.NODE2, plan.PODS2),
    "client": (plan.CLIENT, (plan.FAR_CLIENT, plan.UPSTREAM)),
}
EVERYWHERE = ("0.0.0.0/0", "::/0")
GATEWAYS = ("169.254.1.1", "fe80::1")
Host = plan.Host


def namespaces(machine: str) -> dict[str, str]:
    """The network namespaces of a machine's hosts, by path."""
    own, others = PLACES[machine]
    return {own.name: "/proc/1/ns/net"} | {each.name: f"/run/netns/{each.name}" for each in others}


def addresses(host: Host, interface: str, lengths: tuple[int, int]) -> Iterator[str]:
    """The first address of each family gets its prefix length; others stand alone and are never preferred."""
    for position, address in enumerate(host.ipv4):
        yield f"addr add {address}/{32 if position else lengths[0]} dev {interface}"
    for position, address in enumerate(host.ipv6):
        later = "preferred_lft 0" if position else ""
        yield f"addr add {address}/{128 if position else lengths[1]} dev {interface} nodad {later}"


def routes(
    destinations: tuple[str, ...], interface: str, via: Host | None = None, source: Host | None = None
) -> Iterator[str]:
    for destination in destinations:
        v6 = ":" in destination
        words = f"route replace {destination}"
        if via is not None:
            words += f" via {via.ipv6[0] if v6 else via.ipv4[0]}"
        words += f" dev {interface}"
        if source is not None:
            words += f" src {source.ipv6[0] if v6 else source.ipv4[0]}"
        yield words


def hardware(owner: Host, far: Host) -> str:
    """The hardware address of one end of the link to `far`."""
    return f"02:5c:00:00:{int(owner is far):02x}:{list(plan.HOSTS).index(far.name):02x}"


def veth(near: Host, far: Host) -> Iterator[str]:
    peer = f"peer name eth0 address {hardware(far, far)} netns {far.name}"
    yield f"link add {far.interface} address {hardware(near, far)} type veth {peer}"
    yield f"link set {far.interface} up"


def pod_here(node: Host, pod: Host) -> Iterator[str]:
    """The node's side of a pod."""
    yield from veth(node, pod)
    # Without an address here, masquerading towards the pod takes one of the machine's first interface, Vagrant's.
    yield f"addr add {node.ipv4[0]}/32 dev {pod.interface} noprefixroute"
    yield from routes(pod.addresses, pod.interface, source=node)
    for address in pod.addresses:
        yield f"neigh replace {address} lladdr {hardware(pod, pod)} dev {pod.interface} nud permanent"


def pod_there(node: Host, pod: Host) -> Iterator[str]:
    """The pod's side: a lone address, and a gateway that has a hardware address and no address of its own."""
    yield "link set eth0 up"
    yield from addresses(pod, "eth0", (32, 128))
    for gateway, everywhere in zip(GATEWAYS, EVERYWHERE, strict=True):
        yield f"route replace {gateway} dev eth0"
        yield f"neigh replace {gateway} lladdr {hardware(node, pod)} dev eth0 nud permanent"
        yield f"route replace {everywhere} via {gateway} dev eth0"


def steps(machine: str) -> Iterator[tuple[str, list[str]]]:
    """What `ip` is told, and in which namespace, once they exist and have their settings."""
    own, others = PLACES[machine]
    yield HERE, [f"link set {SEGMENT} up"]
    if machine == "client":
        yield (
            HERE,
            [
                f"link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                f"link set {SEGMENT} master {BRIDGE}",
                f"link set {BRIDGE} up",
                *(command for far in others for command in veth(own, far)),
                *(f"link set {far.interface} master {BRIDGE}" for far in others),
                *addresses(own, BRIDGE, (24, 64)),
                *routes(EVERYWHERE, BRIDGE, via=plan.NODE1),
            ],
        )
        yield (
            "x",
            [
                "link set eth0 up",
                *addresses(plan.FAR_CLIENT, "eth0", (32, 128)),
                *routes((plan.NODE1.ipv4[0], plan.NODE1.ipv6[0]), "eth0"),
                *routes(EVERYWHERE, "eth0", via=plan.NODE1),
            ],
        )
        yield (
            "upstream",
            [
                "link set eth0 up",
                *addresses(plan.UPSTREAM, "eth0", (24, 64)),
                *routes(plan.POD_CIDRS["node1"], "eth0", via=plan.NODE1),
                # Node2 sends by way of node1, and gets its answers that way too.
                *routes(plan.POD_CIDRS["node2"] + plan.NODE2.addresses, "eth0", via=plan.NODE1),
                *routes(plan.CLIENT.addresses + plan.FAR_CLIENT.addresses, "eth0", via=plan.NODE1),
                *routes(plan.NODE1.ipv4[1:] + plan.NODE1.ipv6[1:], "eth0", via=plan.NODE1),
                # Every other address is its own: in the table that is asked last, so that others are reached.
                *(f"route add local {each} dev lo table main" for each in EVERYWHERE),
            ],
        )
        return
    yield HERE, list(addresses(own, SEGMENT, (24, 64)))
    if own is plan.NODE1:
        yield (
            HERE,
            [
                *routes(plan.FAR_CLIENT.addresses, SEGMENT),
                *routes(plan.POD_CIDRS["node2"], SEGMENT, via=plan.NODE2),
                *routes(EVERYWHERE, SEGMENT, via=plan.UPSTREAM),
            ],
        )
    else:
        yield HERE, list(routes(plan.POD_CIDRS["node1"] + plan.CLIENT.addresses + EVERYWHERE, SEGMENT, via=plan.NODE1))
    for pod in others:
        yield HERE, list(pod_here(own, pod))
        yield pod.name, list(pod_there(own, pod))


def settings(*, forward: bool) -> dict[str, int]:
    """Refusals are counted by probes, so that none may be held back; and routes are ours alone."""
    found = {
        "net.ipv4.ip_forward": int(forward),
        "net.ipv4.icmp_ratelimit": 0,
        "net.ipv4.icmp_msgs_per_sec": 1_000_000,
        "net.ipv4.icmp_msgs_burst": 1_000_000,
        "net.ipv6.icmp.ratelimit": 0,
    }
    for scope in ("all", "default"):
        found |= {
            f"net.ipv4.conf.{scope}.rp_filter": 0,
            f"net.ipv4.conf.{scope}.send_redirects": 0,
            f"net.ipv4.conf.{scope}.accept_redirects": 0,
            f"net.ipv6.conf.{scope}.disable_ipv6": 0,
            f"net.ipv6.conf.{scope}.accept_dad": 0,
            f"net.ipv6.conf.{scope}.dad_transmits": 0,
            f"net.ipv6.conf.{scope}.accept_ra": 0,
            f"net.ipv6.conf.{scope}.accept_redirects": 0,
            f"net.ipv6.conf.{scope}.forwarding": int(forward),
        }
    return found


def run(*command: str, script: str | None = None) -> None:
    subprocess.run(command, input=script, text=True, check=True)


def inside(namespace: str) -> list[str]:
    return ["ip", "netns", "exec", namespace] if namespace else []


def ip(namespace: str, commands: list[str]) -> None:
    run("ip", *(["-n", namespace] if namespace else []), "-batch", "-", script="\n".join(commands) + "\n")


def segment() -> str:
    """The interface on the private network, by the hardware address that the Vagrantfile gives it."""
    for path in Path("/sys/class/net").iterdir():
        if path.joinpath("address").read_text().startswith(LAB_HARDWARE_PREFIX) and path.name != BRIDGE:
            return path.name
    sys.exit(
        f"no interface has a hardware address that begins with {LAB_HARDWARE_PREFIX}: is this a machine of the lab?"
    )


def main() -> None:
    machine = Path(__file__).with_name("machine").read_text().strip()
    own, others = PLACES[machine]
    # What an earlier run made goes; the kernel takes a veth pair away with the namespace of either end.
    for host in others:
        subprocess.run(["ip", "netns", "delete", host.name], stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["ip", "link", "delete", BRIDGE], stderr=subprocess.DEVNULL, check=False)
    if (found := segment()) != SEGMENT:
        ip(HERE, [f"link set {found} down", f"link set {found} name {SEGMENT}"])
    ip(HERE, [f"addr flush dev {SEGMENT}", f"link set {SEGMENT} down"])

    forward = {own.name: machine != "client"}
    for name in ("", *(host.name for host in others)):
        if name:
            run("ip", "netns", "add", name)
        # Interfaces that were there before the defaults have settings of their own.
        wanted = settings(forward=forward.get(name or own.name, False))
        if not name:
            wanted |= {f"net.ipv4.conf.{SEGMENT}.rp_filter": 0, "net.ipv4.conf.eth0.rp_filter": 0}
        words = [f"{key}={value}" for key, value in wanted.items()]
        with contextlib.suppress(subprocess.CalledProcessError):  # not every kernel has each of them in a namespace
            run(*inside(name), "sysctl", "-q", "-e", "-w", *words)
        ip(name, ["link set lo up"])
    for namespace, commands in steps(machine):
        ip(namespace, commands)


if __name__ == "__main__":
    main()

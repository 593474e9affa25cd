"""What kube-proxy's ipvs mode keeps outside of iptables, read from this node's kernel.

By netlink, as the programs ipvsadm and ipset are seldom there; asked only where rules or sets of kube-proxy say that
the mode is used, as the first request to IPVS has the kernel load its module.
"""

from __future__ import annotations

from pathlib import Path

from rules.dataplane import DataplaneError, UnavailableError
from rules.foreign import detect
from rules.foreign.ipvs_state import KeptSet, State
from rules.foreign.saved import PREFIX
from rules.forwarding import Family
from rules.ipvs import KUBE_PROXYS_DEVICE
from rules.netlink.attributes import DecodeError

_MODULE = Path("/sys/module/ip_set")
"""There once a kernel has loaded it, and where it is built in."""


def state() -> State:
    """Virtual servers, kube-proxy's sets, and addresses, in the network namespace of the calling thread.

    Raises:
        DataplaneError: something could not be read.
    """
    from proxy.interfaces import read_addresses  # noqa: PLC0415  # netlink, which saved files do without
    from rules.ipvs.device import Device  # noqa: PLC0415  # likewise
    from rules.ipvs.services import Ipvs  # noqa: PLC0415  # likewise

    sets = _sets()
    try:
        with Ipvs() as ipvs:
            servers = {key: held for family in Family for key, held in ipvs.dump(family).items()}
    except UnavailableError as error:
        raise UnavailableError(
            f"kube-proxy runs in ipvs mode, and its virtual servers cannot be read: {error}"
        ) from None
    try:
        addresses = dict(read_addresses())
    except (OSError, DecodeError) as error:
        raise DataplaneError(f"the interfaces' addresses could not be read: {error}") from None
    with Device(KUBE_PROXYS_DEVICE) as device:
        addresses[KUBE_PROXYS_DEVICE] = tuple(sorted(each for family in Family for each in device.addresses(family)))
    return State(servers, sets, addresses)


def text() -> str:
    """The same as ipset, ipvsadm and ip would print it; empty: kube-proxy has no sets here.

    Raises:
        DataplaneError: something could not be read.
    """
    return detect.of_state(state()).decode() if has_sets() else ""


def has_sets() -> bool:
    """Whether kube-proxy has ipsets here; False where nobody can say.  Nothing is loaded to find out."""
    if not _MODULE.exists():
        return False
    from rules.netlink.ipset import Ipsets  # noqa: PLC0415  # likewise

    try:
        with Ipsets() as ipsets:
            return any(name.startswith(PREFIX) for name in ipsets.names())
    except DataplaneError:
        return False


def _sets() -> dict[str, KeptSet]:
    from rules.netlink.ipset import Ipsets  # noqa: PLC0415  # likewise

    found = {}
    with Ipsets() as ipsets:
        for name in sorted(ipsets.names()):
            if name.startswith(PREFIX) and (each := ipsets.any_set(name)) is not None:
                spec, elements = each
                found[name] = KeptSet(spec.type, spec.family, elements)
    return found

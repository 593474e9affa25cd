"""What a configuration may say (CFG-20): checks of completed values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from proxy.addresses import lenient_address, lenient_prefix
from proxy.config.gates import GATES, enabled
from proxy.config.schema import DETECT_LOCAL_MODES, MODES, PREVIOUS_MINOR
from proxy.config.settings import PRIMARY, HostPort
from proxy.config.values import format_duration, quoted
from rules.forwarding import format_address

_WORDS = {"driftPolicy": ("repair", "report"), "iptablesBackend": ("legacy", "nft", "")}
MOST_WORKERS = 1024
_SCHEDULER = re.compile(r"[a-z0-9_]{0,15}")
"""How the kernel's IPVS calls its schedulers; which of them it has shows when one is asked for (IPVS-1)."""
MOST_SERIES = 100_000


class Problem(NamedTuple):
    """Why a field's value cannot be used."""

    path: str
    message: str


Values = Mapping[str, Any]


def check(values: Values, *, section: str) -> Iterator[Problem]:
    """Everything that is wrong with completed values; `section` is that of the periods that hold (CFG-13)."""
    for each in (_check_modes, _check_own, _check_numbers, _check_logging, _check_addresses, _check_detector):
        yield from each(values)
    yield from _check_locked_gates(values)
    sync_path, min_sync_path = f"{section}.syncPeriod", f"{section}.minSyncPeriod"
    sync, least = values[sync_path], values[min_sync_path]
    if least < 0:
        yield Problem(min_sync_path, f"{format_duration(least)}: must be greater than or equal to 0")
    if sync <= 0:
        yield Problem(sync_path, f"{format_duration(sync)}: must be greater than 0")
    elif sync < least:
        message = f"must be greater than or equal to {min_sync_path}, which is {format_duration(least)}"
        yield Problem(sync_path, f"{format_duration(sync)}: {message}")
    if values["configSyncPeriod"] <= 0:
        yield Problem("configSyncPeriod", f"{format_duration(values['configSyncPeriod'])}: must be greater than 0")


def _check_modes(values: Values) -> Iterator[Problem]:
    if values["mode"] not in {"", *MODES}:
        yield Problem(
            "mode",
            f"{quoted(values['mode'])}: must be iptables, ipvs, nftables, userspace or blank "
            "(blank means what the node can run, with the defaults of iptables)",
        )
    if values["hostnameOverride"] and not values["hostnameOverride"].strip():
        yield Problem("hostnameOverride", "empty hostname-override is invalid")
    if values["showHiddenMetricsForVersion"] not in {"", PREVIOUS_MINOR}:
        shown = quoted(values["showHiddenMetricsForVersion"])
        yield Problem("showHiddenMetricsForVersion", f"{shown}: must be {PREVIOUS_MINOR}, the previous minor, or blank")


def _check_own(values: Values) -> Iterator[Problem]:
    for path, words in _WORDS.items():
        if values[path] not in words:
            yield Problem(path, f"{quoted(values[path])}: must be {' or '.join(each or 'blank' for each in words)}")
    if not values["runDirectory"].startswith("/"):
        yield Problem("runDirectory", f"{quoted(values['runDirectory'])}: must be an absolute path")
    if not 1 <= values["trafficCounterSeries"] <= MOST_SERIES:
        shown = values["trafficCounterSeries"]
        yield Problem("trafficCounterSeries", f"{shown}: must be within the range [1, {MOST_SERIES}]")
    if not 0 <= values["userspace.workers"] <= MOST_WORKERS:
        yield Problem(
            "userspace.workers", f"{values['userspace.workers']}: must be within the range [0, {MOST_WORKERS}]"
        )
    for path in ("drain", "connectTimeout", "tcpIdleTimeout", "udpIdleTimeout", "udpStreamTimeout"):
        if values[f"userspace.{path}"] < 0:
            shown = format_duration(values[f"userspace.{path}"])
            yield Problem(f"userspace.{path}", f"{shown}: must be greater than or equal to 0")
    if values["userspace.maxUDPFlows"] < 1:
        yield Problem("userspace.maxUDPFlows", f"{values['userspace.maxUDPFlows']}: must be greater than 0")


def _check_numbers(values: Values) -> Iterator[Problem]:
    sections = ("iptables", "nftables") if values["mode"] == "nftables" else ("iptables",)
    for path in (f"{section}.masqueradeBit" for section in sections):
        if not 0 <= values[path] <= 31:
            yield Problem(path, f"{values[path]}: must be within the range [0, 31]")
    if not -1000 <= values["oomScoreAdj"] <= 1000:
        yield Problem("oomScoreAdj", f"{values['oomScoreAdj']}: must be within the range [-1000, 1000]")
    for path in ("clientConnection.burst", "logging.verbosity", "conntrack.maxPerCore", "conntrack.min"):
        if values[path] < 0:
            yield Problem(path, f"{values[path]}: must be greater than or equal to 0")
    timeouts = [path for path in values if path.startswith("conntrack.") and path.endswith("Timeout")]
    if values["mode"] == "ipvs":
        timeouts += [path for path in values if path.startswith("ipvs.") and path.endswith("Timeout")]
    for path in timeouts:
        if values[path] < 0:
            yield Problem(path, f"{format_duration(values[path])}: must be greater than or equal to 0")


def _check_logging(values: Values) -> Iterator[Problem]:
    """What kube-proxy's logging library checks."""
    gates, log_format = values["featureGates"], values["logging.format"]
    if log_format not in {"text", "json"}:
        yield Problem("logging.format", f"{quoted(log_format)}: must be text or json")
    if log_format == "json" and not enabled(gates, "LoggingBetaOptions"):
        yield Problem("logging.format", "json needs the feature gate LoggingBetaOptions")
    if values["logging.vmodule"] and log_format == "json":
        yield Problem("logging.vmodule", "only supported for text log format")
    for index, (pattern, verbosity) in enumerate(values["logging.vmodule"]):
        if not pattern or set(pattern) & set("=,"):
            message = f"{quoted(pattern)}: a file pattern must not be empty, nor contain an equal sign or comma"
            yield Problem(f"logging.vmodule[{index}]", message)
        if verbosity < 0:
            yield Problem(f"logging.vmodule[{index}]", f"{verbosity}: must be greater than or equal to 0")
    if not enabled(gates, "LoggingAlphaOptions"):
        for path, value in values.items():
            if path.startswith("logging.options.") and value not in {False, "0"}:
                yield Problem(path, "needs the feature gate LoggingAlphaOptions")


def _check_addresses(values: Values) -> Iterator[Problem]:
    bind = values["bindAddress"]
    try:
        lenient_address(bind)
    except ValueError:
        yield Problem("bindAddress", f"{quoted(bind)}: not a valid textual representation of an IP address")
    for path in ("healthzBindAddress", "metricsBindAddress"):
        if values[path]:
            try:
                parse_host_port(values[path])
            except ValueError as error:
                yield Problem(path, f"{quoted(values[path])}: {error}")
    ports = values["nodePortAddresses"]
    if PRIMARY in ports:
        if len(ports) > 1:
            yield Problem("nodePortAddresses", f"can't use both '{PRIMARY}' and CIDRs")
    else:
        yield from _check_cidrs("nodePortAddresses", ports)
    yield from _check_cidrs("serviceCIDRs", values["serviceCIDRs"])
    if values["mode"] == "ipvs":
        yield from _check_cidrs("ipvs.excludeCIDRs", values["ipvs.excludeCIDRs"])
        if not _SCHEDULER.fullmatch(values["ipvs.scheduler"]):
            yield Problem(
                "ipvs.scheduler", f"{quoted(values['ipvs.scheduler'])}: must be a kernel's scheduler, such as rr"
            )


def _check_cidrs(path: str, texts: Sequence[str]) -> Iterator[Problem]:
    for index, text in enumerate(texts):
        try:
            lenient_prefix(text)
        except ValueError:
            yield Problem(f"{path}[{index}]", f"{quoted(text)}: must be a valid CIDR")


def _check_detector(values: Values) -> Iterator[Problem]:
    mode = values["detectLocalMode"]
    if mode not in DETECT_LOCAL_MODES:
        supported = ", ".join(DETECT_LOCAL_MODES)
        yield Problem("detectLocalMode", f"{quoted(mode)} is not supported; supported values: {supported}")
    needed = {"BridgeInterface": "bridgeInterface", "InterfaceNamePrefix": "interfaceNamePrefix"}.get(mode)
    if needed and not values[f"detectLocal.{needed}"]:
        yield Problem(f"detectLocal.{needed}", f"must not be empty with detectLocalMode {mode}")
    if mode == "ClusterCIDR" and values["clusterCIDR"]:
        texts = values["clusterCIDR"].split(",")
        problems = list(_check_cidrs("clusterCIDR", texts))
        yield from problems
        if not problems:
            families = {len(lenient_prefix(text).address) for text in texts}
            if len(texts) != len(families):
                message = "must be one CIDR, or one IPv4 and one IPv6 CIDR separated by a comma"
                yield Problem("clusterCIDR", f"{quoted(values['clusterCIDR'])}: {message}")


def _check_locked_gates(values: Values) -> Iterator[Problem]:
    for name, value in values["featureGates"].items():
        gate = GATES.get(name)
        if gate is not None and gate.locked and value != gate.default:
            yield Problem(f"featureGates.{name}", f"cannot be {value}: the feature is locked to {gate.default}".lower())


def parse_host_port(text: str) -> HostPort:
    """Where to listen, from `IP:port`.

    Raises:
        ValueError: the text is none; the message says which part.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon:
        raise ValueError("must be IP:port")
    try:
        address = lenient_address(host)
    except ValueError:
        raise ValueError("must be a valid IP") from None
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError("must be a valid port")
    return HostPort(format_address(address), int(port))


def with_port(text: str, port: int) -> str:
    """An address completed by a port if it is one without (CFG-4); anything else as it is."""
    try:
        lenient_address(text)
    except ValueError:
        return text
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"

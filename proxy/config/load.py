"""From flags and a file to the effective `Settings`: merged, checked (CFG-20), and in the types that the agent uses."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from proxy.addresses import lenient_address, lenient_prefix
from proxy.config.errors import ConfigError
from proxy.config.gates import GATES, IDLE, PLANNED, Use, enabled
from proxy.config.merge import Merged, merge
from proxy.config.printed import v1alpha1
from proxy.config.schema import BY_PATH, SECOND
from proxy.config.settings import ConntrackLimits, HostPort, IpvsSettings, Settings, UserspaceLimits
from proxy.config.validate import check, parse_host_port
from proxy.config.values import quoted
from rules.forwarding import Prefix, format_address, merge_prefixes


class Loaded(NamedTuple):
    """What came of a configuration."""

    settings: Settings
    warnings: tuple[str, ...]
    """What the user should know, one line each."""
    merged: Merged
    """The same by the names of fields, with their origins."""


def load(given: Sequence[tuple[str, str]]) -> Loaded:
    """The effective configuration of `sluice run` with these flags (name without dashes, text), in their order.

    Raises:
        ConfigError: something in it cannot be used.
    """
    merged = merge(given)
    problems = [
        f"{merged.said(problem.path)}: {problem.message}" for problem in check(merged.values, section=merged.section)
    ]
    problems += _unknown_gates(merged)
    if problems:
        raise ConfigError(*problems)
    return Loaded(_settings(merged), (*merged.warnings, *_without_effect(merged)), merged)


def _settings(merged: Merged) -> Settings:
    values, section = merged.values, merged.section
    masquerade = "nftables" if section == "nftables" else "iptables"
    gates = values["featureGates"]
    return Settings(
        mode=values["mode"],
        cluster_cidrs=_prefixes(values["clusterCIDR"].split(",")),
        detect_local_mode=values["detectLocalMode"],
        bridge_interface=values["detectLocal.bridgeInterface"],
        interface_name_prefix=values["detectLocal.interfaceNamePrefix"],
        masquerade_all=values[f"{masquerade}.masqueradeAll"],
        masquerade_bit=values[f"{masquerade}.masqueradeBit"],
        node_port_addresses=values["nodePortAddresses"],
        localhost_node_ports=values["iptables.localhostNodePorts"],
        allow_external_ips=enabled(gates, "AllowServiceExternalIPs"),
        service_cidrs=_merge_cidrs(values["serviceCIDRs"]),
        iptables_backend=values["iptablesBackend"],
        userspace=UserspaceLimits(
            workers=values["userspace.workers"],
            drain=values["userspace.drain"] / SECOND,
            connect_timeout=values["userspace.connectTimeout"] / SECOND,
            tcp_idle_timeout=values["userspace.tcpIdleTimeout"] / SECOND,
            udp_idle_timeout=values["userspace.udpIdleTimeout"] / SECOND,
            udp_stream_timeout=values["userspace.udpStreamTimeout"] / SECOND,
            max_udp_flows=values["userspace.maxUDPFlows"],
        ),
        ipvs=IpvsSettings(
            scheduler=values["ipvs.scheduler"],
            excluded=_merge_cidrs(values["ipvs.excludeCIDRs"]) if values["mode"] == "ipvs" else (),
            strict_arp=values["ipvs.strictARP"],
            tcp_timeout=values["ipvs.tcpTimeout"] / SECOND,
            tcp_fin_timeout=values["ipvs.tcpFinTimeout"] / SECOND,
            udp_timeout=values["ipvs.udpTimeout"] / SECOND,
        ),
        hostname_override=values["hostnameOverride"].strip().lower(),
        bind_address=format_address(lenient_address(values["bindAddress"])),
        manifests=values["manifests"],
        kubeconfig=values["clientConnection.kubeconfig"],
        config=merged.flags.get("config", ""),
        master=merged.flags.get("master", ""),
        api_qps=values["clientConnection.qps"],
        api_burst=values["clientConnection.burst"],
        config_sync_period=values["configSyncPeriod"] / SECOND,
        sync_period=values[f"{section}.syncPeriod"] / SECOND,
        min_sync_period=values[f"{section}.minSyncPeriod"] / SECOND,
        healthz_bind_address=_host_port(values["healthzBindAddress"]),
        metrics_bind_address=_host_port(values["metricsBindAddress"]),
        bind_address_hard_fail=values["bindAddressHardFail"],
        conntrack=ConntrackLimits(
            max_per_core=values["conntrack.maxPerCore"],
            minimum=values["conntrack.min"],
            tcp_established_timeout=values["conntrack.tcpEstablishedTimeout"] / SECOND,
            tcp_close_wait_timeout=values["conntrack.tcpCloseWaitTimeout"] / SECOND,
            tcp_be_liberal=values["conntrack.tcpBeLiberal"],
            udp_timeout=values["conntrack.udpTimeout"] / SECOND,
            udp_stream_timeout=values["conntrack.udpStreamTimeout"] / SECOND,
        ),
        oom_score_adj=values["oomScoreAdj"],
        enable_profiling=values["enableProfiling"],
        drift_policy=values["driftPolicy"],
        remove_kube_proxy_rules=values["removeKubeProxyRules"],
        run_directory=values["runDirectory"],
        traffic_counters=values["trafficCounters"],
        traffic_counter_series=values["trafficCounterSeries"],
        debug_page=values["debugPage"],
        debug_page_anywhere=values["debugPageAnywhere"],
        log_format=values["logging.format"],
        verbosity=values["logging.verbosity"],
        strict_config=merged.flags.get("strict-config", False),
        takeover=merged.flags.get("takeover", False),
        feature_gates={
            name: enabled(gates, name) for name, gate in GATES.items() if gates and gate.use is not Use.OTHER
        },
        configz=v1alpha1(merged),
    )


def _unknown_gates(merged: Merged) -> Iterator[str]:
    for name in merged.values["featureGates"]:
        if name not in GATES and name not in PLANNED:
            close = difflib.get_close_matches(name[:100], GATES, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; kube-proxy 1.36 has none of that name: leave it out"
            yield f"{merged.said('featureGates')}: unrecognized feature gate: {quoted(name)}{hint}"


def _without_effect(merged: Merged) -> Iterator[str]:
    """What was asked for and is not done."""
    values = merged.values
    for path in merged.origins:
        field, value = BY_PATH[path], values[path]
        if field.honoured or value == field.default or value in field.quiet:
            continue
        if path.startswith("ipvs.") and values["mode"] != "ipvs":
            continue  # kube-proxy does not look at it either
        why = f"has no effect: {field.idle}" if field.idle else "is not supported yet and has no effect"
        yield f"{merged.said(path)} {why}"
    origin = merged.said("featureGates")
    for name, value in values["featureGates"].items():
        if name in PLANNED:
            yield f"{origin}: the feature gate {name} is newer than v1.36 and has no effect"
        elif GATES[name].use is Use.IGNORED and value != GATES[name].default:
            yield f"{origin}: the feature gate {name} has no effect: {IDLE[name]}"


def _prefixes(texts: Sequence[str]) -> tuple[Prefix, ...]:
    """The first network of each family; what is none is passed over: where it matters it has been checked."""
    found: dict[int, Prefix] = {}
    for text in texts:
        try:
            prefix = lenient_prefix(text)
        except ValueError:
            continue
        found.setdefault(len(prefix.address), prefix)
    return tuple(found.values())


def _merge_cidrs(texts: Sequence[str]) -> tuple[Prefix, ...]:
    prefixes = [lenient_prefix(text) for text in texts]
    return tuple(
        merged for size in (4, 16) for merged in merge_prefixes(each for each in prefixes if len(each.address) == size)
    )


def _host_port(text: str) -> HostPort | None:
    return parse_host_port(text) if text else None

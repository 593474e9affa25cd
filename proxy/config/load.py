"""From flags and a file to the effective `Settings`.

Values lie in one flat mapping by field path: the defaults, then the file, then flags over it.  With a file only a few
flags hold (CFG-1); the others are ignored with a warning, as their silence would surprise.  The values are completed
(CFG-12 to CFG-14), checked (CFG-20) and turned into `Settings`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from proxy.addresses import lenient_address, lenient_prefix
from proxy.config import document, flags
from proxy.config.errors import ConfigError
from proxy.config.schema import BY_PATH, FIELDS, GATES, GROUP_VERSION, KIND, SECOND
from proxy.config.settings import Settings
from proxy.config.validate import check, parse_host_port, with_port
from proxy.config.values import parse_flag, quoted, render
from rules.forwarding import Prefix, format_address, merge_prefixes

HEALTHZ_PORT = 10256
METRICS_PORT = 10249


class Loaded(NamedTuple):
    """What came of a configuration."""

    settings: Settings
    warnings: tuple[str, ...]
    """What the user should know, one line each."""


class _Merged(NamedTuple):
    """Values by path, and where they were said."""

    values: dict[str, Any]
    origins: Mapping[str, str]
    """For messages: `kube.yaml:7: iptables.syncPeriod` or `--iptables-sync-period`."""
    from_file: bool


def load(given: Sequence[tuple[str, str]]) -> Loaded:
    """The effective configuration of `sluice run` with these flags (name without dashes, text), in their order.

    Raises:
        ConfigError: something in it cannot be used.
    """
    parsed = _parse_flags(given)
    warnings: list[str] = []
    merged = _merge(parsed, warnings)
    values = merged.values
    _complete(merged, parsed)
    section = _section(values["mode"], from_file=merged.from_file)
    sync_path, min_sync_path = f"{section}.syncPeriod", f"{section}.minSyncPeriod"
    problems = [
        f"{_origin(merged.origins, problem.path)}: {problem.message}"
        for problem in check(values, sync_path=sync_path, min_sync_path=min_sync_path)
    ]
    if problems:
        raise ConfigError(*problems)
    warnings += _without_effect(merged)
    masquerade = "nftables" if values["mode"] == "nftables" and merged.from_file else "iptables"
    bit = "nftables" if values["mode"] == "nftables" else "iptables"
    settings = Settings(
        mode=values["mode"],
        cluster_cidrs=_prefixes(values["clusterCIDR"].split(",")),
        detect_local_mode=values["detectLocalMode"],
        bridge_interface=values["detectLocal.bridgeInterface"],
        interface_name_prefix=values["detectLocal.interfaceNamePrefix"],
        masquerade_all=values[f"{masquerade}.masqueradeAll"],
        masquerade_bit=values[f"{bit}.masqueradeBit"],
        node_port_addresses=values["nodePortAddresses"],
        localhost_node_ports=values["iptables.localhostNodePorts"],
        allow_external_ips=values["featureGates"].get("AllowServiceExternalIPs", True),
        service_cidrs=_merge_cidrs(values["serviceCIDRs"]),
        hostname_override=values["hostnameOverride"].strip().lower(),
        bind_address=format_address(lenient_address(values["bindAddress"])),
        manifests=values["manifests"],
        kubeconfig=values["clientConnection.kubeconfig"],
        master=parsed.get("master", ""),
        config_sync_period=values["configSyncPeriod"] / SECOND,
        sync_period=values[sync_path] / SECOND,
        min_sync_period=values[min_sync_path] / SECOND,
        healthz_bind_address=_host_port(values["healthzBindAddress"]),
        metrics_bind_address=_host_port(values["metricsBindAddress"]),
        bind_address_hard_fail=values["bindAddressHardFail"],
        drift_policy=values["driftPolicy"],
        run_directory=values["runDirectory"],
        log_format=values["logging.format"],
        verbosity=values["logging.verbosity"],
        strict_config=parsed.get("strict-config", False),
        takeover=parsed.get("takeover", False),
        feature_gates=values["featureGates"],
        configz=_v1alpha1(values, sync_path, min_sync_path, f"{masquerade}.masqueradeAll"),
    )
    return Loaded(settings, tuple(warnings))


def _parse_flags(given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Flags' values by name.  Of a flag given twice the last holds, but lists and maps add up, as Go's do."""
    parsed: dict[str, Any] = {}
    problems = []
    for name, text in given:
        flag = flags.BY_NAME[name]
        try:
            value = parse_flag(flag.type, text)
        except ValueError as error:
            problems.append(f"--{name}: {error}")
            continue
        before = parsed.get(name)
        if isinstance(before, tuple):
            value = before + value
        elif isinstance(before, dict):
            value = before | value
        parsed[name] = value
    if problems:
        raise ConfigError(*problems)
    return parsed


def _merge(parsed: Mapping[str, Any], warnings: list[str]) -> _Merged:
    """Defaults, file and flags in one."""
    values = {path: field.default for path, field in BY_PATH.items()}
    origins: dict[str, str] = {}
    path = parsed.get("config", "")
    if path:
        found = document.read(Path(path))
        if found.unknown and parsed.get("strict-config", False):
            raise ConfigError(*found.unknown)
        warnings += found.unknown
        values.update(found.values)
        origins.update({field: f"{path}:{line}: {field}" for field, line in found.lines.items()})
    for name, value in parsed.items():
        flag = flags.BY_NAME[name]
        if path and not flag.with_config:
            warnings.append(f"--{name} has no effect together with --config; set it in {path}")
        elif flag.path and not (flag.path.lower().endswith("bindaddress") and not value):  # CFG-3
            values[flag.path] = value + values[flag.path] if path and name == "vmodule" else value
            origins[flag.path] = f"--{name}"
    if not path and "ipvs.minSyncPeriod" not in origins:
        values["ipvs.minSyncPeriod"] = SECOND  # the flag's default is not the file's (CFG-2, CFG-11)
    return _Merged(values, origins, from_file=bool(path))


def _complete(merged: _Merged, parsed: Mapping[str, Any]) -> None:
    """Fill in what depends on other values (CFG-4, CFG-11, CFG-14)."""
    values, origins = merged.values, merged.origins
    if merged.from_file and ":" in values["bindAddress"]:
        for path, default in (("healthzBindAddress", "[::]:10256"), ("metricsBindAddress", "[::1]:10249")):
            if path not in origins:
                values[path] = default
    ports = {} if merged.from_file else parsed
    for name, path, usual in (
        ("healthz-port", "healthzBindAddress", HEALTHZ_PORT),
        ("metrics-port", "metricsBindAddress", METRICS_PORT),
    ):
        port = ports.get(name, usual)
        values[path] = with_port(values[path], port) if port else ""
        if name in ports and path not in origins and port:
            values[path] = f"{values[path].rpartition(':')[0]}:{port}"
    values["detectLocalMode"] = values["detectLocalMode"] or "ClusterCIDR"
    if values["mode"] == "nftables" and not values["nodePortAddresses"]:
        values["nodePortAddresses"] = ("primary",)


def _section(mode: str, *, from_file: bool) -> str:
    """Which section's periods hold (CFG-2, CFG-13)."""
    if mode == "ipvs" or (mode == "nftables" and from_file):
        return mode
    return "iptables"


def _without_effect(merged: _Merged) -> Iterator[str]:
    """What was asked for and is not done."""
    values, origins = merged.values, merged.origins
    for path, origin in origins.items():
        field, value = BY_PATH[path], values[path]
        if field.honoured or value == field.default or value in field.quiet:
            continue
        if path.startswith("ipvs.") and values["mode"] != "ipvs":
            continue  # kube-proxy does not look at it either
        yield f"{origin} is not supported yet and has no effect"
    origin = _origin(origins, "featureGates")
    for name, value in values["featureGates"].items():
        gate = GATES.get(name)
        if gate is None:
            close = difflib.get_close_matches(name[:100], GATES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"{origin}: the feature gate {quoted(name)} is unknown here and has no effect{hint}"
        elif value != gate.default and not gate.honoured:
            yield f"{origin}: the feature gate {name} is not supported yet and has no effect"


def _origin(origins: Mapping[str, str], path: str) -> str:
    """Where a field was said; for one that wasn't, its path."""
    field = path.partition("[")[0]
    if field in origins:
        return origins[field] + path[len(field) :]
    section = path.partition(".")[0]
    return f"{origins[section]}{path[len(section) :]}" if section in origins else path


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


def _host_port(text: str) -> Any:
    return parse_host_port(text) if text else None


def _v1alpha1(values: Mapping[str, Any], sync_path: str, min_sync_path: str, masquerade_path: str) -> dict[str, Any]:
    """The effective configuration as kube-proxy prints it: only the section that holds carries periods (CFG-13)."""
    result: dict[str, Any] = {"kind": KIND, "apiVersion": GROUP_VERSION}
    mode = values["mode"] or "iptables"
    shown = dict(values)
    for section in ("iptables", "ipvs", "nftables"):
        for name in ("syncPeriod", "minSyncPeriod"):
            shown[f"{section}.{name}"] = 0
        if f"{section}.masqueradeAll" in shown:
            shown[f"{section}.masqueradeAll"] = False
    active = mode if mode in {"ipvs", "nftables"} else "iptables"
    shown[f"{active}.syncPeriod"] = values[sync_path]
    shown[f"{active}.minSyncPeriod"] = values[min_sync_path]
    shown["nftables.masqueradeAll" if mode == "nftables" else "iptables.masqueradeAll"] = values[masquerade_path]
    shown["mode"] = mode
    for field in FIELDS:
        value = shown[field.path]
        if field.omit_empty and not value:
            continue
        *sections, name = field.path.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = render(field.type, value)
    return result

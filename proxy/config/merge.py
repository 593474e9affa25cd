"""Defaults, a file and flags, in one: every field's value by its path, and where it came from.

Values lie in one flat mapping: the defaults, then the file, then flags over it.  With a file only a few flags hold
(CFG-1); the others are ignored with a warning, as their silence would surprise.  Then what depends on other values is
filled in (CFG-4, CFG-11, CFG-14).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from proxy.config import flags
from proxy.config.errors import ConfigError
from proxy.config.schema import BY_PATH, SECOND
from proxy.config.validate import with_port
from proxy.config.values import parse_flag

HEALTHZ_PORT = 10256
METRICS_PORT = 10249


class Origin(NamedTuple):
    """Where a value came from."""

    kind: Literal["default", "file", "flag", "mode"]
    where: str = ""
    """`kube.yaml:7`, `--proxy-mode`, `nftables`; of a default, why it is that one, if it isn't always."""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".rstrip()


DEFAULT = Origin("default")


class Merged(NamedTuple):
    """The configuration, not checked yet."""

    values: Mapping[str, Any]
    """By path, of every field there is."""
    origins: Mapping[str, Origin]
    """Likewise, of those that are not plain defaults."""
    flags: Mapping[str, Any]
    """The flags that were given, by name."""
    warnings: tuple[str, ...]
    """What the user should know, one line each."""

    @property
    def section(self) -> str:
        """The section of the mode, whose periods hold (CFG-13)."""
        mode: str = self.values["mode"]
        return mode if mode in {"ipvs", "nftables"} else "iptables"

    def said(self, path: str) -> str:
        """How a message calls a field: `kube.yaml:7: mode`, `--proxy-mode`; one that nobody set by its path."""
        field = path.partition("[")[0]
        while field not in self.origins and "." in field:
            field = field.rpartition(".")[0]
        origin = self.origins.get(field, DEFAULT)
        if origin.kind == "flag":
            return origin.where + path[len(field) :]
        return f"{origin.where}: {path}" if origin.kind == "file" else path


def merge(given: Sequence[tuple[str, str]]) -> Merged:
    """What comes of flags (name without dashes, text) in their order, and of the file that they name.

    Raises:
        ConfigError: a flag or the file cannot be understood.
    """
    parsed = _parse_flags(given)
    values = {path: field.default for path, field in BY_PATH.items()}
    origins: dict[str, Origin] = {}
    warnings: list[str] = []
    file: str = parsed.get("config", "")
    if file:
        _take_file(file, values, origins, warnings, strict=parsed.get("strict-config", False))
    _take_flags(parsed, values, origins, warnings)
    _complete_addresses(values, origins, parsed)
    if not file:
        _complete_flags(values, origins)
    values["detectLocalMode"] = values["detectLocalMode"] or BY_PATH["detectLocalMode"].default
    if values["mode"] == "nftables" and not values["nodePortAddresses"]:
        values["nodePortAddresses"] = ("primary",)
        origins["nodePortAddresses"] = Origin("mode", "nftables")
    return Merged(values, origins, parsed, tuple(warnings))


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


Values = MutableMapping[str, Any]
Origins = MutableMapping[str, Origin]


def _take_file(file: str, values: Values, origins: Origins, warnings: list[str], *, strict: bool) -> None:
    from proxy.config import document  # noqa: PLC0415  # its parser costs 20 ms, and most verbs have no file

    found = document.read(Path(file))
    if found.unknown and strict:
        raise ConfigError(*found.unknown)
    warnings += found.unknown
    values.update(found.values)
    origins.update({path: Origin("file", f"{file}:{line}") for path, line in found.lines.items()})


def _take_flags(parsed: Mapping[str, Any], values: Values, origins: Origins, warnings: list[str]) -> None:
    file = parsed.get("config", "")
    for name, value in parsed.items():
        flag = flags.BY_NAME[name]
        if file and not flag.with_config:
            warnings.append(f"--{name} has no effect together with --config; set it in {file}")
            continue
        if flag.deprecated:
            warnings.append(f"--{name} is deprecated: {flag.deprecated}")
        if flag.path and (value or not _empty_is_unset(flag.path)):
            match name:
                case "vmodule" if file:
                    values[flag.path] = value + values[flag.path]
                case "hostname-override":
                    values[flag.path] = value.strip().lower() or value
                case _:
                    values[flag.path] = value
            origins[flag.path] = Origin("flag", f"--{name}")


def _empty_is_unset(path: str) -> bool:
    """Whether the empty text for a flag leaves what holds without it (CFG-2, CFG-3)."""
    return path == "hostnameOverride" or path.lower().endswith("bindaddress")


def _complete_flags(values: Values, origins: Origins) -> None:
    """Give the section of the mode what kube-proxy's flags mean for it (CFG-2)."""
    if "ipvs.minSyncPeriod" not in origins:
        values["ipvs.minSyncPeriod"] = SECOND  # the flag's default is not the file's (CFG-11)
    if values["mode"] == "nftables":
        for name in ("syncPeriod", "minSyncPeriod", "masqueradeAll"):
            values[f"nftables.{name}"] = values[f"iptables.{name}"]
            if f"iptables.{name}" in origins:
                origins[f"nftables.{name}"] = origins[f"iptables.{name}"]


def _complete_addresses(values: Values, origins: Origins, parsed: Mapping[str, Any]) -> None:
    if parsed.get("config") and ":" in values["bindAddress"]:
        for path, default in (("healthzBindAddress", "[::]:10256"), ("metricsBindAddress", "[::1]:10249")):
            if path not in origins:
                values[path] = default
                origins[path] = Origin("default", "of an IPv6 bindAddress")
    for name, path, usual in (
        ("healthz-port", "healthzBindAddress", HEALTHZ_PORT),
        ("metrics-port", "metricsBindAddress", METRICS_PORT),
    ):
        port = usual if parsed.get("config") else parsed.get(name, usual)
        if not port:
            values[path] = ""
            origins[path] = Origin("flag", f"--{name}")
            continue
        if port != usual and path not in origins:
            values[path] = values[path].rpartition(":")[0]
            origins[path] = Origin("flag", f"--{name}")
        values[path] = with_port(values[path], port)

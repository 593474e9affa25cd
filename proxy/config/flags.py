"""The flags of `sluice run`, as data: kube-proxy's (CFG-2), which work as they do there, and Sluice's own.

Go programs spell flags in ways that click does not know (CFG-1): `--flag=value`, `--flag value`, `--bool`,
`--bool=false`, underscores for dashes, `-v4`.  `normalise` turns them all into `--flag=value`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from proxy.config.errors import ConfigError
from proxy.config.schema import BY_PATH, DETECT_LOCAL_MODES, MODES
from proxy.config.values import Type, render


class Flag(NamedTuple):
    """One flag."""

    name: str
    type: Type
    path: str = ""
    """The field of the configuration that it sets; empty for those that `proxy.config.load` or `run` deal with."""
    help: str = ""
    own: bool = False
    """Whether it is Sluice's, not kube-proxy's."""
    with_config: bool = False
    """Whether it holds although a file is given (CFG-1)."""
    honoured: bool = True
    deprecated: str = ""
    """For a flag that kube-proxy deprecates: what to use in its place."""
    words: tuple[str, ...] = ()
    """What its value may be, where that is a few words."""

    @property
    def default(self) -> str:
        """For the help: what holds without the flag."""
        field = BY_PATH.get(self.path)
        value = render(field.type, field.default) if field else None
        return str(value).lower() if value else ""


def _flag(name: str, path: str, text: str, *, with_config: bool = False, words: tuple[str, ...] = ()) -> Flag:
    field = BY_PATH[path]
    return Flag(name, field.type, path, text, with_config=with_config, honoured=field.honoured, words=words)


def _own(name: str, kind: Type, text: str, path: str = "", *, words: tuple[str, ...] = ()) -> Flag:
    return Flag(name, kind, path, text, own=True, with_config=True, words=words)


def _leftover(name: str) -> Flag:
    # kube-proxy has it from a library and does nothing with it.
    return Flag(name, Type.STRING, help="accepted, without effect", with_config=True)


FLAGS: tuple[Flag, ...] = (
    Flag(
        "config",
        Type.STRING,
        help="file with a KubeProxyConfiguration, a SluiceConfiguration or both",
        with_config=True,
    ),
    _own("manifests", Type.STRING, "directory or file of manifests, in place of an API server", "manifests"),
    _flag("kubeconfig", "clientConnection.kubeconfig", "how to reach the API server"),
    Flag("master", Type.STRING, help="URL of the API server, in place of the kubeconfig's", with_config=True),
    _flag(
        "proxy-mode",
        "mode",
        "nftables, iptables, ipvs, userspace; empty: what the node can run, as iptables",
        words=MODES,
    ),
    _flag("hostname-override", "hostnameOverride", "name of this node, in place of the host's", with_config=True),
    _flag("cluster-cidr", "clusterCIDR", "the pods' networks, one of a family, separated by a comma"),
    _own("service-cidrs", Type.STRINGS, "networks of ClusterIPs, where no ServiceCIDR object tells", "serviceCIDRs"),
    _flag(
        "nodeport-addresses",
        "nodePortAddresses",
        "networks whose addresses answer node ports, or primary",
        words=("primary",),
    ),
    _flag("bind-address", "bindAddress", "address of this node, in place of the Node object's"),
    _flag("healthz-bind-address", "healthzBindAddress", "where /healthz and /livez are served"),
    _flag("metrics-bind-address", "metricsBindAddress", "where /metrics and others are served"),
    _flag("bind-address-hard-fail", "bindAddressHardFail", "end when one of these two cannot be served"),
    _flag(
        "detect-local-mode",
        "detectLocalMode",
        "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix",
        words=DETECT_LOCAL_MODES,
    ),
    _flag("pod-bridge-interface", "detectLocal.bridgeInterface", "bridge of local pods (BridgeInterface)"),
    _flag("pod-interface-name-prefix", "detectLocal.interfaceNamePrefix", "how the names of their interfaces begin"),
    _flag("masquerade-all", "iptables.masqueradeAll", "masquerade every connection to a ClusterIP"),
    _flag("iptables-masquerade-bit", "iptables.masqueradeBit", "bit of the packet mark to masquerade by"),
    _flag("iptables-localhost-nodeports", "iptables.localhostNodePorts", "node ports on 127.0.0.0/8, as in iptables"),
    _flag(
        "iptables-sync-period", "iptables.syncPeriod", "a failed sync is tried again after it, in every mode but ipvs"
    ),
    _flag("iptables-min-sync-period", "iptables.minSyncPeriod", "the least time between syncs, likewise"),
    _flag("ipvs-sync-period", "ipvs.syncPeriod", "the same for ipvs"),
    _flag("ipvs-min-sync-period", "ipvs.minSyncPeriod", "the same for ipvs"),
    _flag("ipvs-scheduler", "ipvs.scheduler", "how ipvs picks"),
    _flag("ipvs-exclude-cidrs", "ipvs.excludeCIDRs", "networks whose virtual servers ipvs leaves alone"),
    _flag("ipvs-strict-arp", "ipvs.strictARP", "answer ARP for own addresses only"),
    _flag("ipvs-tcp-timeout", "ipvs.tcpTimeout", "idle TCP connections in ipvs"),
    _flag("ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout", "TCP connections in ipvs after a FIN"),
    _flag("ipvs-udp-timeout", "ipvs.udpTimeout", "UDP flows in ipvs"),
    _flag("conntrack-max-per-core", "conntrack.maxPerCore", "size of the conntrack table per core"),
    _flag("conntrack-min", "conntrack.min", "least size of the conntrack table"),
    _flag("conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout", "idle TCP connections"),
    _flag("conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout", "TCP connections in CLOSE_WAIT"),
    _flag("conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal", "accept packets outside the TCP window"),
    _flag("conntrack-udp-timeout", "conntrack.udpTimeout", "unanswered UDP flows"),
    _flag("conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout", "answered UDP flows"),
    _flag("kube-api-content-type", "clientConnection.contentType", "format of the API"),
    _flag("kube-api-qps", "clientConnection.qps", "requests per second to the API server"),
    _flag("kube-api-burst", "clientConnection.burst", "requests at once to the API server"),
    _flag("config-sync-period", "configSyncPeriod", "informers' resync; Sluice needs none"),
    _flag("profiling", "enableProfiling", "profiles on the metrics server"),
    _flag("show-hidden-metrics-for-version", "showHiddenMetricsForVersion", "metrics hidden since a version"),
    _flag("oom-score-adj", "oomScoreAdj", "how readily the kernel kills the process for memory"),
    _flag("feature-gates", "featureGates", "Name=true,Name=false"),
    Flag(
        "healthz-port",
        Type.INT,
        help="port of healthz-bind-address; 0: not served (deprecated)",
        deprecated="use --healthz-bind-address",
    ),
    Flag(
        "metrics-port",
        Type.INT,
        help="port of metrics-bind-address; 0: not served (deprecated)",
        deprecated="use --metrics-bind-address",
    ),
    _own(
        "drift-policy",
        Type.STRING,
        "repair what others do to our rules, or only report it",
        "driftPolicy",
        words=("repair", "report"),
    ),
    _own(
        "iptables-backend",
        Type.STRING,
        "legacy or nft; empty: the one in use on the node",
        "iptablesBackend",
        words=("legacy", "nft"),
    ),
    _own(
        "remove-kube-proxy-rules",
        Type.BOOL,
        "remove what kube-proxy has left once our own rules are in place [true]; with --cleanup too [false]",
        "removeKubeProxyRules",
    ),
    _own("run-directory", Type.STRING, "where the agent's socket is", "runDirectory"),
    _own("traffic-counters", Type.BOOL, "count connections, packets and bytes of each Service", "trafficCounters"),
    _own("debug-page", Type.BOOL, "a page about Services at /debug/services of the metrics server", "debugPage"),
    _own(
        "debug-page-anywhere",
        Type.BOOL,
        "serve that page although others than this node can reach the metrics server",
        "debugPageAnywhere",
    ),
    _own("strict-config", Type.BOOL, "refuse unknown fields of the file instead of warning about them"),
    _own("takeover", Type.BOOL, "wait until another agent of this network namespace has gone"),
    Flag(
        "write-config-to", Type.STRING, help="write the resulting configuration to this file, and end", with_config=True
    ),
    Flag("cleanup", Type.BOOL, help="remove everything of ours, and end", with_config=True),
    Flag("init-only", Type.BOOL, help="end where privileged preparations would be done", with_config=True),
    Flag("version", Type.STRING, help="print the version, and end", with_config=True),
    _flag(
        "v", "logging.verbosity", "verbosity of the log: 2 and above adds every sync, 4 every event", with_config=True
    ),
    _flag("logging-format", "logging.format", "text or json", with_config=True, words=("text", "json")),
    _flag("vmodule", "logging.vmodule", "verbosity by source file", with_config=True),
    _flag("log-flush-frequency", "logging.flushFrequency", "time between flushes of the log", with_config=True),
    _flag("log-text-split-stream", "logging.options.text.splitStream", "errors to another stream", with_config=True),
    _flag("log-text-info-buffer-size", "logging.options.text.infoBufferSize", "buffer of that", with_config=True),
    _flag("log-json-split-stream", "logging.options.json.splitStream", "errors to another stream", with_config=True),
    _flag("log-json-info-buffer-size", "logging.options.json.infoBufferSize", "buffer of that", with_config=True),
    _leftover("boot-id-file"),
    _leftover("machine-id-file"),
)

ACTIONS = frozenset(("cleanup", "init-only", "takeover", "version", "write-config-to"))
"""Flags that say what to do rather than how to be configured."""
PATHS = frozenset(("config", "kubeconfig", "manifests", "run-directory", "write-config-to"))
"""Flags whose value is a file or a directory."""

BY_NAME: Mapping[str, Flag] = {flag.name: flag for flag in FLAGS}

# What a flag means that stands without a value.
_BARE = {flag.name: "true" for flag in FLAGS if flag.type is Type.BOOL} | {"version": "true"}


def normalise(arguments: Sequence[str], names: Container[str] = BY_NAME) -> list[str]:
    """Arguments in any of Go's spellings, as `--flag=value`; what is none of the flags in `names` stays as it is.

    Raises:
        ConfigError: a flag lacks its value.
    """
    result = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            result += [argument, *rest]
            break
        dashes, name, equals, value = _split(argument)
        if dashes == "-" and name[0:1] == "v" and name[1:].isdecimal() and "v" in names:
            result.append(f"--v={name[1:]}")
        elif not dashes or name not in names or (dashes == "-" and name != "v"):
            result.append(argument)
        elif equals:
            result.append(f"--{name}={value}")
        elif name in _BARE:
            result.append(f"--{name}={_BARE[name]}")
        else:
            following = next(rest, None)
            if following is None:
                raise ConfigError(f"{dashes}{name}: needs a value: {dashes}{name}=VALUE")
            result.append(f"--{name}={following}")
    return result


def _split(argument: str) -> tuple[str, str, str, str]:
    dashes = argument[: len(argument) - len(argument.lstrip("-"))]
    if len(dashes) > 2:
        return "", argument, "", ""
    name, equals, value = argument[len(dashes) :].partition("=")
    return dashes, name.replace("_", "-"), equals, value

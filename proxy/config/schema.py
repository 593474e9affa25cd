"""The fields of the configuration, as data: KubeProxyConfiguration v1alpha1 (CFG-11) and Sluice's own document.

A field's name is its path in the file (`iptables.syncPeriod`).  The order is the one in which kube-proxy prints the
object, and so do we (/configz).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from proxy.config.values import Type

GROUP_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"
OWN_GROUP_VERSION = "sluice.internal/v1alpha1"
OWN_KIND = "SluiceConfiguration"

SECOND = 1_000_000_000
ANY_ADDRESS = "0.0.0.0"  # noqa: S104  # nothing is bound to it, see Settings

MODES = ("iptables", "ipvs", "nftables", "userspace")
DETECT_LOCAL_MODES = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
PREVIOUS_MINOR = "1.35"
"""The version before the kube-proxy whose configuration this is."""


class Field(NamedTuple):
    """One field of a configuration document."""

    path: str
    type: Type
    default: Any
    honoured: bool = False
    """Whether it does something here.  Of the others, a value that asks for something is warned about."""
    zero_is_default: bool = False
    """Whether zero or the empty text in a file means the default (CFG-12)."""
    quiet: tuple[Any, ...] = ()
    """Values beside the default that ask for nothing, so that nobody needs to be warned."""
    omit_empty: bool = False
    """Whether an empty value is left out of the printed object."""
    live: bool = False
    """Whether a running agent takes on another value; a change of other fields ends it, to be started again."""
    idle: str = ""
    """Why it never does anything here, for who asks for it."""


_JSON = "the API server is spoken to in JSON"
_UNBUFFERED = "every line is written at once, to standard error"


def _windows(name: str, kind: Type, default: Any) -> Field:
    # kube-proxy on Linux passes over these as well.
    return Field(name, kind, default, honoured=True, live=True)


FIELDS: tuple[Field, ...] = (
    Field("featureGates", Type.GATES, {}, honoured=True, omit_empty=True),
    Field("clientConnection.kubeconfig", Type.STRING, "", honoured=True),
    Field("clientConnection.acceptContentTypes", Type.STRING, "", quiet=("application/json",), idle=_JSON),
    Field(
        "clientConnection.contentType",
        Type.STRING,
        "application/vnd.kubernetes.protobuf",
        zero_is_default=True,
        quiet=("application/json",),
        idle=_JSON,
    ),
    Field("clientConnection.qps", Type.FLOAT, 5.0, honoured=True, zero_is_default=True),
    Field("clientConnection.burst", Type.INT, 10, honoured=True, zero_is_default=True),
    Field("logging.format", Type.STRING, "text", honoured=True, zero_is_default=True, live=True),
    # Every line is written at once.
    Field("logging.flushFrequency", Type.FLUSH, 5 * SECOND, honoured=True, zero_is_default=True, live=True),
    Field("logging.verbosity", Type.INT, 0, honoured=True, live=True),
    Field(
        "logging.vmodule",
        Type.VMODULE,
        (),
        omit_empty=True,
        live=True,
        idle="its patterns name source files of kube-proxy",
    ),
    Field("logging.options.text.splitStream", Type.BOOL, False, omit_empty=True, live=True, idle=_UNBUFFERED),
    Field("logging.options.text.infoBufferSize", Type.QUANTITY, "0", live=True, idle=_UNBUFFERED),
    Field("logging.options.json.splitStream", Type.BOOL, False, omit_empty=True, live=True, idle=_UNBUFFERED),
    Field("logging.options.json.infoBufferSize", Type.QUANTITY, "0", live=True, idle=_UNBUFFERED),
    Field("hostnameOverride", Type.STRING, "", honoured=True),
    Field("bindAddress", Type.STRING, ANY_ADDRESS, honoured=True, zero_is_default=True, live=True),
    Field("healthzBindAddress", Type.STRING, "0.0.0.0:10256", honoured=True, zero_is_default=True),
    Field("metricsBindAddress", Type.STRING, "127.0.0.1:10249", honoured=True, zero_is_default=True),
    Field("bindAddressHardFail", Type.BOOL, False, honoured=True),
    Field("enableProfiling", Type.BOOL, False, honoured=True),
    # None of kube-proxy's metrics is hidden in v1.35, so there is nothing to show (MET-32).
    Field("showHiddenMetricsForVersion", Type.STRING, "", honoured=True, live=True),
    Field("mode", Type.STRING, "", honoured=True),
    Field("iptables.masqueradeBit", Type.INT, 14, honoured=True, live=True),
    Field("iptables.masqueradeAll", Type.BOOL, False, honoured=True, live=True),
    Field("iptables.localhostNodePorts", Type.BOOL, True, honoured=True, live=True),
    Field("iptables.syncPeriod", Type.DURATION, 30 * SECOND, honoured=True, zero_is_default=True, live=True),
    Field("iptables.minSyncPeriod", Type.DURATION, SECOND, honoured=True, zero_is_default=True, live=True),
    Field("ipvs.syncPeriod", Type.DURATION, 30 * SECOND, honoured=True, zero_is_default=True, live=True),
    Field("ipvs.minSyncPeriod", Type.DURATION, 0, honoured=True, live=True),
    Field("ipvs.scheduler", Type.STRING, "", honoured=True),
    Field("ipvs.excludeCIDRs", Type.STRINGS, (), honoured=True),
    Field("ipvs.strictARP", Type.BOOL, False, honoured=True),
    Field("ipvs.tcpTimeout", Type.DURATION, 0, honoured=True),
    Field("ipvs.tcpFinTimeout", Type.DURATION, 0, honoured=True),
    Field("ipvs.udpTimeout", Type.DURATION, 0, honoured=True),
    Field("nftables.masqueradeBit", Type.INT, 14, honoured=True, live=True),
    Field("nftables.masqueradeAll", Type.BOOL, False, honoured=True, live=True),
    Field("nftables.syncPeriod", Type.DURATION, 30 * SECOND, honoured=True, zero_is_default=True, live=True),
    Field("nftables.minSyncPeriod", Type.DURATION, SECOND, honoured=True, zero_is_default=True, live=True),
    _windows("winkernel.networkName", Type.STRING, ""),
    _windows("winkernel.sourceVip", Type.STRING, ""),
    _windows("winkernel.enableDSR", Type.BOOL, False),
    _windows("winkernel.rootHnsEndpointName", Type.STRING, ""),
    _windows("winkernel.forwardHealthCheckVip", Type.BOOL, False),
    Field("detectLocalMode", Type.STRING, "ClusterCIDR", honoured=True, zero_is_default=True),
    Field("detectLocal.bridgeInterface", Type.STRING, "", honoured=True, live=True),
    Field("detectLocal.interfaceNamePrefix", Type.STRING, "", honoured=True, live=True),
    Field("clusterCIDR", Type.STRING, "", honoured=True, live=True),
    Field("nodePortAddresses", Type.STRINGS, (), honoured=True, live=True),
    Field("oomScoreAdj", Type.INT, -999, honoured=True, live=True),
    Field("conntrack.maxPerCore", Type.INT, 32768, honoured=True, live=True),
    Field("conntrack.min", Type.INT, 131072, honoured=True, live=True),
    Field("conntrack.tcpEstablishedTimeout", Type.DURATION, 24 * 3600 * SECOND, honoured=True, live=True),
    Field("conntrack.tcpCloseWaitTimeout", Type.DURATION, 3600 * SECOND, honoured=True, live=True),
    Field("conntrack.tcpBeLiberal", Type.BOOL, False, honoured=True, live=True),
    Field("conntrack.udpTimeout", Type.DURATION, 0, honoured=True, live=True),
    Field("conntrack.udpStreamTimeout", Type.DURATION, 0, honoured=True, live=True),
    Field("configSyncPeriod", Type.DURATION, 900 * SECOND, honoured=True, zero_is_default=True, live=True),
    # kube-proxy passes over it too (CFG-11).
    Field("portRange", Type.STRING, "", honoured=True, live=True),
    _windows("windowsRunAsService", Type.BOOL, False)._replace(omit_empty=True),
)


def _own(path: str, kind: Type, default: Any, *, zero_is_default: bool = True, live: bool = False) -> Field:
    return Field(path, kind, default, honoured=True, zero_is_default=zero_is_default, live=live)


OWN_FIELDS: tuple[Field, ...] = (
    _own("serviceCIDRs", Type.STRINGS, (), live=True),
    _own("manifests", Type.STRING, ""),
    _own("driftPolicy", Type.STRING, "repair", live=True),
    _own("iptablesBackend", Type.STRING, ""),
    _own("removeKubeProxyRules", Type.BOOL, True, zero_is_default=False),
    _own("runDirectory", Type.STRING, "/run/sluice"),
    _own("trafficCounters", Type.BOOL, False),
    _own("trafficCounterSeries", Type.INT, 1000),
    _own("debugPage", Type.BOOL, False),
    _own("debugPageAnywhere", Type.BOOL, False),
    _own("userspace.workers", Type.INT, 0),
    _own("userspace.drain", Type.DURATION, 30 * SECOND, zero_is_default=False),
    _own("userspace.connectTimeout", Type.DURATION, 5 * SECOND),
    _own("userspace.tcpIdleTimeout", Type.DURATION, 0, zero_is_default=False),
    _own("userspace.udpIdleTimeout", Type.DURATION, 30 * SECOND),
    _own("userspace.udpStreamTimeout", Type.DURATION, 180 * SECOND),
    _own("userspace.maxUDPFlows", Type.INT, 65536),
)

BY_PATH: Mapping[str, Field] = {field.path: field for field in (*FIELDS, *OWN_FIELDS)}

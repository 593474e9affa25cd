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


def _conntrack(name: str, kind: Type, default: Any) -> Field:
    # Zero leaves the kernel's own setting alone, which is what happens anyhow.
    return Field(f"conntrack.{name}", kind, default, quiet=(0, False))


def _windows(name: str, kind: Type, default: Any) -> Field:
    # kube-proxy on Linux passes over these as well.
    return Field(name, kind, default, honoured=True)


FIELDS: tuple[Field, ...] = (
    Field("featureGates", Type.GATES, {}, honoured=True, omit_empty=True),
    Field("clientConnection.kubeconfig", Type.STRING, "", honoured=True),
    Field("clientConnection.acceptContentTypes", Type.STRING, ""),
    Field(
        "clientConnection.contentType",
        Type.STRING,
        "application/vnd.kubernetes.protobuf",
        zero_is_default=True,
        quiet=("application/json",),
    ),
    Field("clientConnection.qps", Type.FLOAT, 5.0, zero_is_default=True),
    Field("clientConnection.burst", Type.INT, 10, zero_is_default=True),
    Field("logging.format", Type.STRING, "text", honoured=True, zero_is_default=True),
    Field("logging.flushFrequency", Type.DURATION, 5 * SECOND, zero_is_default=True),
    Field("logging.verbosity", Type.INT, 0, honoured=True),
    Field("logging.vmodule", Type.VMODULE, (), omit_empty=True),
    Field("logging.options.text.splitStream", Type.BOOL, False, omit_empty=True),
    Field("logging.options.text.infoBufferSize", Type.STRING, "0"),
    Field("logging.options.json.splitStream", Type.BOOL, False, omit_empty=True),
    Field("logging.options.json.infoBufferSize", Type.STRING, "0"),
    Field("hostnameOverride", Type.STRING, "", honoured=True),
    Field("bindAddress", Type.STRING, "0.0.0.0", honoured=True, zero_is_default=True),  # noqa: S104  # see Settings
    Field("healthzBindAddress", Type.STRING, "0.0.0.0:10256", honoured=True, zero_is_default=True),
    Field("metricsBindAddress", Type.STRING, "127.0.0.1:10249", honoured=True, zero_is_default=True),
    Field("bindAddressHardFail", Type.BOOL, False, honoured=True),
    Field("enableProfiling", Type.BOOL, False),
    Field("showHiddenMetricsForVersion", Type.STRING, ""),
    Field("mode", Type.STRING, "", honoured=True),
    Field("iptables.masqueradeBit", Type.INT, 14, honoured=True),
    Field("iptables.masqueradeAll", Type.BOOL, False, honoured=True),
    Field("iptables.localhostNodePorts", Type.BOOL, True, honoured=True),
    Field("iptables.syncPeriod", Type.DURATION, 30 * SECOND, honoured=True, zero_is_default=True),
    Field("iptables.minSyncPeriod", Type.DURATION, SECOND, honoured=True, zero_is_default=True),
    Field("ipvs.syncPeriod", Type.DURATION, 30 * SECOND, honoured=True, zero_is_default=True),
    Field("ipvs.minSyncPeriod", Type.DURATION, 0, honoured=True),
    Field("ipvs.scheduler", Type.STRING, ""),
    Field("ipvs.excludeCIDRs", Type.STRINGS, ()),
    Field("ipvs.strictARP", Type.BOOL, False),
    Field("ipvs.tcpTimeout", Type.DURATION, 0),
    Field("ipvs.tcpFinTimeout", Type.DURATION, 0),
    Field("ipvs.udpTimeout", Type.DURATION, 0),
    Field("nftables.masqueradeBit", Type.INT, 14, honoured=True),
    Field("nftables.masqueradeAll", Type.BOOL, False, honoured=True),
    Field("nftables.syncPeriod", Type.DURATION, 30 * SECOND, honoured=True, zero_is_default=True),
    Field("nftables.minSyncPeriod", Type.DURATION, SECOND, honoured=True, zero_is_default=True),
    _windows("winkernel.networkName", Type.STRING, ""),
    _windows("winkernel.sourceVip", Type.STRING, ""),
    _windows("winkernel.enableDSR", Type.BOOL, False),
    _windows("winkernel.rootHnsEndpointName", Type.STRING, ""),
    _windows("winkernel.forwardHealthCheckVip", Type.BOOL, False),
    Field("detectLocalMode", Type.STRING, "", honoured=True),
    Field("detectLocal.bridgeInterface", Type.STRING, "", honoured=True),
    Field("detectLocal.interfaceNamePrefix", Type.STRING, "", honoured=True),
    Field("clusterCIDR", Type.STRING, "", honoured=True),
    Field("nodePortAddresses", Type.STRINGS, (), honoured=True),
    Field("oomScoreAdj", Type.INT, -999),
    _conntrack("maxPerCore", Type.INT, 32768),
    _conntrack("min", Type.INT, 131072),
    _conntrack("tcpEstablishedTimeout", Type.DURATION, 24 * 3600 * SECOND),
    _conntrack("tcpCloseWaitTimeout", Type.DURATION, 3600 * SECOND),
    _conntrack("tcpBeLiberal", Type.BOOL, False),
    _conntrack("udpTimeout", Type.DURATION, 0),
    _conntrack("udpStreamTimeout", Type.DURATION, 0),
    Field("configSyncPeriod", Type.DURATION, 900 * SECOND, honoured=True, zero_is_default=True),
    # kube-proxy passes over it too (CFG-11).
    Field("portRange", Type.STRING, "", honoured=True),
    _windows("windowsRunAsService", Type.BOOL, False)._replace(omit_empty=True),
)

OWN_FIELDS: tuple[Field, ...] = (
    Field("serviceCIDRs", Type.STRINGS, (), honoured=True),
    Field("manifests", Type.STRING, "", honoured=True),
    Field("driftPolicy", Type.STRING, "repair", honoured=True, zero_is_default=True),
    Field("runDirectory", Type.STRING, "/run/sluice", honoured=True, zero_is_default=True),
)

BY_PATH: Mapping[str, Field] = {field.path: field for field in (*FIELDS, *OWN_FIELDS)}


class Gate(NamedTuple):
    """A feature gate that kube-proxy knows (CFG-63)."""

    default: bool
    honoured: bool = False
    locked: bool = False


GATES: Mapping[str, Gate] = {
    "AllowServiceExternalIPs": Gate(default=True, honoured=True),
    "AllAlpha": Gate(default=False),
    "AllBeta": Gate(default=False),
    "ComponentFlagz": Gate(default=True),
    "ComponentStatusz": Gate(default=True),
    "ContextualLogging": Gate(default=True),
    "LoggingAlphaOptions": Gate(default=False),
    "LoggingBetaOptions": Gate(default=True),
    "MultiCIDRServiceAllocator": Gate(default=True, locked=True),
    "NFTablesProxyMode": Gate(default=True, locked=True),
    "NativeHistograms": Gate(default=False),
    "PreferSameTrafficDistribution": Gate(default=True, locked=True),
}
"""Gates of kube-proxy v1.36.  Others are gates of a newer cluster or of other components, and do nothing."""

"""The effective configuration: what the agent and the offline verbs go by, in the types that they use.

`proxy.config.load` makes a `Settings` from defaults, a file and flags.  Everything here is already merged, completed
(CFG-12 to CFG-14) and validated (CFG-20); nothing in it needs parsing again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from rules.forwarding import Address, Family, Prefix, parse_address

Mode = Literal["", "nftables", "iptables", "ipvs", "userspace"]
DetectLocalMode = Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]
IptablesBackend = Literal["", "legacy", "nft"]
LogFormat = Literal["text", "json"]
DriftPolicy = Literal["repair", "report"]

RUN_DIRECTORY = "/run/sluice"

PRIMARY = "primary"
"""The word that stands for the node's own addresses in `node_port_addresses` (CFG-31)."""


class HostPort(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ConntrackLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the node's connection tracking is set to (CT-8); 0 leaves what the kernel has.  Times in seconds."""

    max_per_core: int = 32768
    minimum: int = 131072
    tcp_established_timeout: float = 86400.0
    tcp_close_wait_timeout: float = 3600.0
    tcp_be_liberal: bool = False
    udp_timeout: float = 0.0
    udp_stream_timeout: float = 0.0


class UserspaceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How mode userspace carries traffic.  Times in seconds."""

    workers: int = 0
    """Processes; 0: one per core."""
    drain: float = 30.0
    """How long flows may go on after their worker is told to end."""
    connect_timeout: float = 5.0
    """For a backend to accept a connection."""
    tcp_idle_timeout: float = 0.0
    """After which a connection without traffic is closed; 0: never."""
    udp_idle_timeout: float = 30.0
    """After which a flow that was not answered is forgotten."""
    udp_stream_timeout: float = 180.0
    """After which one that was answered is."""
    max_udp_flows: int = 65536
    """In one worker; with more, the one that was idle for longest goes."""


class IpvsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is special to mode ipvs.  Times in seconds; 0 leaves what the kernel has (IPVS-4)."""

    scheduler: str = ""
    """How connections are balanced where no Service says; empty: `rr` (IPVS-5)."""
    excluded: tuple[Prefix, ...] = ()
    """Networks whose virtual servers are left alone (IPVS-24)."""
    strict_arp: bool = False
    """Whether the node answers ARP only on the interface that has the address (IPVS-3)."""
    tcp_timeout: float = 0.0
    tcp_fin_timeout: float = 0.0
    udp_timeout: float = 0.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The effective configuration.  The defaults are those of an agent started without file and flags."""

    # --- what is programmed, and how ---

    mode: Mode = ""
    """The mode asked for by name; "" leaves the dataplane to the node and means what iptables means (DESIGN 4.10)."""
    cluster_cidrs: tuple[Prefix, ...] = ()
    """The pods' networks: at most one of each family (CFG-20)."""
    detect_local_mode: DetectLocalMode = "ClusterCIDR"
    bridge_interface: str = ""
    interface_name_prefix: str = ""
    masquerade_all: bool = False
    masquerade_bit: int = 14
    node_port_addresses: tuple[str, ...] = ()
    """Networks in text, or `primary`; empty: every address but loopback.  Never empty in nftables mode (CFG-14)."""
    localhost_node_ports: bool = True
    """Whether 127.0.0.0/8 answers node ports, where `behaviour` is `iptables` (TRF-21); other modes never do it."""
    allow_external_ips: bool = True
    """The gate AllowServiceExternalIPs: without it `spec.externalIPs` is ignored."""
    service_cidrs: tuple[Prefix, ...] = ()
    """Networks of ClusterIPs where no ServiceCIDR objects tell them (DESIGN 4.13)."""

    iptables_backend: IptablesBackend = ""
    """Which iptables programs write the rules of mode iptables; empty: those in use on the node."""
    userspace: UserspaceLimits = UserspaceLimits()
    ipvs: IpvsSettings = IpvsSettings()

    # --- where objects come from ---

    hostname_override: str = ""
    """Trimmed and in lower case; empty: the host's own name (NOD-1)."""
    bind_address: str = "0.0.0.0"  # noqa: S104  # nothing is bound to it: it overrides the node's address (NOD-10)
    manifests: str = ""
    """A directory or a file of manifests; with it no API server is asked."""
    kubeconfig: str = ""
    master: str = ""
    """The API server's URL, in place of the one in the kubeconfig."""
    api_qps: float = 5.0
    """Requests a second to the API server; below 0: any number."""
    api_burst: int = 10
    """Requests to it at once."""
    config_sync_period: float = 900.0

    config: str = ""
    """The configuration file, which is watched; empty: none."""

    # --- the loop ---

    sync_period: float = 30.0
    """Seconds after which a failed sync is tried again; twice as much without success is unhealthy (HC-3)."""
    min_sync_period: float = 1.0
    """The least seconds between the end of a sync and the next one (SYN-4)."""

    drift_policy: DriftPolicy = "repair"
    """What becomes of rules of ours that another process has changed (DESIGN 4.2)."""

    remove_kube_proxy_rules: bool = True
    """Whether rules that kube-proxy has left go once ours are in place."""

    # --- what is served ---

    run_directory: str = RUN_DIRECTORY
    """Where the agent's socket is (DESIGN 4.12).  Agents of several network namespaces need one each."""

    traffic_counters: bool = False
    """Whether connections, packets and bytes of each Service are counted, which has connection tracking count."""
    traffic_counter_series: int = 1000
    """Service ports that metrics tell apart in their traffic; others are counted together."""
    debug_page: bool = False
    """Whether the metrics server has the page about Services."""
    debug_page_anywhere: bool = False
    """Whether it has it on an address that is not a loopback one, too."""

    healthz_bind_address: HostPort | None = HostPort("0.0.0.0", 10256)  # noqa: S104  # kubelets probe it from anywhere
    metrics_bind_address: HostPort | None = HostPort("127.0.0.1", 10249)
    bind_address_hard_fail: bool = False
    """Whether a server that cannot listen ends the agent (CFG-55); otherwise it tries again every 5 s."""

    # --- the process, and the node that it runs on ---

    conntrack: ConntrackLimits = ConntrackLimits()
    oom_score_adj: int = -999
    """How readily the kernel ends the process for memory: from -1000, never, to 1000."""
    enable_profiling: bool = False
    """Whether the metrics server has profiles too (HTTP-1)."""
    log_format: LogFormat = "text"
    verbosity: int = 0
    strict_config: bool = False
    takeover: bool = False
    """Wait for another agent of this network namespace to go, instead of giving up (DESIGN 4.11)."""
    feature_gates: Mapping[str, bool] = {}
    """Those of kube-proxy's own gates, by name, if any gate was set; others have their defaults."""

    # --- what is told about itself ---

    configz: Mapping[str, Any] = {}
    """The same as a v1alpha1 object, with apiVersion and kind, as /configz shows it (HTTP-1)."""

    @property
    def behaviour(self) -> str:
        """The mode whose rules of behaviour hold: `iptables` for "" (CFG-14)."""
        return self.mode or "iptables"

    @property
    def masquerade_mark(self) -> int:
        """The mark's bit as a mask."""
        return 1 << self.masquerade_bit

    @property
    def node_ip_override(self) -> Address | None:
        """The node's address by `bind_address`; None when that is an unspecified address (NOD-10)."""
        address = parse_address(self.bind_address)
        return address if any(address) else None

    @property
    def health_timeout(self) -> float:
        """Seconds for which a requested sync may stay undone before its family is unhealthy (HC-3)."""
        return 2 * self.sync_period

    def cluster_cidr(self, family: Family) -> Prefix | None:
        """The pods' network of a family (CFG-40)."""
        return next((prefix for prefix in self.cluster_cidrs if len(prefix.address) == family.address_bytes), None)

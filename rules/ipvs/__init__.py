DEVICE = "sluice-ipvs"
"""The dummy device that holds the addresses of frontends (IPVS-7)."""
KUBE_PROXYS_DEVICE = "kube-ipvs0"
"""The one of kube-proxy's ipvs mode: what it holds are Services' addresses, and none of the node's."""

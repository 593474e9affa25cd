"""Rules of other service proxies, decoded into the same forwarding table.

    iptables-save ─ saved ─────────────────── kube_proxy_iptables ─┐
    nft list ─ nft_text ─┐                                         ├─ gathering ─▶ Reading(ForwardingTable, ...)
    nft -j list ─ nft_json ┴─ nft_model ─ kube_proxy_nftables ─────┘

A decoder goes from the rules at which packets come in to the backends, and writes down for every frontend the steps
that matter: who is marked for masquerade, who is sent to which list.  `gathering` makes routes of the steps, the same
way for every decoder.  A rule that is not understood, a chain that is missing, a list that is not balanced: each is a
sentence of the table's `damage`, and what is left is decoded all the same.  Everything here is pure.
"""

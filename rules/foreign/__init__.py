"""Rules of other service proxies, decoded into the same forwarding table.

    iptables-save ─ saved ─────────────────── kube_proxy_iptables ─┐
    nft list ─ nft_text ─┐                                         ├─ gathering ─┐
    nft -j list ─ nft_json ┴─ nft_model ─ kube_proxy_nftables ─────┘             ├─▶ Reading(ForwardingTable, ...)
    iptables-save ─ saved ───────┐                                               │
    ipvsadm -Sn ─ ipvs_text ─────┤                                               │
    ipset save ─ ipset_text ─────┼─ ipvs_state ─ kube_proxy_ipvs ────────────────┘
    ip -j addr ─ addresses_json ─┘

A decoder goes from the rules at which packets come in to the backends, and writes down for every frontend the steps
that matter: who is marked for masquerade, who is sent to which list.  `gathering` makes routes of the steps, the same
way for every decoder of rules; in ipvs mode sets and virtual servers say it all, and rules are nearly constant.

A rule that is not understood, a chain that is missing, a list that is not balanced: each is a sentence of the table's
`damage`, and what is left is decoded all the same.  `parts` cuts a text of several programs into what each printed, and
`detect` puts files together.  Everything here is pure.
"""

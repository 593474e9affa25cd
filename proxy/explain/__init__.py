"""`sluice explain`: what becomes of one connection, step by step, and why.

    question (asked) ─┐
    evidence ─────────┴─▶ answer ─▶ text, data        evidence: manifests, the kernel, the agent
                            │
                            └ rules.explain, Decisions, causes, disagreement

Nothing is sent and nothing is changed.  Importing this package costs no netlink: answers from manifests do without.
"""

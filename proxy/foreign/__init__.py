"""dump, explain and verify of another service proxy's rules: of this node's, or of files that were saved elsewhere.

    this node, files ─ sources ─▶ Found(Reading) ─┬─▶ dump
                                                  ├─▶ explain   the objects of manifests or of the agent beside it
    manifests, agent, API server ─ wanted ────────┴─▶ verify

What the rules come to is `rules.foreign`'s business.
"""

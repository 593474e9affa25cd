"""The verbs that ask what a node's rules are, should be, or do (DESIGN 5); see `proxy.cli` for the others."""

from proxy.questions import node, rules

VERBS = (
    rules.render,
    rules.dump,
    rules.explain,
    rules.verify,
    node.doctor,
    node.status,
    node.conntrack,
    node.trace,
    node.bundle,
)

"""The userspace dataplane: worker processes that carry the traffic, and the agent's side that instructs them."""

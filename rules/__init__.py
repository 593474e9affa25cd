"""The forwarding table, and the dataplanes that put it into a kernel."""

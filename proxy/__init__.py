"""The agent: sources, caches, compute, the sync loop, and what it shows of itself."""

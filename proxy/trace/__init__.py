"""`sluice trace`: what the kernel's own rules did with the first packets of real connections, for a bounded time."""

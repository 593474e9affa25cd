"""`sluice demo`, and the cluster of network namespaces that it and the tests run in."""

from __future__ import annotations

import sys


def main(*, plain: bool | None = None) -> int:
    """Run the demo on standard output; plain text or colours by what that is, unless told.

    Returns 0 when everything was as expected, 1 when something was not, 2 when the demo cannot run here, 130 when it
    was interrupted.
    """
    from proxy.demo.show import show  # noqa: PLC0415  # pyroute2 is not for whoever only imports the package

    return show(sys.stdout, plain=plain)

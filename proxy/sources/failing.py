"""What an operator is told when an API server cannot be followed: one line, with what to do, however many resources.

Four lists and watches fail together when the server goes.  The first one says so; the others, for the same cause, say
nothing that a log of usual verbosity shows, unless one of them recovers and they do not.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.sources.base import Resource
from proxy.sources.transport import ApiError, RefusedError, UntrustedError

_BY_STATUS = {
    401: "renew the token or the client certificate of the kubeconfig, or see whether the service account exists",
    403: "bind this user to the ClusterRole system:node-proxier",
    404: "see whether the server of the kubeconfig, or --master, is the API server's own address, without a path",
    429: "the server is busy, and says when it may be asked again",
}
_UNTRUSTED = "give the right certificate-authority in the kubeconfig, and the server by a name in its certificate"
_REFUSED = "the API server has a trouble of its own: look at its log"
_UNREACHABLE = "see whether it runs and can be reached from this node, and whether the kubeconfig or --master names it"
_USUAL = "nothing, unless it happens all the time"
_BROKEN = "see whether that is an API server, and what stands between it and this node"


def advice(error: ApiError) -> str:
    """What to do about a failure, in a sentence's form."""
    match error:
        case _ if error.usual:
            return _USUAL
        case RefusedError():
            return _BY_STATUS.get(error.status.code, _REFUSED)
        case UntrustedError():
            return _UNTRUSTED
        case _ if str(error).startswith("cannot connect"):
            return _UNREACHABLE
        case _:
            return _BROKEN


class Failing:
    """The resources of one server that fail, by cause."""

    def __init__(self, server: Callable[[], str] = lambda: "") -> None:
        """Of a server whose URL `server` gives."""
        self.server = server
        self._causes: dict[str, set[Resource]] = {}

    def is_news(self, resource: Resource, error: ApiError) -> bool:
        """Note that a resource fails; whether nobody has been told of the cause."""
        # Refusals name their resource: those with one status have one cause.
        cause = str(error.status.code) if isinstance(error, RefusedError) else str(error)
        known = self._causes.setdefault(cause, set())
        news = not known
        known.add(resource)
        return news

    def recovered(self, resource: Resource) -> None:
        """A resource is followed again: what keeps others from that is another cause, and news."""
        self._causes = {cause: failing for cause, failing in self._causes.items() if resource not in failing}

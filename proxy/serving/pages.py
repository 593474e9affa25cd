"""/statusz and /flagz: what kube-proxy's pages for people say, in its forms (HTTP-1).

Plain text unless a client asks, with all three parameters that Kubernetes wants, for the JSON of an API version that it
knows.  Pure: who serves them passes the time in.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from proxy.config import flags
from proxy.config.errors import ConfigError
from proxy.config.values import Type
from proxy.serving.messages import Request, Response, text

COMPONENT = "kube-proxy"

_ZERO = {Type.BOOL: "false", Type.INT: "0", Type.FLOAT: "0", Type.DURATION: "0s", Type.STRINGS: "[]"}
"""How Go prints what is not set."""

_GROUP = "config.k8s.io"
_CURRENT, _DEPRECATED = "v1beta1", "v1alpha1"
_HEAD = """
{component} {page}
Warning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and is for \
debugging purposes only.

"""


def statusz(request: Request, *, version: str, started: float, uptime: float, paths: Iterable[str]) -> Response:
    """What runs here, since when (seconds since the epoch) and for how many seconds, and what else is served."""
    listed = sorted({f"/{path.split('/')[1]}" for path in paths})
    python = platform.python_version()

    def lines() -> Iterable[str]:
        hours, rest = divmod(int(uptime), 3600)
        moment = time.gmtime(started)
        yield f"Started: {time.strftime('%a %b', moment)} {moment.tm_mday:2} {time.strftime('%H:%M:%S UTC %Y', moment)}"
        yield f"Up: {hours} hr {rest // 60:02} min {rest % 60:02} sec"
        yield f"Python version: {python}"
        yield f"Binary version: {version} (sluice)"
        yield f"Paths: {' '.join(listed)}"

    return _negotiated(
        request,
        "statusz",
        lines(),
        {
            "startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "uptimeSeconds": int(uptime),
            "binaryVersion": version,
            "paths": listed,
        },
    )


def flagz(request: Request, arguments: Iterable[str]) -> Response:
    """The flags of a command line, and the defaults of all others."""
    values = flag_values(arguments)
    return _negotiated(request, "flagz", (f"{name}={value}" for name, value in values.items()), {"flags": values})


def flag_values(arguments: Iterable[str]) -> dict[str, str]:
    """Every flag of `run` with its value in a command line, by name; of one given twice the last."""
    values = {flag.name: flag.default or _ZERO.get(flag.type, "") for flag in flags.FLAGS}
    try:
        normal = flags.normalise(list(arguments))
    except ConfigError:
        normal = []
    for argument in normal:
        name, equals, value = argument.removeprefix("--").partition("=")
        if equals and name in values:
            values[name] = value
    return dict(sorted(values.items()))


def _negotiated(request: Request, page: str, lines: Iterable[str], fields: Mapping[str, Any]) -> Response:
    """The form that the client accepts most; 406 where there is none."""
    kind = page.capitalize()
    accepted = request.header("Accept") or "*/*"
    for choice in accepted.split(","):
        media, *parameters = (part.strip() for part in choice.split(";"))
        if media in {"*/*", "text/*", "text/plain"}:
            body = _HEAD.format(component=COMPONENT, page=page) + "".join(f"{line}\n" for line in lines)
            return text(body)
        wanted = dict(part.partition("=")[::2] for part in parameters)
        version = wanted.get("v", "")
        if (
            media == "application/json"
            and (wanted.get("g"), wanted.get("as")) == (_GROUP, kind)
            and version in {_CURRENT, _DEPRECATED}
        ):
            return _structured(kind, version, fields)
    return text("406 not acceptable\n", 406)


def _structured(kind: str, version: str, fields: Mapping[str, Any]) -> Response:
    value = {"kind": kind, "apiVersion": f"{_GROUP}/{version}", "metadata": {"name": COMPONENT}, **fields}
    headers = [("Content-Type", "application/json")]
    if version == _DEPRECATED:
        headers.append(("Warning", f'299 - "{_GROUP}/{version} {kind} is deprecated, use {_GROUP}/{_CURRENT}"'))
    return Response(200, msgspec.json.encode(value), tuple(headers))

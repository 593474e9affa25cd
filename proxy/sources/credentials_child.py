"""Reads credentials with the `kubernetes` package, hands them over as one JSON object on standard output, and ends.

The package costs 0.2 s and 20 MB, which the agent needn't carry (DESIGN 4.9): `proxy.sources.credentials` runs this
file as a process of its own, and nothing else imports it.  It imports nothing of ours.

The package's own messages may quote the kubeconfig, tokens included (it names a node of the file by the node's whole
text), so they are never passed on as they are: every refusal here is a sentence of ours, and `_without_secrets` is the
second net under the few foreign words that get through, such as the first line of an exec plugin's complaint.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib
import ipaddress
import json
import logging
import os
import re
import signal
import sys
import tempfile
import types
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECRETS = frozenset(
    {
        *("token", "password", "client-key-data", "client-certificate-data"),
        *("id-token", "refresh-token", "access-token", "client-secret"),
        *("clientKeyData", "clientCertificateData"),
    },
)
CLUSTER_FILES = ("certificate-authority",)
USER_FILES = ("client-certificate", "client-key", "tokenFile")


class RefusedError(Exception):
    """No credentials; the message is the line that the agent prints."""


def _package(name: str) -> Any:
    """A module of kubernetes.config, loaded when it is needed: what is wrong with a file is said without it."""
    return importlib.import_module(f"kubernetes.config.{name}")


def in_cluster(service_account: Path) -> dict[str, Any]:
    """The service account of the pod that this process runs in (CFG-15)."""
    token, ca = service_account / "token", service_account / "ca.crt"
    if not os.environ.get("KUBERNETES_SERVICE_HOST") or not os.environ.get("KUBERNETES_SERVICE_PORT"):
        raise RefusedError(
            "no kubeconfig given, and not in a cluster (KUBERNETES_SERVICE_HOST is not set): "
            "give --kubeconfig FILE, or --manifests PATH to run without an API server",
        )
    # A configuration of its own, and no refresh hook: the agent starts this process again instead.
    config = types.SimpleNamespace(api_key={})
    loader = _package("incluster_config").InClusterConfigLoader(str(token), str(ca), try_refresh_token=False)
    try:
        loader.load_and_set(config)
    except _package("config_exception").ConfigException as error:
        raise RefusedError(f"service account {service_account}: {_first_line(str(error))}") from None
    return {
        "server": config.host,
        "authorization": "Bearer " + loader.token.split(None, 1)[-1].strip(),
        "ca": _text(config.ssl_ca_cert),
        "files": [str(token), str(ca)],
    }


def from_kubeconfig(path: str, master: str) -> dict[str, Any]:
    """The current context of a kubeconfig; `master` replaces its server (CFG-15)."""
    config = _parse(path)
    cluster, user = _current(path, config)
    if master:
        cluster["server"] = master
    if not cluster.get("server"):
        raise RefusedError(f"kubeconfig {path}: the cluster of the current context has no server")
    cluster["server"] = _with_scheme(str(cluster["server"]), cluster)
    base = Path(path).absolute().parent  # not where a symlink leads: client-go has it so
    files = [str(base / cluster[field]) for field in CLUSTER_FILES if cluster.get(field)]
    files += [str(base / user[field]) for field in USER_FILES if user.get(field)]
    for file in files:
        if not os.access(file, os.R_OK):
            raise RefusedError(f"kubeconfig {path}: {file}, which it names, cannot be read")
    with _memory() as directory, _errors() as errors:
        try:
            loader = _package("kube_config").KubeConfigLoader(
                config,
                config_base_path=str(base),
                temp_file_path=directory,
            )
            loader.load_and_set(types.SimpleNamespace(api_key={}))
        except _package("config_exception").ConfigException as error:
            raise RefusedError(f"kubeconfig {path}: {_safe(str(error), config)}") from None
        read = vars(loader)
        if "exec" in user and not read.get("token") and not read.get("cert_file"):
            complaint = _safe(errors[-1] if errors else "it gave neither a token nor a certificate", config)
            command = user["exec"].get("command", "") if isinstance(user["exec"], dict) else ""
            raise RefusedError(f"kubeconfig {path}: exec plugin {command} failed: {complaint}")
        expiry = read.get("expiry")
        return {
            "server": read["host"],
            "authorization": _authorization(read.get("token"), user, base),
            "expires": expiry.timestamp() if isinstance(expiry, dt.datetime) else None,
            "ca": _text(read.get("ssl_ca_cert")),
            "certificate": _text(read.get("cert_file")),
            "key": _text(read.get("key_file")),
            "tls_server_name": read.get("tls_server_name") or "",
            "insecure": not read.get("verify_ssl", True),
            "proxy_url": read.get("proxy") or "",
            "files": [path, *files],
        }


def _parse(path: str) -> dict[str, Any]:
    yaml = importlib.import_module("yaml")
    try:
        config = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise RefusedError(f"kubeconfig {path}: {error.strerror}: give one that this user can read") from None
    except yaml.MarkedYAMLError as error:
        where = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RefusedError(f"kubeconfig {path}: not valid YAML{where}") from None
    except (yaml.YAMLError, UnicodeError):
        raise RefusedError(f"kubeconfig {path}: not valid YAML") from None
    if not isinstance(config, dict):
        raise RefusedError(f"kubeconfig {path}: {'it is empty' if config is None else 'it is no mapping'}")
    return config


def _current(path: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cluster and user of the current context, as they stand in `config`; a context may do without a user."""
    name = config.get("current-context")
    if not name:
        raise RefusedError(f"kubeconfig {path}: no current-context: kubectl config use-context NAME sets it")

    def find(section: str, kind: str, wanted: object) -> dict[str, Any]:
        for item in config.get(section) or []:
            if isinstance(item, dict) and item.get("name") == wanted and isinstance(item.get(kind), dict):
                found: dict[str, Any] = item[kind]
                return found
        raise RefusedError(f"kubeconfig {path}: no {kind} named {str(wanted)!r} among its {section}")

    context = find("contexts", "context", name)
    cluster = find("clusters", "cluster", context.get("cluster"))
    return cluster, find("users", "user", context["user"]) if context.get("user") else {}


def _with_scheme(server: str, cluster: dict[str, Any]) -> str:
    """A server without a scheme is HTTPS where the cluster says anything about TLS, as client-go has it."""
    if "://" in server:
        return server
    tls = ("certificate-authority", "certificate-authority-data", "insecure-skip-tls-verify")
    return f"https://{server}" if any(cluster.get(field) for field in tls) else f"http://{server}"


def _authorization(header: str | None, user: dict[str, Any], base: Path) -> str:
    """The header's value; a token file comes before a token, as in client-go, and its line end isn't the token's."""
    if user.get("tokenFile"):
        return f"Bearer {(base / user['tokenFile']).read_text().strip()}"
    return (header or "").strip()


def _text(file: str | None) -> str:
    return Path(file).read_text() if file else ""


@contextlib.contextmanager
def _memory() -> Iterator[str]:
    """A directory of our own for the files that the package insists on writing, in memory where there is any."""
    shared = "/dev/shm"  # noqa: S108 - the directory made in it is ours alone (mode 0700)
    with tempfile.TemporaryDirectory(prefix="sluice-", dir=shared if os.access(shared, os.W_OK) else None) as directory:
        yield directory


@contextlib.contextmanager
def _errors() -> Iterator[list[str]]:
    """What the package logs as an error: it swallows the failure of an exec plugin, and logs it."""
    heard: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield heard
    finally:
        root.removeHandler(handler)


def _safe(message: str, config: dict[str, Any]) -> str:
    """One line of a foreign message, with what it quotes of the kubeconfig left out."""
    missing = re.search(r"Expected key (\S+) in ", message)
    if missing:
        return f"{missing[1]} is missing"
    # The stderr of a plugin may begin with any text of its own: that line is what says why.
    line = _first_line(message.removeprefix("exec: "))
    for secret in _secrets(config):
        line = line.replace(secret, "***")
    return line


def _secrets(value: Any, *, secret: bool = False) -> Iterator[str]:
    if isinstance(value, dict):
        # The environment of an exec plugin is a list of name and value; the values are its secrets.
        env = "name" in value and "value" in value
        for key, item in value.items():
            yield from _secrets(item, secret=secret or key in SECRETS or (env and key == "value"))
    elif isinstance(value, list):
        for item in value:
            yield from _secrets(item, secret=secret)
    elif secret and isinstance(value, str) and value:
        yield value


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:300]


def environment_proxy(server: str) -> str:
    """The proxy that the environment names for `server`, by the rules of Go's programs: NO_PROXY may hold prefixes."""
    url = urllib.parse.urlsplit(server)
    host = url.hostname or ""
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(url.scheme, "")
    if not proxy or host == "localhost" or urllib.request.proxy_bypass(host):
        return ""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_loopback:
            return ""
        for exception in proxies.get("no", "").split(","):
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(exception.strip(), strict=False):
                    return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def read(kubeconfig: str, master: str, service_account: str) -> dict[str, Any]:
    """The credentials as JSON can carry them.

    Raises:
        RefusedError: there are none.
    """
    if kubeconfig:
        found = from_kubeconfig(kubeconfig, master)
    elif master:
        found = {"server": _with_scheme(master, {})}
    else:
        found = in_cluster(Path(service_account))
    found["server"] = found["server"].rstrip("/")
    return {**found, "proxy_url": found.get("proxy_url") or environment_proxy(found["server"])}


def answer(kubeconfig: str, master: str, service_account: str) -> dict[str, Any]:
    """The credentials, or `error` and the line that says why there are none."""
    try:
        return read(kubeconfig, master, service_account)
    except RefusedError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"cannot read {error.filename}: {error.strerror}" if error.filename else str(error)}
    except Exception as error:  # noqa: BLE001 - its message may quote the kubeconfig: the type has to do
        where = f"kubeconfig {kubeconfig}" if kubeconfig else "credentials"
        return {"error": f"{where}: cannot be used as it stands ({type(error).__name__})"}


def main() -> int:
    """Answer on the descriptor that standard output was; whatever else is printed goes to standard error."""
    answer_to = os.dup(1)
    os.dup2(2, 1)
    # Whoever ends this process early must not leave keys behind: leave by way of the `with` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser()
    parser.add_argument("--kubeconfig", default="")
    parser.add_argument("--master", default="")
    parser.add_argument("--service-account", default="")
    options = parser.parse_args()
    found = answer(options.kubeconfig, options.master, options.service_account)
    with os.fdopen(answer_to, "w") as out:
        json.dump(found, out)
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main())

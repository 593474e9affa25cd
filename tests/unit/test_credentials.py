"""Credentials: where they come from, what is said when there are none, and that nothing secret is."""

import asyncio
import base64
import json
import os
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxy.sources import credentials, credentials_child
from proxy.sources.credentials import Credentials, CredentialsError, Keyring, accept, load
from proxy.sources.progress import Settings
from tests.fakes.certificates import Authority

SECRET = "s3cr3t-t0k3n"
SERVER = "https://10.0.0.1:6443"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("KUBE"):
            monkeypatch.delenv(name)


def kubeconfig(tmp_path, user=None, cluster=None, **top):
    """A kubeconfig as JSON, which is YAML."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": SERVER, **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        **top,
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    return str(path)


def read(path="", master="", service_account="/nowhere"):
    """What the child would answer, without a process for each."""
    return accept(json.dumps(credentials_child.answer(path, master, service_account)).encode())


def by_process(path="", master="", **options):
    return asyncio.run(load(path, master, **options))


def refused(path="", master="", how=read, **options):
    """The one line with which credentials are refused."""
    with pytest.raises(CredentialsError) as caught:
        how(path, master, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    assert SECRET not in repr(caught.value)
    return message


def encoded(path: Path):
    return base64.b64encode(path.read_bytes()).decode()


# --- kubeconfig ----------------------------------------------------------------------------------------------


def test_token_and_authority_from_data(tmp_path, authority):
    cluster = {"certificate-authority-data": encoded(authority.pair.certificate), "tls-server-name": "api.test"}
    found = by_process(kubeconfig(tmp_path, {"token": SECRET}, cluster))
    assert (found.server, found.authorization) == (SERVER, f"Bearer {SECRET}")
    assert found.ca == authority.pair.certificate.read_text()
    assert (found.tls_server_name, found.insecure, found.expires) == ("api.test", False, None)
    assert found.files == (str(tmp_path / "kubeconfig"),)


def test_files_are_relative_to_the_kubeconfig_and_are_watched(tmp_path, authority):
    client = authority.client("node1")
    for source, name in ((authority.pair.certificate, "ca"), (client.certificate, "crt"), (client.key, "key")):
        (tmp_path / name).write_bytes(source.read_bytes())
    user = {"client-certificate": "crt", "client-key": "key"}
    found = read(kubeconfig(tmp_path, user, {"certificate-authority": "ca"}))
    assert (found.certificate, found.key) == (client.certificate.read_text(), client.key.read_text())
    assert found.files == tuple(str(tmp_path / name) for name in ("kubeconfig", "ca", "crt", "key"))


def test_client_certificate_from_data(tmp_path, authority):
    client = authority.client("node2")
    user = {"client-certificate-data": encoded(client.certificate), "client-key-data": encoded(client.key)}
    found = read(kubeconfig(tmp_path, user))
    assert (found.certificate, found.key) == (client.certificate.read_text(), client.key.read_text())


def test_a_token_file_comes_before_a_token_and_its_line_end_is_not_the_tokens(tmp_path):
    (tmp_path / "token").write_text(f"{SECRET}\n")
    found = read(kubeconfig(tmp_path, {"tokenFile": "token", "token": "old"}))
    assert found.authorization == f"Bearer {SECRET}"
    assert str(tmp_path / "token") in found.files


def test_user_and_password_and_no_user_at_all(tmp_path):
    found = read(kubeconfig(tmp_path, {"username": "u", "password": SECRET}))
    assert found.authorization == "Basic " + base64.b64encode(f"u:{SECRET}".encode()).decode()
    context = {"contexts": [{"name": "here", "context": {"cluster": "c"}}]}
    assert read(kubeconfig(tmp_path, **context)).authorization == ""


def test_the_master_replaces_the_kubeconfigs_server_cfg15(tmp_path):
    path = kubeconfig(tmp_path, {"token": SECRET})
    assert read(path, "https://10.9.9.9:443/").server == "https://10.9.9.9:443"


def test_a_master_alone_is_a_server_without_credentials_cfg15():
    assert read("", "10.9.9.9:8080") == Credentials(server="http://10.9.9.9:8080")


def test_a_server_without_a_scheme_is_https_where_the_cluster_speaks_of_tls(tmp_path):
    assert read(kubeconfig(tmp_path, cluster={"server": "api:1"})).server == "http://api:1"
    cluster = {"server": "api:1", "insecure-skip-tls-verify": True}
    assert read(kubeconfig(tmp_path, cluster=cluster)) == Credentials(
        server="https://api:1",
        insecure=True,
        files=(str(tmp_path / "kubeconfig"),),
    )


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ({"current-context": ""}, "no current-context"),
        ({"current-context": "other"}, "no context named 'other' among its contexts"),
        ({"clusters": []}, "no cluster named 'c' among its clusters"),
        ({"clusters": [{"name": "c", "cluster": {"server": ""}}]}, "has no server"),
        ({"users": []}, "no user named 'u' among its users"),
        ({"users": None}, "no user named 'u' among its users"),
        ({"users": [{"name": "u", "user": {"client-key": "nowhere"}}]}, "nowhere, which it names, cannot be read"),
        ({"users": [{"name": "u", "user": {"exec": {"command": "x", "env": [{"value": SECRET}]}}}]}, "apiVersion"),
        (
            {"users": [{"name": "u", "user": {"auth-provider": {"name": "oidc", "config": {"x": SECRET}}}}]},
            "id-token is missing",
        ),
        ({"users": [{"name": "u", "user": {"token": SECRET, "exec": 5}}], "clusters": 7}, "cannot be used"),
        ({"users": [{"name": "u", "user": {"token": f"{SECRET}\nx"}}]}, "characters that no token has"),
        ({"users": [{"name": "u", "user": {"client-certificate-data": "AAAA"}}]}, "cannot be used together"),
        ({"users": [{"name": "u", "user": {"client-key-data": SECRET * 2 + "="}}]}, "cannot be used as it stands"),
        ({"clusters": [{"name": "c", "cluster": {"server": "ftp://x"}}]}, "not an http or https address"),
        ({"clusters": [{"name": "c", "cluster": {"server": SERVER, "proxy-url": "socks5://p"}}]}, "its proxy is"),
    ],
)
def test_what_is_wrong_with_a_kubeconfig_is_one_line_without_secrets(tmp_path, top, said):
    user = {"token": SECRET}
    message = refused(kubeconfig(tmp_path, user, **top))
    assert said in message


def test_a_kubeconfig_that_is_missing_empty_or_no_yaml(tmp_path):
    assert f"kubeconfig {tmp_path}/no: No such file or directory" in refused(str(tmp_path / "no"), how=by_process)
    path = tmp_path / "empty"
    path.write_text("")
    assert refused(str(path)).endswith("it is empty")
    path.write_text(f"users:\n- token: {SECRET}\n  : [\n")
    assert "not valid YAML at line" in refused(str(path))
    path.write_text(SECRET)
    assert refused(str(path)).endswith("it is no mapping")


# --- exec plugins --------------------------------------------------------------------------------------------


def plugin(tmp_path, body):
    """A user whose credentials come from a Python script."""
    script = tmp_path / "plugin"
    script.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    env = [{"name": "PLUGIN_SECRET", "value": SECRET}]
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(script), "env": env}}


ANSWER = """
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": STATUS}))
"""


def test_an_exec_plugin_gives_a_token_and_its_end(tmp_path):
    status = '{"token": os.environ["PLUGIN_SECRET"], "expirationTimestamp": "2030-01-01T00:00:00Z"}'
    found = by_process(kubeconfig(tmp_path, plugin(tmp_path, ANSWER.replace("STATUS", status))))
    assert (found.authorization, found.expires) == (f"Bearer {SECRET}", 1893456000.0)


def test_an_exec_plugin_gives_a_certificate(tmp_path, authority):
    client = authority.client("node3")
    files = {"clientCertificateData": client.certificate.read_text(), "clientKeyData": client.key.read_text()}
    found = read(kubeconfig(tmp_path, plugin(tmp_path, ANSWER.replace("STATUS", repr(files)))))
    assert (found.certificate, found.key) == (files["clientCertificateData"], files["clientKeyData"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('you are logged out', file=sys.stderr); print('more', file=sys.stderr); sys.exit(3)", "logged out"),
        ("print(os.environ['PLUGIN_SECRET'], file=sys.stderr); sys.exit(3)", "***"),
        ("print('no json')", "failed to decode process output"),
        (ANSWER.replace("STATUS", "{}"), "missing token"),
    ],
)
def test_an_exec_plugin_that_fails_is_named_with_the_first_line_of_its_complaint(tmp_path, body, said):
    message = refused(kubeconfig(tmp_path, plugin(tmp_path, body)))
    assert f"exec plugin {tmp_path}/plugin failed: " in message
    assert said in message
    assert "more" not in message


def test_an_exec_plugin_that_is_not_there(tmp_path):
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "/no/such/plugin"}}
    assert "exec plugin /no/such/plugin failed: [Errno 2]" in refused(kubeconfig(tmp_path, user))


def test_a_request_that_needs_new_credentials_outlasts_an_exec_plugin_that_hangs():
    # Else "no answer in time" would be all that is told, and the API server be blamed.
    assert Settings().answer >= credentials.READ_TIMEOUT + 10


def test_an_exec_plugin_that_hangs_is_ended(tmp_path):
    pid = tmp_path / "pid"
    body = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    message = refused(kubeconfig(tmp_path, plugin(tmp_path, body)), how=by_process, read_timeout=2.0)
    assert "took more than 2 s" in message
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid.read_text()}").exists():
        state = Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended; whoever adopted it has yet to notice
            break
        assert time.monotonic() < deadline


def assert_only(before):
    """No directory of a child is left but those from before; children of other tests may have theirs for a moment."""
    deadline = time.monotonic() + 10
    while set(Path("/dev/shm").glob("sluice-*")) - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_that_is_ended_leaves_no_directory_behind(tmp_path):
    before = set(Path("/dev/shm").glob("sluice-*"))
    refused(kubeconfig(tmp_path, plugin(tmp_path, "time.sleep(600)")), how=by_process, read_timeout=2.0)
    assert_only(before)


def test_a_key_leaves_no_file_behind(tmp_path, authority, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    shared = Path("/dev/shm")
    client = authority.client("node4")
    user = {"client-certificate-data": encoded(client.certificate), "client-key-data": encoded(client.key)}
    before = set(shared.glob("sluice-*"))
    found = by_process(kubeconfig(tmp_path, user))
    assert found.ssl_context() is not None
    assert list((tmp_path / "tmp").iterdir()) == []
    assert_only(before)


# --- in the cluster ------------------------------------------------------------------------------------------


@pytest.fixture
def service_account(tmp_path, authority, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    (tmp_path / "token").write_text(f"{SECRET}\n")
    (tmp_path / "ca.crt").write_bytes(authority.pair.certificate.read_bytes())
    return tmp_path


def test_in_a_cluster_the_service_account_is_used_cfg15(service_account):
    found = read(service_account=str(service_account))
    assert (found.server, found.authorization) == ("https://[fd00::1]:443", f"Bearer {SECRET}")
    assert found.files == (str(service_account / "token"), str(service_account / "ca.crt"))


def test_a_service_account_without_a_token(service_account):
    (service_account / "token").unlink()
    message = refused(service_account=str(service_account))
    assert message == f"service account {service_account}: Service token file does not exist."


def test_outside_a_cluster_the_message_says_what_to_do():
    message = refused(how=by_process)
    assert "--kubeconfig FILE" in message
    assert "--manifests PATH" in message


# --- proxies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128"),
        ({"HTTPS_PROXY": "proxy:3128"}, "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy:3128"}, ""),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org, 10.0.0.0/8"}, ""),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "10.0.0.1"}, ""),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "192.168.0.0/16"}, "http://proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, ""),
    ],
)
def test_the_environments_proxy_is_used_by_gos_rules(tmp_path, monkeypatch, environment, proxy):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read(kubeconfig(tmp_path)).proxy_url == proxy


def test_the_kubeconfigs_proxy_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert read(kubeconfig(tmp_path, cluster={"proxy-url": "http://other:1"})).proxy_url == "http://other:1"


# --- the values ----------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_repr():
    secrets = dict.fromkeys(("authorization", "certificate", "key"), SECRET)
    text = repr(Credentials(server=SERVER, proxy_url=f"http://u:{SECRET}@p", **secrets))
    assert SECRET not in text
    assert SERVER in text
    assert SECRET not in f"{Credentials(server=SERVER, **secrets)}"


def test_credentials_are_frozen():
    with pytest.raises(AttributeError):
        Credentials(server=SERVER).server = "x"


def test_tls_from_the_credentials(authority):
    client = authority.client("node5")
    made = Credentials(
        server=SERVER,
        ca=authority.pair.certificate.read_text(),
        certificate=client.certificate.read_text(),
        key=client.key.read_text(),
    )
    context = made.ssl_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert Credentials(server="http://x").ssl_context() is None
    assert Credentials(server=SERVER, insecure=True).ssl_context().verify_mode == ssl.CERT_NONE


def test_wrong_certificates_are_one_line(authority, tmp_path):
    client, other = authority.client("node6"), authority.client("node7")
    encrypted = tmp_path / "encrypted"
    command = ["openssl", "ec", "-in", str(client.key), "-out", str(encrypted), "-aes128", "-passout", "pass:x"]
    subprocess.run(command, check=True, capture_output=True)
    certificate = client.certificate.read_text()
    for wrong in (
        {"ca": "no pem"},
        {"certificate": certificate, "key": other.key.read_text()},
        {"certificate": certificate, "key": encrypted.read_text()},
        {"certificate": certificate},
    ):
        with pytest.raises(CredentialsError) as caught:
            Credentials(server=SERVER, **wrong).ssl_context()
        assert str(caught.value).startswith(SERVER)
        assert "\n" not in str(caught.value)


def test_the_agents_side_never_imports_the_kubernetes_package():
    code = "import sys, proxy.sources.credentials; print([m for m in sys.modules if m.split('.')[0] == 'kubernetes'])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


# --- the keyring ---------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def keyring_of(first, *answers):
    """A keyring, its clock, and the list of its loads, which give the answers one after the other."""
    clock, loads = Clock(), []
    left = list(answers)

    async def again():
        loads.append(clock.now)
        answer = left.pop(0) if left else first
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Keyring(first, again, clock=clock), clock, loads


def bearer(token, **more):
    return Credentials(server=SERVER, authorization=f"Bearer {token}", **more)


def test_credentials_are_renewed_before_they_expire_and_no_earlier():
    keyring, clock, loads = keyring_of(bearer("a", expires=1000.0 + 3600), bearer("b", expires=1000.0 + 7200))

    async def test():
        clock.now += 3299
        assert await keyring.current() == bearer("a", expires=4600.0)
        clock.now += 2
        assert (await keyring.current()).authorization == "Bearer b"

    asyncio.run(test())
    assert loads == [4301.0]


def test_short_lived_credentials_are_renewed_when_a_fifth_is_left():
    keyring, clock, loads = keyring_of(bearer("a", expires=1060.0), bearer("b", expires=1100.0))

    async def test():
        clock.now = 1047.0
        await keyring.current()
        clock.now = 1049.0
        await keyring.current()

    asyncio.run(test())
    assert loads == [1049.0]


def test_a_changed_file_is_noticed_within_a_minute_and_not_looked_at_more_often(tmp_path):
    file = tmp_path / "token"
    file.write_text("a")
    keyring, clock, loads = keyring_of(bearer("a", files=(str(file),)), bearer("bb", files=(str(file),)))

    async def test():
        clock.now += 61
        assert (await keyring.current()).authorization == "Bearer a"
        file.write_text("bb")
        clock.now += 30
        assert (await keyring.current()).authorization == "Bearer a"
        clock.now += 31
        assert (await keyring.current()).authorization == "Bearer bb"
        clock.now += 61
        await keyring.current()

    asyncio.run(test())
    assert len(loads) == 1


def test_a_symlink_that_is_swapped_is_a_changed_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text("same length")
    link = tmp_path / "data"
    link.symlink_to("one")
    keyring, clock, loads = keyring_of(bearer("a", files=(str(link / "token"),)))
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").rename(link)

    async def test():
        clock.now += 61
        await keyring.current()

    asyncio.run(test())
    assert len(loads) == 1


def test_refused_credentials_are_read_again_but_no_storm_comes_of_it():
    first = bearer("a")
    keyring, clock, loads = keyring_of(first, bearer("a"), bearer("b"))

    async def test():
        assert await keyring.refused(first) is first  # just read
        clock.now += 11
        assert await keyring.refused(first) is first  # the same again
        assert await keyring.refused(first) is first
        assert len(loads) == 1
        clock.now += 11
        found = await asyncio.gather(*(keyring.refused(first) for _ in range(4)))
        assert {value.authorization for value in found} == {"Bearer b"}
        assert (await keyring.refused(first)).authorization == "Bearer b"

    asyncio.run(test())
    assert len(loads) == 2


def test_a_renewal_that_fails_keeps_the_old_credentials_and_says_why():
    first = bearer("a")
    keyring, clock, _ = keyring_of(first, CredentialsError("the plugin is gone"), bearer("b"))

    async def test():
        clock.now += 11
        assert await keyring.refused(first) is first
        assert keyring.trouble == "the plugin is gone"
        clock.now += 11
        assert (await keyring.refused(first)).authorization == "Bearer b"
        assert keyring.trouble is None

    asyncio.run(test())

"""Connections to an API server: TLS, client certificates, proxies, credentials from files, and what errors say."""

import asyncio
import contextlib
import json
import re
import time

import pytest
import structlog.testing

from proxy.sources.apiserver import ApiServer
from proxy.sources.base import Resource, Source
from proxy.sources.credentials import Credentials, CredentialsError, Keyring, load
from proxy.sources.transport import Client, UnreachableError
from tests.fakes.api_source import RecordingSink, following, service
from tests.fakes.apiserver import FakeApiServer
from tests.fakes.certificates import Authority
from tests.fakes.polling import eventually

SECRET = "s3cr3t-t0k3n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def serving(authority):
    """The certificate of a server at 127.0.0.1, which is `api.test` as well."""
    return authority.server("IP:127.0.0.1", "DNS:api.test")


def keyring(**values):
    credentials = Credentials(**values)

    async def same():
        return credentials

    return Keyring(credentials, same)


async def version(**values):
    async with Client(keyring(**values)) as client:
        return json.loads(await client.get("/version", {}, patience=5))


def fails(**values):
    """What is said of a request with these credentials; {url} is the server's."""
    with pytest.raises(UnreachableError) as caught:
        asyncio.run(version(**values))
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_server(test, **options):
    async def run():
        async with FakeApiServer(**options) as server:
            server.set(service("web"))
            await asyncio.wait_for(test(server), 20)

    asyncio.run(run())


def ca(authority):
    return authority.pair.certificate.read_text()


# --- TLS -----------------------------------------------------------------------------------------------------


def test_the_servers_certificate_is_checked_against_the_authority(authority, serving, tmp_path):
    async def test(server):
        assert (await version(server=server.url, ca=ca(authority)))["major"] == "1"
        with pytest.raises(UnreachableError, match="the server's certificate is not trusted"):
            await version(server=server.url, ca=ca(Authority(tmp_path)))
        with pytest.raises(UnreachableError, match="the server's certificate is not trusted"):
            await version(server=server.url)
        assert await version(server=server.url, insecure=True)

    with_server(test, tls=authority.serving(serving))


def test_the_name_to_expect_may_be_another_than_the_address(authority):
    only_name = authority.server("DNS:other.test")

    async def test(server):
        with pytest.raises(UnreachableError, match=r"not trusted: .*127\.0\.0\.1"):
            await version(server=server.url, ca=ca(authority))
        assert await version(server=server.url, ca=ca(authority), tls_server_name="other.test")

    with_server(test, tls=authority.serving(only_name))


def test_a_client_certificate_says_who_asks(authority, serving):
    client = authority.client("system:node:node1")
    values = {"certificate": client.certificate.read_text(), "key": client.key.read_text()}

    async def test(server):
        made = keyring(server=server.url, ca=ca(authority), **values)
        async with following(server.url, keyring=made) as follower:
            await eventually(lambda: follower.sink.names() == {"web"})
        assert {request.user for request in server.requests} == {"system:node:node1"}

    with_server(test, tls=authority.serving(serving, ask_clients=True))


def test_a_server_that_wants_a_certificate_and_gets_none_refuses(authority, serving):
    async def test(server):
        async with following(server.url, keyring=keyring(server=server.url, ca=ca(authority))) as follower:
            await eventually(lambda: follower.naps)
            assert "Unauthorized" in follower.source.statistics()[Resource.SERVICES].error

    with_server(test, tls=authority.serving(serving, ask_clients=True))


# --- what errors say -----------------------------------------------------------------------------------------


def test_a_server_that_is_not_there():
    assert fails(server="http://127.0.0.1:1", authorization=SECRET) == (
        "cannot connect to 127.0.0.1:1: connection refused"
    )


def test_a_name_that_does_not_resolve():
    unknown = fails(server="http://no.such.host.invalid:1")
    assert re.fullmatch(r"cannot connect to no\.such\.host\.invalid:1: [a-z ]+", unknown)
    assert fails(server="http://[::1]:1").startswith("cannot connect to [::1]:1: ")


def test_a_server_that_speaks_no_tls_or_only_tls(authority, serving):
    async def plain(server):
        with pytest.raises(UnreachableError, match="TLS: "):
            await version(server=server.url.replace("http:", "https:"), insecure=True)

    async def secure(server):
        with pytest.raises(UnreachableError):
            await version(server=server.url.replace("https:", "http:"))

    with_server(plain)
    with_server(secure, tls=authority.serving(serving))


def test_a_server_that_speaks_no_http():
    async def test():
        async def babble(reader, writer):
            writer.write(b"220 mail.example.org ESMTP\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(UnreachableError, match="the answer is no HTTP"):
                await version(server=f"http://127.0.0.1:{port}")

    asyncio.run(test())


# --- proxies -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def connect_proxy(*, status="200 OK"):
    """An HTTP proxy for CONNECT; yields its port and the requests that it saw."""
    seen = []

    async def serve(reader, writer):
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(f"HTTP/1.1 {status}\r\n\r\n".encode())
        host, _, port = seen[-1].split()[1].rpartition(":")
        if status.startswith("200"):
            there_reader, there_writer = await asyncio.open_connection(host, int(port))
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(copy(reader, there_writer))
                    group.create_task(copy(there_reader, writer))
        writer.close()

    async def copy(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], seen
    finally:
        server.close()


def test_a_proxy_is_used_with_its_user_and_password(authority, serving):
    async def test(server):
        async with connect_proxy() as (port, seen):
            proxy = f"http://user:{SECRET}@127.0.0.1:{port}"
            assert await version(server=server.url, ca=ca(authority), proxy_url=proxy)
            assert seen[0].startswith("CONNECT 127.0.0.1:")
            assert "Proxy-Authorization: Basic " in seen[0]

    with_server(test, tls=authority.serving(serving))


def test_a_proxy_for_a_server_without_tls_sees_its_password_too():
    async def test():
        seen = []

        async def answer(reader, writer):
            seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            assert await version(server="http://10.0.0.1:1", proxy_url=f"http://u:p@127.0.0.1:{port}") == {}
        assert seen[0].startswith("GET http://10.0.0.1:1/version ")
        assert "Proxy-Authorization: Basic dTpw\r\n" in seen[0]

    asyncio.run(test())


def test_a_proxy_that_refuses_is_named_without_its_password():
    async def test():
        async with connect_proxy(status="407 Proxy Authentication Required") as (port, _):
            with pytest.raises(UnreachableError) as caught:
                await version(server="https://10.0.0.1:1", proxy_url=f"http://user:{SECRET}@127.0.0.1:{port}")
            assert str(caught.value) == "the HTTP proxy answered 407"

    asyncio.run(test())
    assert fails(server="http://10.0.0.1:1", proxy_url=f"http://user:{SECRET}@127.0.0.1:1").startswith(
        "cannot connect to 127.0.0.1:1",
    )


# --- from a kubeconfig, end to end ---------------------------------------------------------------------------


def write_kubeconfig(path, server, authority, user):
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [
            {"name": "c", "cluster": {"server": server, "certificate-authority": str(authority.pair.certificate)}},
        ],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(json.dumps(config))
    return str(path)


def test_a_source_from_a_kubeconfig_over_tls(authority, serving, tmp_path):
    client = authority.client("node-b")

    async def test(server):
        user = {"client-certificate": str(client.certificate), "client-key": str(client.key)}
        kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", server.url, authority, user)
        opened = await ApiServer.open(kubeconfig, "", "node1")
        source: Source = opened  # the protocol, for the type checker's sake
        assert source.description == server.url
        sink = RecordingSink()
        task = asyncio.ensure_future(source.run(sink))
        await eventually(lambda: sink.names() == {"web"})
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with_server(test, tls=authority.serving(serving, ask_clients=True))


def test_a_source_without_credentials_is_not_opened(tmp_path):
    with pytest.raises(CredentialsError, match="No such file"):
        asyncio.run(ApiServer.open(str(tmp_path / "no"), "", "node1"))


def test_a_rotated_token_is_used_and_never_logged(tmp_path, authority, serving):
    now = [time.time()]
    (tmp_path / "token").write_text("one-" + SECRET)

    async def test(server):
        kubeconfig = write_kubeconfig(
            tmp_path / "kubeconfig", server.url, authority, {"tokenFile": str(tmp_path / "token")}
        )
        first = await load(kubeconfig, "")
        made = Keyring(first, lambda: load(kubeconfig, ""), clock=lambda: now[0])
        async with following(server.url, keyring=made) as follower:
            await eventually(lambda: len(server.streams) == 4)
            assert {request.user for request in server.requests} == {"one"}
            (tmp_path / "token").write_text("two-" + SECRET)
            server.tokens = {"two-" + SECRET: "two"}
            now[0] += 61
            server.requests.clear()
            for stream in list(server.streams):
                stream.abort()
            server.set(service("new"))
            await eventually(lambda: follower.sink.names() == {"web", "new"})
            await eventually(lambda: len(server.streams) == 4)
            assert {request.user for request in server.requests} == {"two"}
            # And then a token that the server doesn't know.
            server.tokens = {}
            (tmp_path / "token").write_text("three-" + SECRET)
            now[0] += 61
            for stream in list(server.streams):
                stream.abort()
            await eventually(lambda: len(follower.naps) > 8)
            assert SECRET not in repr(follower.source.statistics())

    with structlog.testing.capture_logs() as logs:
        with_server(test, tls=authority.serving(serving), tokens={"one-" + SECRET: "one"})
    assert any(entry["event"] == "lost" for entry in logs)
    assert SECRET not in repr(logs)


def test_credentials_that_cannot_be_renewed_are_a_trouble_until_they_can():
    answers = [CredentialsError("exec plugin x failed: logged out"), None]
    times = iter(range(1_000_000, 100_000_000, 100))

    async def test(server):
        async def again():
            answer = answers.pop(0) if answers else None
            if answer is not None:
                raise answer
            server.tokens["good"] = "node"
            return Credentials(server=server.url, authorization="Bearer good")

        stale = Keyring(
            Credentials(server=server.url, authorization="Bearer bad"), again, clock=lambda: float(next(times))
        )
        async with following(server.url, keyring=stale) as follower:
            troubles = []
            original = follower.sink.trouble

            def heard(origin, subject, reason):
                troubles.append((origin, subject, reason))
                original(origin, subject, reason)

            follower.sink.trouble = heard
            await eventually(lambda: follower.sink.names() == {"web"})
            assert ("api", "credentials", "exec plugin x failed: logged out") in troubles
            assert follower.sink.troubles == {}

    with_server(test, tokens={"other": "x"})

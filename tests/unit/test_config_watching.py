"""Following the configuration file: what a change asks for, and that every way to make one is seen (CFG-54)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from functools import partial

import pytest

from proxy.config import watching
from proxy.config.load import load
from proxy.config.schema import BY_PATH, GROUP_VERSION, KIND, OWN_GROUP_VERSION, OWN_KIND
from proxy.config.watching import Change, Following, classify

HEAD = f"apiVersion: {GROUP_VERSION}\nkind: {KIND}\n"
OWN_HEAD = f"---\napiVersion: {OWN_GROUP_VERSION}\nkind: {OWN_KIND}\n"
DEADLINE = 30.0


def merged(tmp_path, text):
    path = tmp_path / "classified.yaml"
    path.write_text(HEAD + text)
    return load([("config", str(path))]).merged


# --- classify --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "live", "restart"),
    [
        ("", "", [], []),
        ("", "# a comment", [], []),
        ("", "iptables: {syncPeriod: 30s}", [], []),
        ("", "logging: {verbosity: 4}", ["logging.verbosity"], []),
        ("", "iptables: {syncPeriod: 20s}", ["iptables.syncPeriod"], []),
        ("", "nodePortAddresses: [10.0.0.0/8]", ["nodePortAddresses"], []),
        ("", "clusterCIDR: 10.0.0.0/8", ["clusterCIDR"], []),
        ("", "conntrack: {min: 0}", ["conntrack.min"], []),
        ("", f"{OWN_HEAD}driftPolicy: report", ["driftPolicy"], []),
        ("", f"{OWN_HEAD}serviceCIDRs: [10.0.0.0/8]", ["serviceCIDRs"], []),
        ("", "mode: nftables", ["nodePortAddresses"], ["mode"]),
        ("mode: iptables", "", [], ["mode"]),
        ("", "healthzBindAddress: 127.0.0.1", [], ["healthzBindAddress"]),
        ("", "bindAddress: 192.0.2.1", ["bindAddress"], []),
        ("", "bindAddress: fd00::1", ["bindAddress"], ["healthzBindAddress", "metricsBindAddress"]),
        ("", "detectLocalMode: NodeCIDR", [], ["detectLocalMode"]),
        ("", "featureGates: {AllowServiceExternalIPs: false}", [], ["featureGates"]),
        ("", "logging: {verbosity: 4}\nhostnameOverride: b", ["logging.verbosity"], ["hostnameOverride"]),
        ("", f"{OWN_HEAD}iptablesBackend: nft", [], ["iptablesBackend"]),
        ("", f"{OWN_HEAD}userspace: {{workers: 2}}", [], ["userspace.workers"]),
        # sections of modes that are not at work
        ("", "ipvs: {scheduler: lc, syncPeriod: 20s}", [], []),
        ("", "nftables: {syncPeriod: 20s}", [], []),
        ("mode: ipvs", "mode: ipvs\nipvs: {scheduler: lc, syncPeriod: 20s}", ["ipvs.syncPeriod"], ["ipvs.scheduler"]),
    ],
)
def test_which_changes_are_live_and_which_need_a_restart(tmp_path, old, new, live, restart):
    assert classify(merged(tmp_path, old), merged(tmp_path, new)) == Change(tuple(live), tuple(restart))


def test_what_decides_on_sockets_processes_and_identities_is_never_live():
    for path in ("mode", "hostnameOverride", "healthzBindAddress", "metricsBindAddress", "clientConnection.kubeconfig"):
        assert not BY_PATH[path].live


# --- following -------------------------------------------------------------------------------------------------


class Follower:
    """Follows a file in a task of the test, and gives its news one by one."""

    def __init__(self, path):
        again = partial(load, [("config", str(path))])
        self.following = Following(again, again())
        self.news = asyncio.Queue()

    async def __aenter__(self):
        self._task = asyncio.create_task(self._run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self):
        async with contextlib.aclosing(self.following.changes()) as changes:
            async for news in changes:
                self.news.put_nowait(news)

    async def next(self):
        async with asyncio.timeout(DEADLINE):
            return await self.news.get()

    async def next_v(self):
        """The verbosity by the next news, which is of nothing else."""
        news = await self.next()
        assert (news.change, news.problems) == (Change(live=("logging.verbosity",)), ())
        return news.loaded.settings.verbosity

    async def nothing(self):
        """Show that what was done so far is no news: a change after it is the next one."""
        self.following.look()
        news = await self.next()
        assert (news.change, news.problems) == (Change(), ())


def verbosity(number):
    return f"{HEAD}logging: {{verbosity: {number}}}\n"


def run(test, tmp_path):
    async def main():
        path = tmp_path / "config.yaml"
        path.write_text(verbosity(0))
        async with Follower(path) as follower:
            await test(follower, path)

    asyncio.run(main())


def test_a_file_that_is_written_again_is_read_again(tmp_path):
    async def test(follower, path):
        for number in (1, 2, 3):
            path.write_text(verbosity(number))
            assert await follower.next_v() == number

    run(test, tmp_path)


def test_a_misspelt_field_is_told_when_it_is_written(tmp_path):
    async def test(follower, path):
        path.write_text(verbosity(0) + "clusterCIDRs: 10.0.0.0/8\n")
        news = await follower.next()
        assert (news.change, news.problems) == (Change(), ())
        [warning] = news.loaded.warnings
        assert "unknown field clusterCIDRs; did you mean clusterCIDR?" in warning
        path.write_text(verbosity(0))
        assert not (await follower.next()).loaded.warnings

    run(test, tmp_path)


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    async def test(follower, path):
        for number in (1, 2):
            (tmp_path / "new").write_text(verbosity(number))
            (tmp_path / "new").rename(path)
            assert await follower.next_v() == number

    run(test, tmp_path)


def test_a_configmaps_symlink_swap_is_seen(tmp_path):
    """As the kubelet does it: config.yaml -> ..data/config.yaml, ..data -> ..2026_1, and ..data swapped by a rename."""

    def mount(number):
        (tmp_path / f"..2026_{number}").mkdir()
        (tmp_path / f"..2026_{number}" / "config.yaml").write_text(verbosity(number))
        (tmp_path / "..data_tmp").symlink_to(f"..2026_{number}")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    async def main():
        mount(0)
        path = tmp_path / "config.yaml"
        path.symlink_to("..data/config.yaml")
        async with Follower(path) as follower:
            for number in (1, 2):
                mount(number)
                assert await follower.next_v() == number

    asyncio.run(main())


def test_a_half_written_file_is_not_read(tmp_path):
    async def test(follower, path):
        with path.open("w") as file:
            file.write(HEAD)
            file.flush()
            await asyncio.sleep(0.3)  # more than a burst's quiet, less than a writer's pause
            assert follower.news.empty()
            file.write("logging: {verbosity: 1}\n")
        assert await follower.next_v() == 1

    run(test, tmp_path)


def test_a_file_that_cannot_be_used_is_told_once_and_changes_nothing(tmp_path):
    async def test(follower, path):
        path.write_text(verbosity(-1))
        news = await follower.next()
        assert news.problems == (f"{path}:3: logging.verbosity: -1: must be greater than or equal to 0",)
        assert (news.change, news.loaded.settings.verbosity) == (Change(), 0)
        path.write_text(verbosity(-1))
        path.write_text(verbosity(2))
        assert await follower.next_v() == 2
        path.unlink()
        assert (await follower.next()).problems[0].startswith(f"--config {path}: No such file or directory")
        path.write_text(verbosity(3))
        assert await follower.next_v() == 3

    run(test, tmp_path)


def test_when_a_bad_file_is_as_before_again_that_is_told(tmp_path):
    async def test(follower, path):
        path.write_text(verbosity(-1))
        assert (await follower.next()).problems
        path.write_text(verbosity(0))
        news = await follower.next()
        assert (news.problems, news.change) == ((), Change())

    run(test, tmp_path)


def test_what_says_the_same_is_no_news_unless_asked_for(tmp_path):
    async def test(follower, path):
        path.write_text(verbosity(0) + "# a comment\n")
        path.touch()
        await follower.nothing()
        path.write_text(verbosity(1))
        assert await follower.next_v() == 1

    run(test, tmp_path)


def test_a_change_between_the_start_and_the_watch_is_seen(tmp_path):
    async def main():
        path = tmp_path / "config.yaml"
        path.write_text(verbosity(0))
        follower = Follower(path)
        path.write_text(verbosity(1))
        async with follower:
            assert await follower.next_v() == 1

    asyncio.run(main())


def test_without_inotify_it_is_looked_at_now_and_then(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(watching, "Inotify", refuse)
    monkeypatch.setattr(watching, "LOOK_EVERY", 0.05)

    async def test(follower, path):
        (tmp_path / "new").write_text(verbosity(1))
        (tmp_path / "new").rename(path)
        assert await follower.next_v() == 1

    run(test, tmp_path)

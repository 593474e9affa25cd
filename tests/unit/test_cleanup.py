"""`sluice cleanup`, over dataplanes that tell what they hold."""

from __future__ import annotations

import pytest

from proxy import cleanup, cli, modes, takeover
from proxy.lock import HeldError
from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family


class Held:
    """A dataplane of which only the end matters."""

    def __init__(self, found: bool | Exception) -> None:
        self._found = found
        self.closed = False

    def cleanup(self) -> bool:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def close(self) -> None:
        self.closed = True


class Free:
    """A lock that nobody else has."""

    def release(self) -> None:
        pass


def held() -> Free:
    raise HeldError("another sluice runs in this network namespace (process 7)")


@pytest.fixture
def clean(monkeypatch, capsys):
    """Runs it over what each mode holds; returns the code and the lines of both streams."""
    monkeypatch.setattr(modes, "present", lambda: ("nftables", "iptables", "userspace"))

    def run(whose="sluice", take_lock=Free, **found):
        opened = []

        def open_dataplane(name, family):
            what = found.get(name, False)
            if isinstance(what, UnavailableError):
                raise what
            opened.append(Held(what if family is Family.IPV4 or isinstance(what, Exception) else False))
            return opened[-1]

        code = cleanup.main(whose, open_dataplane=open_dataplane, take_lock=take_lock)
        assert all(each.closed for each in opened)
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.fixture
def kube_proxy(monkeypatch):
    """Sets what is there of kube-proxy: its lines, whether it runs, what fails."""

    def there(*lines, running="", fails=""):
        def remove():
            yield from lines
            if fails:
                raise DataplaneError(fails)

        monkeypatch.setattr(takeover, "remove_all", remove)
        monkeypatch.setattr(takeover, "who_runs", lambda *, ports: running if ports else "")

    return there


def test_each_mode_and_family_that_held_something_is_a_line(clean):
    assert clean(nftables=True, userspace=True) == (
        0,
        ["removed what nftables held for IPv4", "removed what userspace held for IPv4"],
        [],
    )


def test_nothing_there_is_no_failure(clean):
    assert clean() == (0, ["nothing of sluice was there"], [])


def test_what_one_mode_refuses_does_not_keep_the_others(clean):
    code, out, err = clean(nftables=DataplaneError("it is stuck"), iptables=True)
    assert (code, out, err) == (2, ["removed what iptables held for IPv4"], ["sluice cleanup: it is stuck"])


def test_a_mode_that_the_node_lacks_holds_nothing(clean, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert clean(nftables=UnavailableError("no nftables"), iptables=True)[0] == 0
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    code, _, err = clean(nftables=UnavailableError("run sluice as root"))
    assert (code, err) == (2, ["sluice cleanup: run sluice as root"])


def test_a_running_agent_is_named_and_nothing_is_touched(clean, kube_proxy):
    code, out, err = clean(take_lock=held, nftables=True)
    assert (code, out) == (2, [])
    [line] = err
    assert "(process 7): stop it first, it would write everything again" in line


def test_cfg_52_kube_proxys_rules_go_on_request_only(clean, kube_proxy):
    kube_proxy("removed theirs")
    assert clean(nftables=True)[1] == ["removed what nftables held for IPv4"]
    assert clean("kube-proxy", nftables=True)[1] == ["removed theirs"]
    assert clean("all", nftables=True)[1] == ["removed what nftables held for IPv4", "removed theirs"]
    kube_proxy()
    assert clean("kube-proxy")[1] == ["nothing of kube-proxy was there"]
    assert clean("all")[1] == ["nothing of sluice or kube-proxy was there"]


def test_kube_proxys_rules_go_beside_a_running_agent_of_ours(clean, kube_proxy):
    """Whose ports are kube-proxy's."""
    kube_proxy("removed theirs", running="another program listens on port 10256")
    assert clean("kube-proxy", take_lock=held)[:2] == (0, ["removed theirs"])
    code, out, err = clean("kube-proxy")
    assert (code, out) == (2, [])
    assert err == [
        "sluice cleanup: another program listens on port 10256: stop it first, it would write everything again"
    ]


def test_what_of_kube_proxy_cannot_be_removed_is_told_after_what_was(clean, kube_proxy):
    kube_proxy("removed one", fails="the other is stuck")
    assert clean("kube-proxy") == (2, ["removed one"], ["sluice cleanup: the other is stuck"])


@pytest.mark.parametrize(
    ("arguments", "whose", "code"),
    [
        (["cleanup"], "sluice", 2),
        (["cleanup", "--of", "kube-proxy"], "kube-proxy", 2),
        (["cleanup", "--of", "all"], "all", 2),
        (["run", "--cleanup"], "sluice", 1),
        (["run", "--cleanup", "--remove-kube-proxy-rules"], "all", 1),
        (["run", "--cleanup", "--remove-kube-proxy-rules=false"], "sluice", 1),
    ],
)
def test_cfg_51_the_command_lines_and_their_exit_codes_on_failure(arguments, whose, code, monkeypatch):
    asked = []
    monkeypatch.setattr(cleanup, "main", lambda *which: asked.append(which) or 2)
    assert cli.main(arguments, name="sluice") == code
    assert asked == [(whose,)]

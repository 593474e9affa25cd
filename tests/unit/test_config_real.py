"""The same files and flags to the real kube-proxy: what it takes is taken here, and what it refuses is refused.

KUBE_PROXY_BIN names it (`make kube-proxy`).  It ends before it does anything, as it is to write its configuration; that
is past reading and checking it.  What an older one than 1.36 refuses or takes otherwise is left out, as is what
docs/differences.md tells of.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from proxy import cli
from proxy.config.schema import GROUP_VERSION, KIND

REAL = os.environ.get("KUBE_PROXY_BIN", "")
HEAD = f"apiVersion: {GROUP_VERSION}\nkind: {KIND}\n"

pytestmark = pytest.mark.skipif(not REAL, reason="KUBE_PROXY_BIN says which kube-proxy is to be asked")

FIELDS = [
    *("mode: ''", "mode: null", "mode: 5", "mode: [a]", "mode: {a: b}", '"mode": iptables', "? mode\n: iptables"),
    *("bindAddress: ''", "bindAddress: '::'", "bindAddress: 1.2.3", "bindAddress: 192.0.2.1"),
    *(
        "healthzBindAddress: 192.0.2.1",
        "healthzBindAddress: '[::1]'",
        "healthzBindAddress: '::1'",
        "metricsBindAddress: x",
    ),
    *(f"enableProfiling: {text}" for text in ("true", "yes", "on", "y", "TRUE", "tRue", "'true'", "1", "null")),
    *(
        f"iptables: {{masqueradeBit: {text}}}"
        for text in ("5", "'5'", "5.0", "5.5", "0x5", "010", "1_0", "1e1", "+5", "-1", "32", "99999999999", "null")
    ),
    *(
        f"iptables: {{syncPeriod: {text}}}"
        for text in (
            "1m",
            "60",
            "'60'",
            "1.5h",
            "1h2m3.5s",
            "-1s",
            "''",
            "1d",
            "' 1s'",
            "1S",
            "1m1",
            ".5s",
            "5.s",
            "+5s",
        )
    ),
    *("iptables: {minSyncPeriod: 1m}", "iptables: null", "iptables: {}", "iptables: []", "iptables: foo", "iptables:"),
    *(f"oomScoreAdj: {text}" for text in ("-5", "1001", "null", "0", "'0'")),
    *(f"conntrack: {{{text}}}" for text in ("maxPerCore: -1", "min: 1.048576e+06", "tcpEstablishedTimeout: -1s")),
    *(
        f"nodePortAddresses: {text}"
        for text in ("[10.0.0.0/8]", "[]", "null", "10.0.0.0/8", "[10.0.0.0]", "[5]", "[null]")
    ),
    *(f"clientConnection: {{{text}}}" for text in ("qps: 5.5", "qps: '5'", "qps: 1e2", "qps: -1", "burst: -1")),
    *(f"featureGates: {text}" for text in ("{AllAlpha: false}", "{AllAlpha: 'false'}", "{NoSuch: true}", "[]", "null")),
    *("configSyncPeriod: 0s", "configSyncPeriod: -1s", "winkernel: null", "unknownField: 5", "Mode: iptables"),
    *("iptables: &p {syncPeriod: 9s}\nipvs: {<<: *p}", "mode: iptables\nmode: ipvs", "mode: !!str iptables"),
    *("---\nmode: ipvs", f"---\n{HEAD}mode: ipvs", "---\nkind: KubeletConfiguration\napiVersion: x/v1", "\tmode: ipvs"),
]
WHOLE = [
    "",
    "[a]",
    HEAD.replace("v1alpha1", "v1"),
    "kind: Foo\napiVersion: v1\n",
    f"\ufeff{HEAD}",
    HEAD.replace("\n", "\r\n"),
]
FLAGS = [
    *(["-v=2"], ["-v", "2"], ["-v2"], ["--v"], ["-v"], ["-v=a"], ["--hostname-override= "], ["--hostname-override="]),
    *(["--masquerade-all"], ["--masquerade-all=false"], ["--masquerade-all", "false"], ["--masquerade-all=yes"]),
    *(
        ["--masquerade-all=T"],
        ["--iptables-sync-period=5"],
        ["--iptables-sync-period=0"],
        ["--iptables-min-sync-period=0"],
    ),
    *([f"--iptables-masquerade-bit={text}"] for text in ("0x5", "05", "0b1", "1_0", " 5", "-1")),
    *(
        [f"--feature-gates={text}"]
        for text in ("AllAlpha=false", "AllAlpha", "", "AllAlpha=f", " AllAlpha = false", "X=true")
    ),
    *(["--nodeport-addresses="], ['--nodeport-addresses="10.0.0.0/8"'], ["--nodeport-addresses=10.0.0.0/8,11.0.0.0/8"]),
    *(["--kube-api-qps=1e2"], ["--kube-api-burst=0x10"], ["--oom-score-adj", "7"], ["--healthz-port=0"], ["--"], ["-"]),
    *(["foo"], ["--", "foo"], [""], ["--nope"], ["-x"], ["--=x"], ["---v=2"], ["--v=2=3"], ["--Proxy-Mode=iptables"]),
]


def taken_there(arguments: list[str], directory: Path) -> bool:
    command = [REAL, f"--write-config-to={directory}/written", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    # Debian's, built by a newer Go than it was made for, falls over its own writing.
    return done.returncode == 0 or b"riteConfigFile" in done.stderr


def taken_here(arguments: list[str]) -> bool:
    return cli.main(["config", "--check", *arguments], name="sluice") == 0


@pytest.mark.parametrize("text", [*(f"{HEAD}{field}\n" for field in FIELDS), *WHOLE])
def test_cfg_10_20_a_file_that_kube_proxy_takes_is_taken_and_no_other(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    arguments = [f"--config={path}"]
    assert taken_here(arguments) == taken_there(arguments, tmp_path)


@pytest.mark.parametrize("arguments", FLAGS, ids=" ".join)
def test_cfg_1_2_a_command_line_that_kube_proxy_takes_is_taken_and_no_other(arguments, tmp_path):
    assert taken_here(arguments) == taken_there(arguments, tmp_path)

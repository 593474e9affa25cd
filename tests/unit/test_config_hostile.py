"""Files that are no configuration: one line for each problem and a code, never a trace, whatever stands in them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy import cli

CONFIG_MAPS = [
    yaml.safe_load(path.read_text())["data"]["config.conf"]
    for path in sorted((Path(__file__).parents[1] / "data" / "configmaps").glob("*.yaml"))
]
SHORT = """apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: "nftables"
featureGates: {"AllAlpha": false}
iptables:
  minSyncPeriod: "1s"
conntrack:
  maxPerCore: 0
nodePortAddresses: [10.0.0.0/8]
logging:
  vmodule: [{filePattern: a, verbosity: 1}]
clientConnection: {qps: 1.5}
---
apiVersion: sluice.internal/v1alpha1
kind: SluiceConfiguration
serviceCIDRs:
- 10.96.0.0/12
"""

WRONG = st.sampled_from(
    [
        "[" * 1100,
        "{a: " * 1100,
        "- " * 1100,
        "&a [*a]",
        "*nobody",
        "9" * 5000,
        "-9223372036854775809",
        "1e999999999",
        "0x" + "f" * 40,
        "9223372036854775807h",
        "2026-11-21T00:00:00Z",
        "!!python/object/apply:os.system [id]",
        "!!binary 'AA=='",
        "!!set {a, b}",
        "? [a]",
        "<<: {mode: x}",
        "{<<: [{syncPeriod: x}, 5, [a]]}",
        "&a {<<: *a}",
        "'",
        '"\\ud800"',
        "| 5",
        "%YAML 9.9",
        "---",
        "...",
        "\t",
        "\x00",
        "\x1b[31m",
        "\u2028",
        "\ufeff",
    ]
)


@st.composite
def mutated(draw):
    """A configuration, short or as of kubeadm or kind, in which a few lines, values or bytes are others."""
    lines = draw(st.sampled_from([SHORT] * 9 + CONFIG_MAPS)).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        what = draw(st.sampled_from(["value", "line", "indent", "double", "drop"]))
        wrong = draw(WRONG | st.text(max_size=8))
        match what:
            case "value":
                lines[at] = lines[at].partition(":")[0] + f": {wrong}"
            case "line":
                lines[at] = wrong
            case "indent":
                lines[at] = " " * draw(st.integers(1, 4)) + lines[at]
            case "double":
                lines.insert(at, draw(st.sampled_from(lines)))
            case "drop":
                lines[at] = ""
    data = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=4))
    return bytes(data)


@given(mutated())
def test_a_mutated_file_ends_in_lines_and_a_code_and_never_in_a_trace(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_bytes(data)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = cli.main(["config", "--check", f"--config={path}"])
    lines = told.getvalue().splitlines()
    assert code == 0 or (code == 1 and lines)
    assert not [line for line in lines if "internal error" in line]
    assert all(line.startswith("sluice config: ") and line.isprintable() for line in lines)


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe", b"[" * 100_000, b"{a: " * 50_000, b"- " * 50_000, b"a: " * 50_000, b"?" * 100_000, b"\n" * 1_000_000],
    ids=["bytes", "lists", "maps", "items", "keys", "marks", "lines"],
)
def test_hostile_files_are_one_line(tmp_path, data, capsys):
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    assert cli.main(["run", f"--config={path}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("sluice run: ")
    assert len(told.splitlines()) == 1
    assert "internal error" not in told

"""The effective configuration in print: with its origins, and so that it loads again (CFG-2, CFG-13)."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from proxy.config import flags
from proxy.config.load import load
from proxy.config.printed import json_with_origins, own, v1alpha1, yaml_with_origins
from proxy.config.schema import BY_PATH, GROUP_VERSION, KIND, OWN_GROUP_VERSION, OWN_KIND

FILE = f"""apiVersion: {GROUP_VERSION}
kind: {KIND}
mode: nftables
logging: {{verbosity: 2}}
---
apiVersion: {OWN_GROUP_VERSION}
kind: {OWN_KIND}
serviceCIDRs: [10.96.0.0/12]
"""


def comments(text):
    """Field name (not path) and origin of each line of the printed YAML."""
    split = [line.split("  # ") for line in text.splitlines() if "  # " in line]
    return {line.split(":")[0].strip(): origin for line, origin in split}


def test_each_value_says_where_it_came_from(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(FILE)
    more = [("hostname-override", "a"), ("drift-policy", "report")]
    found = comments(yaml_with_origins(load([("config", str(path)), *more]).merged))
    assert found["mode"] == f"file {path}:3"
    assert found["verbosity"] == f"file {path}:4"
    assert found["serviceCIDRs"] == f"file {path}:8"
    assert found["hostnameOverride"] == "flag --hostname-override"
    assert found["driftPolicy"] == "flag --drift-policy"
    assert found["nodePortAddresses"] == "mode nftables"
    assert found["clusterCIDR"] == "default"
    assert len(found) > 60


def test_an_ipv6_bind_address_is_named_for_what_follows_from_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(FILE.replace("mode: nftables", "bindAddress: fd00::1"))
    found = comments(yaml_with_origins(load([("config", str(path))]).merged))
    assert found["healthzBindAddress"] == "default of an IPv6 bindAddress"


def test_json_has_both_documents_and_an_origin_for_every_field():
    found = json.loads(json.dumps(json_with_origins(load([("proxy-mode", "nftables")]).merged)))
    assert found["configuration"]["mode"] == "nftables"
    assert found["sluice"]["driftPolicy"] == "repair"
    assert found["origins"].keys() == BY_PATH.keys()
    assert found["origins"]["mode"] == {"kind": "flag", "where": "--proxy-mode"}


def test_cfg_13_only_the_section_of_the_mode_carries_periods():
    for mode, section in (("", "iptables"), ("ipvs", "ipvs"), ("nftables", "nftables")):
        found = v1alpha1(load([("proxy-mode", mode), ("masquerade-all", "true")]).merged)
        carries = {name for name in ("iptables", "ipvs", "nftables") if found[name]["syncPeriod"] != "0s"}
        assert carries == {section}
        masquerading = "nftables" if mode == "nftables" else "iptables"
        assert [name for name in ("iptables", "nftables") if found[name]["masqueradeAll"]] == [masquerading]


def test_the_own_document_is_left_out_where_it_says_nothing():
    assert own(load([]).merged) == {}
    assert own(load([("manifests", "/m")]).merged) == {
        "kind": OWN_KIND,
        "apiVersion": OWN_GROUP_VERSION,
        "manifests": "/m",
    }


# Flags that a file can say as well; zero as a period cannot be said there (CFG-12).
TEXTS = {
    "proxy-mode": ["", "iptables", "nftables", "ipvs"],
    "hostname-override": ["a", "1", "null", "~", "a: b # c", "x\u2028y"],
    "cluster-cidr": ["10.0.0.0/8,fd00::/8"],
    "nodeport-addresses": ["primary", "10.0.0.0/8"],
    "masquerade-all": ["true", "false"],
    "iptables-masquerade-bit": ["0", "31"],
    "iptables-sync-period": ["7.5s", "1h1m1ns"],
    "iptables-min-sync-period": ["1ns", "3s"],
    "ipvs-min-sync-period": ["4s"],
    "healthz-bind-address": ["[fd00::1]:7"],
    "healthz-port": ["7"],
    "feature-gates": ["AllAlpha=true", "AllowServiceExternalIPs=false"],
    "vmodule": ["a=1", '"=2'],
    "conntrack-min": ["0"],
    "service-cidrs": ["10.96.0.0/12"],
    "drift-policy": ["report"],
    "manifests": ["no", "/m"],
}


SPOKEN = st.sampled_from([(name, text) for name, texts in TEXTS.items() for text in texts])


@given(st.lists(SPOKEN, max_size=6, unique_by=lambda each: each[0]))
@pytest.mark.parametrize("form", ["config", "write-config-to"])
def test_what_is_printed_loads_again_as_the_same(tmp_path_factory, form, given_flags):
    loaded = load(given_flags)
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    documents = [loaded.settings.configz, *filter(None, [own(loaded.merged)])]
    text = yaml_with_origins(loaded.merged) if form == "config" else "---\n".join(map(yaml.safe_dump, documents))
    path.write_text(text, encoding="utf-8")
    settings, warnings, _ = load([("config", str(path))])
    expected = loaded.settings
    if form != "config":
        # kube-proxy writes the mode that "" stands for, and with it a file of its own can't say "".
        expected = structs.replace(expected, mode=expected.mode or "iptables")
    assert structs.replace(settings, config="") == expected
    assert not [each for each in warnings if "unknown" in each]


def test_every_flag_that_sets_a_field_names_one_that_exists():
    assert all(flag.path in BY_PATH for flag in flags.FLAGS if flag.path)

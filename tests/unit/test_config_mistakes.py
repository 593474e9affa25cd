"""What is said about a configuration: what has no effect, what nobody knows, what is wrong (CFG-10, CFG-20)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import flags
from proxy.config.document import parse
from proxy.config.errors import ConfigError
from proxy.config.gates import GATES
from proxy.config.load import load
from proxy.config.schema import BY_PATH, GROUP_VERSION, KIND

HEAD = f"apiVersion: {GROUP_VERSION}\nkind: {KIND}\n"


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file, and gives its path."""

    def write(text, head=HEAD):
        path = tmp_path / "config.yaml"
        path.write_text(head + text)
        return str(path)

    return write


def problems_of(*given_flags):
    with pytest.raises(ConfigError) as caught:
        load(given_flags)
    return caught.value.problems


# --- what has no effect ----------------------------------------------------------------------------------------


def test_fields_without_effect_are_named_once_with_the_reason(file):
    text = (
        "clientConnection: {contentType: application/vnd.kubernetes.protobuf, acceptContentTypes: application/cbor}\n"
    )
    text += "featureGates: {LoggingAlphaOptions: true}\nlogging: {vmodule: [{filePattern: a, verbosity: 9}], "
    text += "options: {text: {splitStream: true}}}\nclusterCIDR: 10.0.0.0/8\nipvs: {strictARP: true}\n"
    path = file(text)
    assert load([("config", path)]).warnings == (
        f"{path}:3: clientConnection.acceptContentTypes has no effect: the API server is spoken to in JSON",
        f"{path}:5: logging.vmodule has no effect: its patterns name source files of kube-proxy",
        f"{path}:5: logging.options.text.splitStream has no effect: every line is written at once, to standard error",
    )


def test_flags_without_effect_are_named():
    found = load([("vmodule", "a=9"), ("kube-api-content-type", "application/cbor"), ("kube-api-qps", "7")])
    assert found.warnings == (
        "--vmodule has no effect: its patterns name source files of kube-proxy",
        "--kube-api-content-type has no effect: the API server is spoken to in JSON",
    )


def test_cfg_2_how_often_the_api_server_is_asked(file):
    assert (load([]).settings.api_qps, load([]).settings.api_burst) == (5.0, 10)
    found = load([("config", file("clientConnection: {qps: -1, burst: 3}"))])
    assert (found.settings.api_qps, found.settings.api_burst, found.warnings) == (-1.0, 3, ())
    zero = load([("config", file("clientConnection: {qps: 0, burst: 0}"))]).settings
    assert (zero.api_qps, zero.api_burst) == (5.0, 10)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("cluserCIDR: 10.0.0.0/8", "unknown field cluserCIDR; did you mean clusterCIDR?"),
        ("clustercidr: 10.0.0.0/8", "unknown field clustercidr; did you mean clusterCIDR?"),
        ("syncPeriod: 1s", "unknown field syncPeriod; did you mean iptables.syncPeriod?"),
        ("nftable: {}", "unknown field nftable; did you mean nftables?"),
        ("iptables: {masqueradeAl: true}", "unknown field iptables.masqueradeAl; did you mean iptables.masqueradeAll?"),
        ("zzz: 1", "unknown field zzz"),
        ("? [1]\n: 2", 'unknown field ""'),
    ],
)
def test_unknown_fields_are_a_warning_with_line_and_nearest_name(file, text, hint):
    path = file(text)
    assert load([("config", path)]).warnings == (f"{path}:3: {hint}",)


def test_unknown_fields_are_refused_under_strict_config(file):
    path = file("zzz: 1\nyyy: 2\n")
    problems = problems_of(("config", path), ("strict-config", "true"))
    assert problems == (f"{path}:3: unknown field zzz", f"{path}:4: unknown field yyy")


def test_cfg_10_of_a_key_given_twice_the_last_holds(file):
    path = file("mode: iptables\nmode: nftables\n")
    settings, warnings, _ = load([("config", path)])
    assert settings.mode == "nftables"
    assert warnings == (f"{path}:4: mode is given twice; the last one holds",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("---\n[]", "5: is not a mapping of fields to values"),
        (f"---\n{HEAD}mode: ipvs", f"5: a second {KIND}"),
        ("---\nkind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1\n", '5: no kind "KubeletConfig'),
        ("---\nmode: ipvs\n", "5: lacks apiVersion"),
    ],
)
def test_cfg_10_documents_behind_the_first_are_passed_over_as_in_kube_proxy(file, text, told):
    path = file(f"mode: iptables\n{text}")
    loaded = load([("config", path)])
    [warning] = loaded.warnings
    assert warning.startswith(f"{path}:{told}")
    assert warning.endswith("; this document is passed over")
    assert loaded.settings.mode == "iptables"
    assert len(problems_of(("config", path), ("strict-config", "true"))) == 1


@pytest.mark.parametrize("text", ["kind: SluiceConfigration\n", "kind: KubeProxyConfiguration\n"])
def test_a_document_of_our_own_version_is_never_passed_over(file, text):
    [problem] = problems_of(("config", file(f"---\napiVersion: sluice.internal/v1alpha1\n{text}")))
    assert "is known in version" in problem


# --- feature gates (CFG-63) ------------------------------------------------------------------------------------


def test_cfg_63_the_gates_are_those_that_kube_proxy_told():
    told = {}
    for line in (Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2" / "gates.txt").read_text().splitlines():
        name, value, stage = line.split(" ")
        told[name] = (value == "1", stage)
    assert {name: (gate.default, gate.stage.value) for name, gate in GATES.items()} == told


def test_cfg_20_unknown_gates_are_refused(file):
    path = file("featureGates: {BrandNew: true, ContextualLoging: false}")
    unknown = f"{path}:3: featureGates: unrecognized feature gate: "
    hint, none = "; did you mean ContextualLogging?", "; kube-proxy 1.36 has none of that name: leave it out"
    assert problems_of(("config", path)) == (f'{unknown}"BrandNew"{none}', f'{unknown}"ContextualLoging"{hint}')
    assert problems_of(("feature-gates", "No=true")) == (f'--feature-gates: unrecognized feature gate: "No"{none}',)


def test_gates_of_other_components_are_passed_over_in_silence(file):
    settings, warnings, _ = load([("config", file("featureGates: {SELinuxMount: true, JobManagedBy: true}"))])
    assert (warnings, settings.feature_gates.keys() & {"SELinuxMount", "JobManagedBy"}) == ((), set())


def test_gates_of_the_next_version_are_told_and_passed_over(file):
    path = file("featureGates: {KubeProxyIPVS: true}")
    told = f"{path}:3: featureGates: the feature gate KubeProxyIPVS is newer than v1.36 and has no effect"
    assert load([("config", path)]).warnings == (told,)


def test_gates_that_are_not_obeyed_are_told_where_that_matters():
    def told(text):
        return load([("feature-gates", text)]).warnings

    assert told("ContextualLogging=true,NativeHistograms=true") == ()
    why = "has no effect: lines of the log name what they are about in any case"
    assert told("ContextualLogging=false") == (f"--feature-gates: the feature gate ContextualLogging {why}",)


def test_allalpha_and_allbeta_stand_for_those_that_are_not_named():
    def gates(text):
        found = load([("feature-gates", text)]).settings.feature_gates
        return found["ComponentFlagz"], found["ComponentStatusz"], found["LoggingAlphaOptions"]

    assert gates("AllAlpha=false") == (True, True, False)
    assert gates("AllBeta=false,AllAlpha=true") == (False, False, True)
    assert gates("AllBeta=false,ComponentFlagz=true") == (True, False, False)


# --- mistakes (CFG-20) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mode: nftabels", '3: mode: "nftabels": must be iptables, ipvs, nftables, userspace or blank'),
        ("iptables: {masqueradeBit: 32}", "3: iptables.masqueradeBit: 32: must be within the range [0, 31]"),
        ("iptables: {masqueradeBit: -1}", "3: iptables.masqueradeBit: -1: must be within the range [0, 31]"),
        ("mode: nftables\nnftables: {masqueradeBit: 32}", "4: nftables.masqueradeBit: 32: must be within"),
        ("oomScoreAdj: 1001", "3: oomScoreAdj: 1001: must be within the range [-1000, 1000]"),
        ("oomScoreAdj: -1001", "3: oomScoreAdj: -1001: must be within the range [-1000, 1000]"),
        ("conntrack: {maxPerCore: -1}", "3: conntrack.maxPerCore: -1: must be greater than or equal to 0"),
        ("conntrack: {tcpEstablishedTimeout: -1s}", "conntrack.tcpEstablishedTimeout: -1s: must be greater than or"),
        ("conntrack: {tcpCloseWaitTimeout: -1s}", "conntrack.tcpCloseWaitTimeout: -1s: must be greater than or equal"),
        ("conntrack: {udpStreamTimeout: -1s}", "3: conntrack.udpStreamTimeout: -1s: must be greater than or equal to"),
        ("mode: ipvs\nipvs: {tcpFinTimeout: -1s}", "4: ipvs.tcpFinTimeout: -1s: must be greater than or equal to 0"),
        ("mode: ipvs\nipvs: {udpTimeout: -1s}", "4: ipvs.udpTimeout: -1s: must be greater than or equal to 0"),
        ("mode: ipvs\nipvs: {syncPeriod: -1s}", "4: ipvs.syncPeriod: -1s: must be greater than 0"),
        ("mode: nftables\nnftables: {syncPeriod: -1s}", "4: nftables.syncPeriod: -1s: must be greater than 0"),
        ("conntrack: {min: -1}", "3: conntrack.min: -1: must be greater than or equal to 0"),
        ("conntrack: {udpTimeout: -1s}", "3: conntrack.udpTimeout: -1s: must be greater than or equal to 0"),
        ("mode: ipvs\nipvs: {tcpTimeout: -1s}", "4: ipvs.tcpTimeout: -1s: must be greater than or equal to 0"),
        ("mode: ipvs\nipvs: {excludeCIDRs: [a]}", '4: ipvs.excludeCIDRs[0]: "a": must be a valid CIDR'),
        (
            "mode: ipvs\nipvs: {scheduler: round robin}",
            '4: ipvs.scheduler: "round robin": must be a kernel\'s scheduler',
        ),
        ("mode: ipvs\nipvs: {scheduler: a234567890123456}", "4: ipvs.scheduler: "),
        (
            "mode: ipvs\nipvs: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "4: ipvs.syncPeriod: 1s: must be greater than or equal",
        ),
        ("clientConnection: {burst: -1}", "3: clientConnection.burst: -1: must be greater than or equal to 0"),
        ("configSyncPeriod: -1s", "3: configSyncPeriod: -1s: must be greater than 0"),
        ("iptables: {syncPeriod: -1s}", "3: iptables.syncPeriod: -1s: must be greater than 0"),
        ("iptables: {minSyncPeriod: -1s}", "3: iptables.minSyncPeriod: -1s: must be greater than or equal to 0"),
        (
            "iptables: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "3: iptables.syncPeriod: 1s: must be greater than or equal to iptables.minSyncPeriod, which is 2s",
        ),
        ("bindAddress: x", '3: bindAddress: "x": not a valid textual representation of an IP address'),
        ("healthzBindAddress: '[fd00::5]'", '3: healthzBindAddress: "[fd00::5]": must be IP:port'),
        ("metricsBindAddress: localhost:1", '3: metricsBindAddress: "localhost:1": must be a valid IP'),
        ("metricsBindAddress: 127.0.0.1:0", '3: metricsBindAddress: "127.0.0.1:0": must be a valid port'),
        ("metricsBindAddress: 127.0.0.1:65536", "must be a valid port"),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "3: nodePortAddresses: can't use both 'primary' and CIDRs"),
        ("nodePortAddresses: [10.0.0.0]", '3: nodePortAddresses[0]: "10.0.0.0": must be a valid CIDR'),
        ("detectLocalMode: Foo", '3: detectLocalMode: "Foo" is not supported; supported values: ClusterCIDR'),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface: must not be empty"),
        ("detectLocalMode: InterfaceNamePrefix", "detectLocal.interfaceNamePrefix: must not be empty"),
        ("clusterCIDR: 10.0.0.0/33", '3: clusterCIDR[0]: "10.0.0.0/33": must be a valid CIDR'),
        ("clusterCIDR: 10.0.0.0/8,11.0.0.0/8", "must be one CIDR, or one IPv4 and one IPv6 CIDR"),
        ("featureGates: {NFTablesProxyMode: false}", "3: featureGates.NFTablesProxyMode: cannot be false"),
        ("featureGates: {MultiCIDRServiceAllocator: false}", "featureGates.MultiCIDRServiceAllocator: cannot be false"),
        ("featureGates: {PreferSameTrafficDistribution: false}", "PreferSameTrafficDistribution: cannot be false"),
        ("hostnameOverride: '  '", "3: hostnameOverride: empty hostname-override is invalid"),
        ("logging: {format: xml}", '3: logging.format: "xml": must be text or json'),
        (
            "logging: {format: json}\nfeatureGates: {LoggingBetaOptions: false}",
            "3: logging.format: json needs the feature gate LoggingBetaOptions",
        ),
        (
            "logging: {format: json, vmodule: [{filePattern: a, verbosity: 1}]}",
            "3: logging.vmodule: only supported for text log format",
        ),
        ("logging: {vmodule: [{verbosity: 1}]}", '3: logging.vmodule[0]: "": a file pattern must not be empty'),
        ("logging: {vmodule: [{filePattern: a=b}]}", '3: logging.vmodule[0]: "a=b": a file pattern must not be empty'),
        ("logging: {verbosity: -1}", "3: logging.verbosity: -1: must be greater than or equal to 0"),
        ("logging: {flushFrequency: '5'}", '3: logging.flushFrequency: "5" is not a duration'),
        (
            "logging: {options: {text: {splitStream: true}}}",
            "3: logging.options.text.splitStream: needs the feature gate LoggingAlphaOptions",
        ),
        (
            "logging: {options: {json: {infoBufferSize: 64Ki}}}",
            "3: logging.options.json.infoBufferSize: needs the feature gate LoggingAlphaOptions",
        ),
        (
            "logging: {options: {json: {infoBufferSize: 64Kb}}}",
            '3: logging.options.json.infoBufferSize: "64Kb" is not a quantity',
        ),
        ("showHiddenMetricsForVersion: '1.34'", '3: showHiddenMetricsForVersion: "1.34": must be 1.35, the previous'),
        # of another type
        ("mode: [nftables]", "3: mode: must be a string, not a list"),
        ("iptables: 5", "3: iptables: must be a section of fields"),
        ("iptables: {masqueradeBit: '5'}", "3: iptables.masqueradeBit: must be a whole number, not text"),
        ("iptables: {syncPeriod: 5}", '3: iptables.syncPeriod: "5" is not a duration'),
        ("iptables: {masqueradeAll: 'true'}", "3: iptables.masqueradeAll: must be true or false, without quotes"),
        ("nodePortAddresses: 10.0.0.0/8", "3: nodePortAddresses: must be a list of strings"),
        ("nodePortAddresses: [[]]", "3: nodePortAddresses: must hold strings only"),
        ("featureGates: [a]", "3: featureGates: must be a map of names to true or false"),
        ("logging: {vmodule: [5]}", "3: logging.vmodule: must hold items with filePattern and verbosity"),
        # no configuration at all
        ("mode: [", "expected the node content"),
        ("a: b: c", "3: is not valid YAML: mapping values are not allowed here"),
        ("x: \x07", "special characters are not allowed"),
    ],
)
def test_cfg_20_mistakes_in_a_file_are_named_with_their_line(file, text, problem):
    path = file(text)
    problems = problems_of(("config", path))
    assert len(problems) == 1
    assert problem in problems[0]
    if problem[0].isdigit():
        assert problems[0].startswith(f"{path}:{problem}")


def test_cfg_20_every_mistake_is_told_at_once(file):
    path = file("mode: x\nbindAddress: y\noomScoreAdj: 5000\n")
    assert [each.removeprefix(f"{path}:")[0] for each in problems_of(("config", path))] == ["3", "5", "4"]


def test_cfg_20_mistakes_in_flags_are_named_by_the_flag():
    assert problems_of(("cluster-cidr", "x")) == ('--cluster-cidr[0]: "x": must be a valid CIDR',)
    assert problems_of(("v", "x"), ("masquerade-all", "maybe")) == (
        '--v: "x" is not a whole number',
        '--masquerade-all: "maybe" is not true or false',
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b"\xff", "is not UTF-8"), (b"[" * 100_000, "nested too deeply"), (b" " * (2 << 20), "larger")],
)
def test_files_that_are_no_text_are_named(tmp_path, content, reason):
    path = tmp_path / "config"
    path.write_bytes(content)
    (problem,) = problems_of(("config", str(path)))
    assert str(path) in problem
    assert reason in problem


def test_files_that_cannot_be_read_are_named(tmp_path):
    why = {"none": "No such file or directory: give the path of a file that is there"}
    why["."] = "Is a directory: give the path of the file in it"
    for name, reason in why.items():
        assert problems_of(("config", str(tmp_path / name))) == (f"--config {tmp_path / name}: {reason}",)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["-1s", "5s", "10.0.0.0/8", "primary", "1.2.3.4:5", "nftables", "ClusterCIDR", ":", "%", "::/0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def objects(draw):
    """A configuration with wrong and right values in known and unknown places."""
    result = {}
    for path in draw(st.lists(st.sampled_from(sorted(BY_PATH)), max_size=4, unique=True)):
        place = result
        *sections, name = path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = draw(values)
    return (
        result
        | draw(st.dictionaries(st.text(max_size=6), values, max_size=1))
        | {"apiVersion": GROUP_VERSION, "kind": KIND}
    )


@given(objects())
def test_any_object_is_a_configuration_or_lines_of_complaint(found):
    check_text(yaml.safe_dump(found, allow_unicode=True))


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_lines_of_complaint(text):
    check_text(HEAD + text)


def check_text(text):
    """Whatever stands in a file comes to values or to complaints of one line each, and never to anything else."""
    try:
        found = parse(text, "config.yaml")
    except ConfigError as error:
        lines = error.problems
        assert lines
    else:
        lines = found.unknown
        assert set(found.values) <= set(BY_PATH)
    assert all(line.isprintable() and line.startswith("config.yaml") for line in lines)


@given(
    found=objects(), more=st.lists(st.tuples(st.sampled_from(sorted(flags.BY_NAME)), st.text(max_size=8)), max_size=3)
)
def test_any_configuration_loads_or_complains(tmp_path_factory, found, more):
    path = tmp_path_factory.getbasetemp() / "generated.yaml"
    path.write_text(yaml.safe_dump(found), encoding="utf-8")
    try:
        _, lines, _ = load([("config", str(path)), *(each for each in more if each[0] != "config")])
    except ConfigError as error:
        lines = error.problems
        assert lines
    assert all(line.isprintable() for line in lines)

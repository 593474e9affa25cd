"""The pure parts of tests/vm: which kernel, what is in its initramfs, how QEMU is called, how a run is judged."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.vm import initramfs, kernels
from tests.vm.__main__ import main
from tests.vm.initramfs import Entry, archive, load_order
from tests.vm.kernels import Package, candidate, is_stock, matching
from tests.vm.machine import BROKEN, TIMED_OUT, Counts, Machine, Verdict, counts, script, settings, tail, verdict

PLAN = Machine(
    qemu="qemu", image=Path("/k/vmlinuz"), initramfs=Path("/i.cpio"), console=Path("/r/console.log"), share=Path("/r")
)


def after(line, option):
    return [line[position + 1] for position, each in enumerate(line) if each == option]


# --- which kernel ------------------------------------------------------------------------------------------------

OFFERED = [
    "linux-image-6.12-amd64",
    "linux-image-6.12.9+deb12-amd64",
    "linux-image-6.12.117+deb12-amd64",
    "linux-image-6.12.117+deb12-amd64-unsigned",
    "linux-image-6.12.117+deb12-cloud-amd64",
    "linux-image-6.12.117+deb12-rt-amd64",
    "linux-image-6.1.0-47-amd64",
    "linux-image-6.1.0-50-amd64",
    "linux-image-6.1.0-50-amd64-dbg",
    "linux-image-amd64",
]


def test_the_newest_stock_kernel_of_a_version_is_first_and_special_flavours_never_are():
    assert matching(OFFERED, "6.12") == ["linux-image-6.12.117+deb12-amd64", "linux-image-6.12.9+deb12-amd64"]
    assert matching(OFFERED, "6.1") == ["linux-image-6.1.0-50-amd64", "linux-image-6.1.0-47-amd64"]
    assert matching(OFFERED, "6.2") == []
    assert matching(OFFERED, "")[0] == "linux-image-6.12.117+deb12-amd64"


def test_a_package_that_only_depends_on_a_kernel_is_none():
    assert is_stock("linux-image-6.1.0-50-amd64")
    assert not is_stock("linux-image-6.12-amd64")
    assert not is_stock("linux-image-amd64")


def test_the_candidate_is_read_from_apts_policy():
    assert candidate("x:\n  Installed: (none)\n  Candidate: 6.1.192-2\n  Version table:\n") == "6.1.192-2"
    assert candidate("x:\n  Installed: (none)\n  Candidate: (none)\n") is None
    assert candidate("") is None


def test_the_cache_has_a_directory_per_package_and_version(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Package("linux-image-6.1.0-50-amd64", "1:6.1-2").key == "linux-image-6.1.0-50-amd64_1%3a6.1-2"
    assert kernels.cache() == tmp_path / "sluice" / "vm"
    for name in ("linux-image-6.1.0-50-amd64_6.1.176-1", "linux-image-6.12.9+deb12-amd64_6.12.9-1", "unpacking-x"):
        (kernels.cache() / name).mkdir(parents=True)
    assert [path.name for path in kernels._kept("6.1")] == ["linux-image-6.1.0-50-amd64_6.1.176-1"]
    assert [path.name for path in kernels._kept("linux-image-6.12.9+deb12-amd64")] == [
        "linux-image-6.12.9+deb12-amd64_6.12.9-1"
    ]
    assert kernels._kept("5.10") == []


# --- the initramfs -----------------------------------------------------------------------------------------------

DEPENDENCIES = """\
kernel/net/9p/9pnet.ko.xz:
kernel/net/9p/9pnet_virtio.ko.xz: kernel/drivers/virtio/virtio.ko.xz kernel/net/9p/9pnet.ko.xz
kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs.ko.xz kernel/fs/fscache.ko.xz
kernel/drivers/char/virtio-rng.ko.xz: kernel/drivers/virtio/virtio.ko.xz
"""


def test_modules_are_loaded_after_what_they_need_and_once():
    order = load_order(["9pnet_virtio", "9p", "virtio_rng"], DEPENDENCIES, "")
    assert [Path(each).name.removesuffix(".ko.xz") for each in order] == [
        "9pnet",
        "virtio",
        "9pnet_virtio",
        "fscache",
        "netfs",
        "9p",
        "virtio-rng",
    ]


def test_a_built_in_module_needs_no_file_and_a_missing_one_is_named():
    assert load_order(["virtio_pci"], DEPENDENCIES, "kernel/drivers/virtio/virtio_pci.ko\n") == []
    with pytest.raises(LookupError, match="no module overlay"):
        load_order(["overlay"], DEPENDENCIES, "")


def test_cpio_reads_the_archive(tmp_path):
    if shutil.which("cpio") is None:
        pytest.skip("needs the program cpio")
    entries = [
        Entry("bin", stat.S_IFDIR | 0o755),
        Entry("bin/odd", stat.S_IFREG | 0o755, b"12345"),
        Entry("init", stat.S_IFREG | 0o644, b"#!"),
    ]
    data = archive(entries)
    done = subprocess.run(["cpio", "-idm", "--quiet"], cwd=tmp_path, input=data, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "bin" / "odd").read_bytes() == b"12345"
    assert (tmp_path / "bin" / "odd").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "init").read_bytes() == b"#!"


def test_every_record_of_the_archive_is_aligned():
    for size in range(5):
        data = archive([Entry("x" * size or "y", stat.S_IFREG | 0o644, bytes(size))])
        assert len(data) % 4 == 0
        assert data.count(b"070701") == 2
        assert data.index(b"070701", 1) % 4 == 0


def test_the_initramfs_names_the_modules_in_their_order(tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    listed = []
    for name in initramfs.MODULES:
        (modules / f"{name}.ko").write_bytes(name.encode())
        listed.append(f"{name}.ko:\n")
    (modules / "modules.dep").write_text("".join(listed))
    (modules / "modules.builtin").write_text("")
    for name in ("busybox", "init"):
        (tmp_path / name).write_text(name)
    data = initramfs.build(tmp_path / "busybox", tmp_path / "init", modules)
    assert "".join(f"{name}.ko\n" for name in initramfs.MODULES).encode() in data


# --- QEMU --------------------------------------------------------------------------------------------------------


def test_the_hosts_root_is_read_only_and_only_the_shared_directory_is_not():
    [host, share] = after(PLAN.command(), "-virtfs")
    assert "path=/," in host
    assert "readonly=on" in host
    assert "path=/r," in share
    assert "readonly" not in share


def test_emulation_is_asked_for_by_name_and_a_panic_ends_the_machine():
    line = PLAN.command()
    assert after(line, "-accel")[0].startswith("tcg")
    assert "-no-reboot" in line
    assert "panic=-1" in after(line, "-append")[0].split()
    kvm = PLAN._replace(accelerator="kvm").command()
    assert (after(kvm, "-accel"), after(kvm, "-cpu")) == (["kvm"], ["host"])


def test_a_probe_boots_no_further_than_the_initramfs():
    line = PLAN._replace(share=None).command()
    assert "sluice.probe" in after(line, "-append")[0].split()
    assert "-virtfs" not in line
    assert "sluice.probe" not in after(PLAN.command(), "-append")[0]


def test_a_shell_gets_a_terminal_and_a_command_does_not():
    assert "virtserialport,chardev=terminal" in after(PLAN.command(), "-device")
    assert "virtconsole,chardev=terminal" in after(PLAN._replace(terminal=True).command(), "-device")


def test_commas_in_paths_are_escaped():
    line = PLAN._replace(share=Path("/a,b"), console=Path("/a,b/c")).command()
    assert any("path=/a,,b," in each for each in after(line, "-virtfs"))
    assert any(each.endswith("path=/a,,b/c") for each in after(line, "-chardev"))


def test_the_script_runs_the_command_as_it_was_given(tmp_path):
    place = tmp_path / "with space"
    place.mkdir()
    text = script(["sh", "-c", 'pwd; echo "$A" "$1"; exit 7', "x", "it's"], place, {"A": "one $two"})
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (7, [str(place), "one $two it's"])


def test_settings_are_shell():
    text = settings(Path("/it's/modules"), 0.2)
    done = subprocess.run(["sh", "-c", f'{text}echo "$MODULES $PATIENCE"'], capture_output=True, text=True, check=True)
    assert done.stdout == "/it's/modules 1\n"


# --- how it ended ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "code"), [([], 2), (["--if-available"], 0)])
def test_a_machine_that_cannot_have_its_packages_says_so_in_one_line(options, code, monkeypatch, capsys):
    def fail() -> None:
        raise kernels.KernelError("cannot install qemu-system-x86: no network")

    monkeypatch.setattr(kernels, "install_programs", fail)
    assert main([*options, "true"]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("cannot install qemu-system-x86: no network")


def test_the_commands_exit_code_counts_whatever_else_happened():
    assert verdict("0\n", "", timed_out=False) == Verdict(0)
    assert verdict("5\n", "Kernel panic", timed_out=True) == Verdict(5)


def test_a_machine_without_an_exit_code_is_never_a_success():
    assert verdict(None, "", timed_out=True).code == TIMED_OUT
    assert verdict("", "", timed_out=False).code == BROKEN
    panic = verdict(None, "[ 1.0] ok\n[ 2.0] Kernel panic - not syncing: no init\n[ 3.0] end", timed_out=False)
    assert panic == Verdict(BROKEN, "[ 2.0] Kernel panic - not syncing: no init")
    init = verdict(None, "sluice-vm: module 9p.ko does not load\n", timed_out=False)
    assert init == Verdict(BROKEN, "sluice-vm: module 9p.ko does not load")


def test_junit_counts_are_added_up_over_suites():
    text = """<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"/>
    <testsuite errors="0" failures="0" skipped="0" tests="4"/></testsuites>"""
    assert counts(text) == Counts(passed=8, failed=3, skipped=3)
    assert str(counts(text)) == "8 passed, 3 failed, 3 skipped"
    assert counts("<testsuites><testsuite") is None
    assert counts("") is None


def test_the_tail_of_a_console_is_its_last_lines_without_carriage_returns():
    assert tail("a\r\nb\r\nc\r\n", 2) == "b\nc"

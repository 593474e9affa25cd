"""A directory or a file of manifests, read again and again."""

import os
from pathlib import Path

import pytest

from proxy.sources import manifest_files
from proxy.sources.manifest_files import Tools, Unreadable, scan
from proxy.sources.manifest_loading import load
from proxy.sources.yaml_children import Converter


class Counting:
    """A converter that counts."""

    def __init__(self):
        self.texts = []

    def __call__(self, data):
        self.texts.append(data)
        return Converter().convert(data)


def service(name, port=80):
    return (
        "apiVersion: v1\nkind: Service\n"
        f"metadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
    )


def old(path: Path):
    """Make a file look as if it was written long ago."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**10))


def test_a_directory_is_its_manifests(tmp_path):
    for name in ("a.yaml", "b.yml", "c.json", "d.txt", ".hidden.yaml", "e.yaml~"):
        text = service(name[0].strip(".~") or "hidden")
        (tmp_path / name).write_text('{"apiVersion": "v1", "kind": "List", "items": []}' if name == "c.json" else text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.yaml").write_text(service("f"))
    loaded = load(tmp_path)
    assert [each.metadata.name for each in loaded.services] == ["a", "b"]
    assert not loaded.problems


def test_a_file_counts_under_any_name(tmp_path):
    (tmp_path / "dump.txt").write_text(service("web"))
    assert [each.metadata.name for each in load(tmp_path / "dump.txt").services] == ["web"]


def test_an_empty_directory_is_empty_and_a_missing_one_is_not(tmp_path):
    assert load(tmp_path).services == ()
    with pytest.raises(Unreadable, match=r"/nowhere: No such file or directory$"):
        load(tmp_path / "nowhere")


def test_what_is_no_regular_file_is_reported_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "null.yaml").symlink_to("/dev/zero")
    (tmp_path / "dir.yaml").mkdir()
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    (tmp_path / "web.yaml").write_text(service("web"))
    loaded = load(tmp_path)
    assert [each.metadata.name for each in loaded.services] == ["web"]
    assert [str(problem) for problem in loaded.problems] == [
        "dangling.yaml: No such file or directory",
        "dir.yaml: not a regular file: passed over",
        "fifo.yaml: not a regular file: passed over",
        "null.yaml: not a regular file: passed over",
    ]


def test_a_file_that_may_not_be_read_keeps_what_was_valid(tmp_path, monkeypatch):
    path = tmp_path / "web.yaml"
    path.write_text(service("web"))
    tools = Tools(Converter().convert)
    before = scan(tmp_path, {}, tools)

    def refuse(*_):
        raise PermissionError(13, "")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        path.write_text(service("other"))
        after = scan(tmp_path, before, tools)
    assert after["web.yaml"].trouble == "Permission denied"
    assert after["web.yaml"].content == before["web.yaml"].content
    assert scan(tmp_path, after, tools)["web.yaml"].trouble is None


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    for name, size in (("a.json", 257 << 20), ("b.yaml", 65 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert [str(problem) for problem in load(tmp_path).problems] == [
        "a.json: larger than 256 MiB: split it",
        "b.yaml: larger than 64 MiB: split it, or write it as JSON",
    ]


def test_names_are_printed_safely(tmp_path):
    (tmp_path / "a\x1b[31m\n.yaml").write_text("[")
    (problem,) = load(tmp_path).problems
    assert problem.subject == r"'a\x1b[31m\n.yaml'"
    assert problem.reason.startswith("line 2, column 1: ")


def test_only_what_changed_is_parsed_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(service(name))
        old(tmp_path / f"{name}.yaml")
    counting = Counting()
    first = scan(tmp_path, {}, Tools(counting))
    assert len(counting.texts) == 2
    second = scan(tmp_path, first, Tools(counting))
    assert len(counting.texts) == 2
    assert second["a.yaml"] is first["a.yaml"]

    (tmp_path / "b.yaml").write_text(service("b", port=81))
    third = scan(tmp_path, second, Tools(counting))
    assert len(counting.texts) == 3
    assert third["a.yaml"] is first["a.yaml"]
    assert third["b.yaml"] != first["b.yaml"]


def test_a_file_that_changed_just_before_it_was_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    # The clock of file times is coarse: two versions of one size can look the same.
    monkeypatch.setattr(manifest_files, "_signature", lambda _: (0, 0, 0, 0, 0))

    def found(state):
        return [str(identity) for identity in state["a.yaml"].content.objects]

    tools = Tools(Converter().convert)
    path.write_text(service("a"))
    first = scan(tmp_path, {}, tools)
    path.write_text(service("b"))
    old(path)
    second = scan(tmp_path, first, tools)
    assert found(second) == ["Service default/b"]
    path.write_text(service("c"))
    assert scan(tmp_path, second, tools)["a.yaml"] is second["a.yaml"]


def test_a_file_that_is_written_meanwhile_keeps_what_was_known(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    first = scan(tmp_path, {}, Tools(Converter().convert))
    path.write_text(service("b"))
    numbers = iter(range(10))
    for writes in (lambda _: None, lambda _: next(numbers)):
        tools = Tools(Converter().convert, writes)
        assert scan(tmp_path, first, tools)["a.yaml"] is first["a.yaml"]
        assert scan(tmp_path, {}, tools) == {}
        with pytest.raises(Unreadable, match="still being written"):
            scan(path, {}, tools)


def test_a_wrong_file_keeps_what_was_valid_until_it_is_right_or_gone(tmp_path):
    tools = Tools(Converter().convert)
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    valid = scan(tmp_path, {}, tools)
    path.write_text("kind: [\n")
    wrong = scan(tmp_path, valid, tools)
    assert wrong["a.yaml"].content == valid["a.yaml"].content
    assert wrong["a.yaml"].trouble.startswith("line 2, column 1: ")
    path.write_text(service("b"))
    right = scan(tmp_path, wrong, tools)["a.yaml"]
    assert right.trouble is None
    assert [str(identity) for identity in right.content.objects] == ["Service default/b"]
    path.unlink()
    assert scan(tmp_path, wrong, tools) == {}

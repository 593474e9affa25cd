"""Manifests as a source: real files, real inotify, a sink that records."""

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
from asyncinotify import Inotify
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.objects import Key
from proxy.sources import manifests
from proxy.sources.base import Resource
from proxy.sources.manifest_loading import load
from proxy.sources.manifests import ManifestSource
from proxy.sources.watching import entries_on_the_way

DEADLINE = 10


class Recorder:
    """A sink that keeps what it is told, and how."""

    def __init__(self):
        self.objects = {}
        self.calls = []
        self.troubles = {}
        self.asked = []
        self.doubts = 0
        self.believe = True

    def prepare(self, resource, objects):
        assert resource not in self.objects, "only a first list is prepared"

    def replace(self, resource, objects):
        self.objects[resource] = {each.key: each for each in objects}
        self.calls.append(("replace", resource, None))

    def set(self, resource, value):
        assert self.objects[resource].get(value.key) != value, "only differences are told"
        self.objects[resource][value.key] = value
        self.calls.append(("set", resource, value.key))

    def delete(self, resource, key):
        del self.objects[resource][key]
        self.calls.append(("delete", resource, key))

    def plausible(self, resource, keys, now):  # the sink's clock is the test
        assert resource is Resource.SERVICES
        missing = len(self.objects[resource].keys() - set(keys))
        self.doubts += not self.believe and missing > 0
        self.asked.append(missing)
        return self.believe or not missing

    def trouble(self, origin, subject, reason):
        assert origin == "manifests"
        if reason is None:
            del self.troubles[subject]
        else:
            self.troubles[subject] = reason

    def ports(self):
        """Of each Service its port."""
        services = self.objects.get(Resource.SERVICES, {}).values()
        return {each.metadata.name: each.spec.ports[0].port for each in services}


async def until(condition):
    """Wait for a condition, as long as is reasonable."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.003)


@contextlib.asynccontextmanager
async def following(path, *, node="node1", **options):
    sink = Recorder()
    task = asyncio.create_task(ManifestSource(path, node, **options).run(sink))
    try:
        yield sink
        assert not task.done() or task.result() is None
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def follow(path, story, **options):
    """Run `story(sink)` while a source follows `path`."""

    async def main():
        async with following(path, **options) as sink:
            await story(sink)

    asyncio.run(main())


def service(name="web", port=80, ip="10.96.0.1"):
    return (
        "apiVersion: v1\nkind: Service\n"
        f"metadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: {port}}}]}}\n"
    )


def many(count, first=0):
    return "---\n".join(service(f"web-{number}") for number in range(first, first + count))


def replace(path: Path, text):
    """As careful writers do: a new file takes the place of the old one."""
    temporary = path.with_name(".new")
    temporary.write_text(text)
    temporary.rename(path)


def test_all_resources_are_listed_first_and_then_differences_told(tmp_path):
    (tmp_path / "web.yaml").write_text(service("a") + "---\n" + service("b"))
    nodes = "".join(f"apiVersion: v1\nkind: Node\nmetadata: {{name: node{n}}}\n---\n" for n in (1, 2))
    (tmp_path / "nodes.yaml").write_text(nodes)

    async def story(sink):
        await until(lambda: len(sink.objects) == 4)
        assert {call[0] for call in sink.calls} == {"replace"}
        assert {call[1] for call in sink.calls} == set(Resource)
        assert sink.ports() == {"a": 80, "b": 80}
        assert list(sink.objects[Resource.NODES]) == [Key("", "node1")]
        sink.calls.clear()
        (tmp_path / "web.yaml").write_text(service("a", port=81) + "---\n" + service("c"))
        await until(lambda: sink.ports() == {"a": 81, "c": 80})
        assert sorted(sink.calls) == sorted(
            [
                ("set", Resource.SERVICES, Key("default", "a")),
                ("set", Resource.SERVICES, Key("default", "c")),
                ("delete", Resource.SERVICES, Key("default", "b")),
            ]
        )

    follow(tmp_path, story)


def test_an_empty_directory_is_a_valid_list(tmp_path):
    async def story(sink):
        await until(lambda: len(sink.objects) == 4)
        assert not any(sink.objects.values())
        assert not sink.troubles

    follow(tmp_path, story)


def test_files_come_change_move_and_go(tmp_path):
    async def story(sink):
        await until(lambda: len(sink.objects) == 4)
        (tmp_path / "a.yaml").write_text(service("a"))
        await until(lambda: sink.ports() == {"a": 80})
        replace(tmp_path / "a.yaml", service("a", port=81))
        await until(lambda: sink.ports() == {"a": 81})
        (tmp_path / "b.json").write_bytes(msgspec.json.encode({"kind": "List", "items": []}))
        (tmp_path / "a.yaml").rename(tmp_path / "a.old")
        await until(lambda: sink.ports() == {})
        (tmp_path / "a.old").rename(tmp_path / "c.yml")
        await until(lambda: sink.ports() == {"a": 81})
        (tmp_path / "c.yml").unlink()
        await until(lambda: sink.ports() == {})
        os.link(*(tmp_path / name for name in ("b.json", "d.yaml")))
        (tmp_path / "link.yaml").symlink_to(tmp_path / "hidden.txt")
        await until(lambda: "link.yaml" in sink.troubles)
        (tmp_path / "hidden.txt").write_text(service("linked"))
        await until(lambda: sink.ports() == {"linked": 80} and not sink.troubles)

    follow(tmp_path, story)


def test_a_wrong_file_keeps_what_was_valid_and_is_reported_by_line(tmp_path):
    path = tmp_path / "web.yaml"
    path.write_text(service("a"))

    async def story(sink):
        await until(lambda: sink.ports() == {"a": 80})
        path.write_text("kind: Service\nmetadata: {name: 'a\n")
        await until(lambda: "web.yaml" in sink.troubles)
        assert sink.troubles["web.yaml"].startswith("line 3, column 1: ")
        assert sink.ports() == {"a": 80}
        (tmp_path / "other.yaml").write_text(service("b"))
        await until(lambda: sink.ports() == {"a": 80, "b": 80})
        path.write_text(service("a", port=81))
        await until(lambda: sink.ports() == {"a": 81, "b": 80})
        await until(lambda: not sink.troubles)

    follow(tmp_path, story)


def test_a_wrong_object_keeps_its_last_valid_version_and_is_named(tmp_path):
    path = tmp_path / "web.yaml"
    path.write_text(service("a") + "---\n" + service("b"))

    async def story(sink):
        await until(lambda: len(sink.ports()) == 2)
        path.write_text(service("a", port='"81"') + "---\n" + service("b", port=81))
        await until(lambda: sink.ports() == {"a": 80, "b": 81})
        await until(lambda: sink.troubles)
        assert sink.troubles == {"web.yaml: Service default/a": "spec.ports[0].port: expected int, got str"}
        path.write_text(service("b", port=82))
        await until(lambda: sink.ports() == {"b": 82} and not sink.troubles)

    follow(tmp_path, story)


def test_a_file_being_written_is_not_believed_until_it_is_closed(tmp_path):
    path = tmp_path / "web.yaml"
    path.write_text(many(3))

    async def story(sink):
        await until(lambda: len(sink.ports()) == 3)
        sink.calls.clear()
        with path.open("w") as file:  # truncated: valid YAML with nothing in it
            file.flush()
            (tmp_path / "mark.yaml").write_text(service("mark"))
            await until(lambda: "mark" in sink.ports())
            file.write(service("web-0", port=81))  # half of it: valid YAML with one Service
            file.flush()
            (tmp_path / "mark.yaml").write_text(service("mark", port=81))
            await until(lambda: sink.ports()["mark"] == 81)
            assert len(sink.ports()) == 4
            file.write("---\n" + many(2, first=1))
        await until(lambda: sink.ports()["web-0"] == 81)
        assert not [call for call in sink.calls if call[0] == "delete"]

    follow(tmp_path, story)


def test_a_writer_that_never_closes_is_believed_after_a_pause(tmp_path):
    async def story(sink):
        await until(lambda: len(sink.objects) == 4)
        with (tmp_path / "web.yaml").open("w") as file:
            file.write(service("a"))
            file.flush()
            await until(lambda: sink.ports() == {"a": 80})

    follow(tmp_path, story)


def test_a_config_map_volume_swaps_its_link(tmp_path):
    def publish(version, text):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "web.yaml").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(f"..{version}")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish(1, service("a"))
    (tmp_path / "web.yaml").symlink_to("..data/web.yaml")

    async def story(sink):
        await until(lambda: sink.ports() == {"a": 80})
        for version in range(2, 5):
            publish(version, service("a", port=80 + version))
            shutil.rmtree(tmp_path / f"..{version - 1}")
            await until(lambda version=version: sink.ports() == {"a": 80 + version})
        assert not sink.troubles

    follow(tmp_path, story)
    (tmp_path / "..4" / "web.yaml").write_text(service("a"))
    follow(tmp_path / "web.yaml", story_of_a_swap(publish))


def story_of_a_swap(publish):
    async def story(sink):
        await until(lambda: sink.ports() == {"a": 80})
        publish(9, service("a", port=99))
        await until(lambda: sink.ports() == {"a": 99})

    return story


def test_a_missing_directory_is_waited_for_and_a_lost_one_kept(tmp_path):
    path = tmp_path / "etc" / "sluice" / "manifests"

    async def story(sink):
        await until(lambda: sink.troubles)
        assert sink.troubles == {str(path): "No such file or directory: waiting for it"}
        assert not sink.objects
        path.mkdir(parents=True)
        await until(lambda: len(sink.objects) == 4 and not sink.troubles)
        (path / "web.yaml").write_text(service("a"))
        await until(lambda: sink.ports() == {"a": 80})

        path.parent.rename(tmp_path / "elsewhere")
        await until(lambda: sink.troubles)
        assert sink.troubles == {str(path): "No such file or directory: what was read from it stays"}
        assert sink.ports() == {"a": 80}
        path.mkdir(parents=True)
        (path / "web.yaml").write_text(service("b"))
        await until(lambda: sink.ports() == {"b": 80} and not sink.troubles)
        (tmp_path / "elsewhere" / "manifests" / "web.yaml").write_text(service("stale"))
        (path / "web.yaml").write_text(service("c"))
        await until(lambda: sink.ports() == {"c": 80})

    follow(path, story)


def test_a_directory_is_replaced_by_another(tmp_path):
    path, other = tmp_path / "manifests", tmp_path / "other"
    for directory, name in ((path, "a"), (other, "b")):
        directory.mkdir()
        (directory / "web.yaml").write_text(service(name))

    async def story(sink):
        await until(lambda: sink.ports() == {"a": 80})
        path.rename(tmp_path / "old")
        other.rename(path)
        await until(lambda: sink.ports() == {"b": 80})
        (path / "web.yaml").write_text(service("b", port=81))
        await until(lambda: sink.ports() == {"b": 81})

    follow(path, story)


def test_a_directory_behind_a_link(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "web.yaml").write_text(service(name))
    (tmp_path / "current").symlink_to("one")

    async def story(sink):
        await until(lambda: sink.ports() == {"one": 80})
        (tmp_path / "next").symlink_to(tmp_path / "two")
        (tmp_path / "next").rename(tmp_path / "current")
        await until(lambda: sink.ports() == {"two": 80})
        (tmp_path / "two" / "web.yaml").write_text(service("two", port=81))
        await until(lambda: sink.ports() == {"two": 81})

    follow(tmp_path / "current", story)


def test_a_single_file_is_followed_by_its_path(tmp_path):
    path = tmp_path / "dump.txt"

    async def story(sink):
        await until(lambda: sink.troubles)
        path.write_text(service("a"))
        await until(lambda: sink.ports() == {"a": 80} and not sink.troubles)
        replace(path, service("a", port=81))
        await until(lambda: sink.ports() == {"a": 81})
        path.unlink()
        await until(lambda: sink.troubles)
        assert sink.ports() == {"a": 81}
        path.write_text(service("a", port=82))
        await until(lambda: sink.ports() == {"a": 82} and not sink.troubles)

    follow(path, story)


def test_nothing_is_told_while_nothing_can_be_used(tmp_path):
    (tmp_path / "web.yaml").write_text("kind: [\n")

    async def story(sink):
        await until(lambda: str(tmp_path) in sink.troubles)
        assert not sink.objects
        assert sink.troubles["web.yaml"].startswith("line 2")
        (tmp_path / "web.yaml").write_text(service("a"))
        await until(lambda: sink.ports() == {"a": 80} and not sink.troubles)

    follow(tmp_path, story)


def test_services_that_vanish_in_a_mass_are_kept_until_a_second_look(tmp_path):
    (tmp_path / "many.yaml").write_text(many(120))

    async def story(sink):
        await until(lambda: len(sink.ports()) == 120)
        sink.believe = False
        sink.calls.clear()
        (tmp_path / "many.yaml").write_text(service("new") + "---\n" + many(1))
        await until(lambda: "new" in sink.ports())
        await until(lambda: sink.troubles)
        assert sink.troubles[str(tmp_path)].startswith("119 of 12")
        assert len(sink.ports()) == 121
        await until(lambda: sink.doubts >= 3)
        assert {call[0] for call in sink.calls} == {"set"}
        sink.believe = True
        await until(lambda: sink.ports() == {"new": 80, "web-0": 80} and not sink.troubles)

    follow(tmp_path, story, confirm_after=0.05)


def test_a_doubt_ends_when_the_services_are_back(tmp_path):
    (tmp_path / "many.yaml").write_text(many(120))

    async def story(sink):
        await until(lambda: len(sink.ports()) == 120)
        sink.believe = False
        (tmp_path / "many.yaml").rename(tmp_path / "gone")
        await until(lambda: sink.troubles)
        assert len(sink.ports()) == 120
        (tmp_path / "gone").rename(tmp_path / "many.yaml")
        await until(lambda: not sink.troubles)
        assert len(sink.ports()) == 120
        assert sink.asked[-1] == 0, "the sink hears of the end of the doubt"

    follow(tmp_path, story, confirm_after=60)


def test_single_deletions_are_never_held(tmp_path):
    (tmp_path / "many.yaml").write_text(many(120))

    async def story(sink):
        await until(lambda: len(sink.ports()) == 120)
        sink.believe = False
        (tmp_path / "many.yaml").write_text(many(60))
        await until(lambda: len(sink.ports()) == 60)
        assert not sink.asked

    follow(tmp_path, story)


def test_large_yaml_is_read_without_stopping_the_loop_and_told_as_a_list(tmp_path):
    text = "apiVersion: v1\nkind: List\nitems:\n" + "".join(
        "- " + service(f"web-{number}").replace("\n", "\n  ").rstrip() + "\n" for number in range(4000)
    )
    (tmp_path / "large.yaml").write_text(text)

    async def story(sink):
        await until(lambda: len(sink.objects) == 4)
        assert len(sink.ports()) == 4000
        (tmp_path / "large.yaml").write_text(text.replace("port: 80", "port: 81"))
        await until(lambda: set(sink.ports().values()) == {81})
        assert [call for call in sink.calls if call[0] == "set"] == []

    follow(tmp_path, story)


def test_cancelled_in_the_middle_of_a_look_it_leaves_no_thread_and_no_process(tmp_path, monkeypatch):
    (tmp_path / "large.yaml").write_text(many(20_000))
    source = ManifestSource(tmp_path, "node1")

    async def main():
        task = asyncio.create_task(source.run(Recorder()))
        await until(lambda: source._converter._children)
        children = source._converter._children
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {child.returncode for child in children} == {-9}

    asyncio.run(main())


def test_without_inotify_it_looks_now_and_then(tmp_path, monkeypatch):
    def none():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(manifests, "Inotify", none)
    monkeypatch.setattr(manifests, "LOOK_EVERY_WITHOUT_INOTIFY", 0.02)

    async def story(sink):
        await until(lambda: len(sink.objects) == 4)
        assert sink.troubles[str(tmp_path)].startswith("cannot be watched (Too many open files)")
        (tmp_path / "web.yaml").write_text(service("a"))
        await until(lambda: sink.ports() == {"a": 80})

    follow(tmp_path, story)


def test_when_watches_run_out_it_looks_now_and_then_until_there_are_some(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifests, "LOOK_EVERY_WITHOUT_INOTIFY", 0.02)
    real = Inotify.add_watch
    monkeypatch.setattr(Inotify, "add_watch", refuse)

    async def story(sink):
        await until(lambda: len(sink.objects) == 4)
        (tmp_path / "web.yaml").write_text(service("a"))
        await until(lambda: sink.ports() == {"a": 80})
        assert "cannot be watched" in sink.troubles[str(tmp_path)]
        monkeypatch.setattr(Inotify, "add_watch", real)
        await until(lambda: not sink.troubles)

    follow(tmp_path, story)


def test_the_way_to_a_path_is_all_that_decides_where_it_leads(tmp_path):
    real = tmp_path.resolve()
    (real / "a").mkdir()
    (real / "a" / "file").touch()
    (real / "link").symlink_to("a/../a")
    (real / "loop").symlink_to("loop")
    base = entries_on_the_way(real)
    assert entries_on_the_way(real / "link" / "file")[len(base) :] == [
        (real, "link"),
        (real, "a"),
        (real, "a"),
        (real / "a", "file"),
    ]
    assert entries_on_the_way(real / "no" / "such" / "file")[len(base) :] == [(real, "no")]
    assert len(entries_on_the_way(real / "loop")) < len(base) + 50


operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "replace", "delete", "move", "break", "chunks", "link"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(1, 9),
    ),
    max_size=8,
)


def perform(directory: Path, operation, first, second, port):
    one, other = directory / f"{first}.yaml", directory / f"{second}.yaml"
    text = service(f"web-{second}", port=port) + "---\n" + service(f"own-{first}", port=port)
    match operation:
        case "write":
            one.write_text(text)
        case "replace":
            replace(one, text)
        case "delete":
            one.unlink(missing_ok=True)
        case "move" if one.exists():
            one.rename(other)
        case "break":
            one.write_text(text + "kind: [\n")
        case "chunks":
            with one.open("w") as file:
                for line in text.splitlines(keepends=True):
                    file.write(line)
                    file.flush()
        case "link" if first != second:
            one.unlink(missing_ok=True)
            one.symlink_to(other.name)


@settings(max_examples=25, deadline=None)
@given(operations)
def test_any_order_of_operations_ends_like_a_fresh_load(steps):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        async def story(sink):
            await until(lambda: len(sink.objects) == 4)
            for step, pause in zip(steps, itertools.cycle((False, False, True)), strict=False):
                with contextlib.suppress(OSError):  # a link that leads to itself
                    perform(directory, *step)
                if pause:
                    await asyncio.sleep(0.03)
            for number in range(3):  # what is broken or leads nowhere would remember what was valid
                path = directory / f"{number}.yaml"
                if path.is_symlink() or (path.exists() and "[\n" in path.read_text()):
                    path.unlink()
            expected = load(directory)
            services = {each.key: each for each in expected.services}
            await until(lambda: sink.objects[Resource.SERVICES] == services)
            troubles = dict(expected.problems)
            await until(lambda: sink.troubles == troubles)

        follow(directory, story)

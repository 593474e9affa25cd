"""YAML as JSON, here and in a child process."""

import contextlib
import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sources.yaml_children import LARGE, Converter
from proxy.sources.yaml_json import YamlError, to_json


def values(text):
    return msgspec.json.decode(to_json(text))


def test_documents_are_one_array():
    assert values("a: 1\n---\nb: [2]\n---\n") == [{"a": 1}, {"b": [2]}, None]
    assert values("") == []
    assert values("# nothing\n") == [None]


def test_timestamps_stay_text_and_keys_become_text():
    assert values("t: 2026-01-01T00:00:00Z\n1: one\nnull: nil\n") == [
        {"t": "2026-01-01T00:00:00Z", "1": "one", "null": "nil"}
    ]
    assert values("true: yes\n1.5: x\n") == [{"true": "yes", "1.5": "x"}]


def test_anchors_and_merge_keys():
    text = "base: &base {a: 1, b: 2}\nmore: &more {b: 3, c: 4}\none: {<<: *base, a: 9}\ntwo:\n  <<: [*base, *more]\n"
    (value,) = values(text)
    assert value["one"] == {"a": 9, "b": 2}
    assert value["two"] == {"a": 1, "b": 2, "c": 4}


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("a: 1\n---\nb: [\n", "line 4, column 1: "),
        ("a:\n  b: 'x\n", "line 3, column 1: "),
        ("a: 1\n\tb: 2\n", "line 2"),
        ("a: *nowhere\n", "line 1, column 4: unknown anchor"),
        ("ok: 1\n\nbad: \x07\n", "line 3: control characters"),
        ("a: &a [*a]\n", "line 1, column 4: recursion limit"),
        ("[" * 5000, "line 1, column 129: recursion limit"),
    ],
)
def test_errors_begin_with_the_place(text, beginning):
    with pytest.raises(YamlError) as caught:
        to_json(text)
    assert str(caught.value).startswith(beginning)


def test_a_missing_separator_is_found():
    text = "kind: A\nspec:\n  kind: C\n---\nkind: A\nspec: 1\nkind: B\n"
    with pytest.raises(YamlError, match=r'^line 7: duplicate entry with key "kind" \(is a `---` missing'):
        to_json(text)
    with pytest.raises(YamlError, match=r"^line 3: duplicate"):
        to_json("kind: A\nspec: 1\nkind: B\n")


def test_a_key_twice_deeper_down_is_an_error_with_its_line():
    with pytest.raises(YamlError, match=r"^line 3, column 5: "):
        to_json("spec:\n  ports:\n  - port: 1\n    port: 2\n")


def test_a_bomb_of_aliases_is_refused():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    with pytest.raises(YamlError, match="aliases expand"):
        to_json(bomb)


def large(text):
    """The same text, large enough for a child."""
    return (text + "#" * LARGE + "\n").encode()


def test_large_texts_are_converted_in_a_child_with_the_same_result():
    text = "a: 1\n---\n1: {b: &x é}\nc: *x\n"
    assert Converter().convert(large(text)) == Converter().convert(text.encode())
    with pytest.raises(YamlError, match=r"^line 3, column 1: found unexpected end"):
        Converter().convert(large("ok: 'x\n"))


def test_stop_ends_a_conversion_and_refuses_the_next():
    converter = Converter()
    raised = []

    def convert():
        try:
            converter.convert(b"- {a: [1, 2, 3], b: {c: d}}\n" * 400_000)
        except YamlError as error:
            raised.append(str(error))

    thread = threading.Thread(target=convert)
    thread.start()
    deadline = time.monotonic() + 10
    while not converter._children and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    converter.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert raised == ["the process that parses it ended with status -9: is memory short?"]
    with pytest.raises(YamlError, match="stopped"):
        converter.convert(large(""))


@given(st.binary() | st.text(st.characters(codec="utf-8")).map(str.encode))
def test_arbitrary_text_is_converted_or_refused(data):
    with contextlib.suppress(UnicodeDecodeError, YamlError):
        msgspec.json.decode(to_json(data.decode()))

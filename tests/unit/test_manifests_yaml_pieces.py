"""Large YAML in pieces: what comes of them is what comes of the whole."""

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.sources import yaml_pieces
from proxy.sources.yaml_children import Converter
from proxy.sources.yaml_json import YamlError, outlined, to_json
from proxy.sources.yaml_pieces import Made, Piece, cut, joined

LISTED = "apiVersion: v1\nitems:\n" + "- kind: Service\n  n: 1\n" * 20 + "kind: List\nmetadata: {}\n"


def by_pieces(text, size):
    """What comes of the pieces: JSON, or None where the whole is to be parsed."""
    data = text.encode()
    pieces = cut(data, size)
    made = []
    for piece in pieces:
        part = data[piece.start : piece.end].decode()
        try:
            made.append(Made(piece, *outlined(f"items:\n{part}" if piece.continues else part)))
        except YamlError:
            return None
    return joined(made)


def whole(text):
    try:
        return to_json(text)
    except YamlError:
        return None


@pytest.mark.parametrize(
    "text",
    [
        LISTED,
        LISTED.replace("\n- ", "\n  - ").replace("\n  n", "\n    n"),
        LISTED.replace("\n", "\r\n"),
        "kind: List\nitems:\n" + "- {a: 1}\n" * 30,
        "---\na: [1, 2]\n" * 30,
        "# of a file\na: 1\n" + "---\nendpoints:\n- a\n- b\n" * 30,
        LISTED + "---\n" + LISTED + "---\nb: 1\n" * 20,
        "items:\n" + "- a: |\n    ---\n    - b\n" * 20,
        "items:\n" + "- &a {b: 1}\n- *a\n# x\n\n" + "- z: 1\n" * 20,
        "1: a\nnull: b\nitems:\n" + "- null: c\n" * 20,
    ],
)
def test_manifests_are_cut_and_joined_to_what_they_are(text):
    assert len(cut(text.encode(), 40)) > 1
    assert by_pieces(text, 40) == to_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "items:\n" + "- 'a\n- b\n- c\n- d'\n" * 9,
        "items: |\n" + "  - a\n" * 30,
        "items:\n" + "- a\n" * 20 + "finalizers:\n" + "- b\n" * 20,
        "kind: a\nitems:\n" + "- a\n" * 20 + "kind: b\n",
        "items:\n- &a x\n" + "- y\n" * 20 + "- *a\n",
        "items: !some\n" + "- a\n" * 20,
        "items: # none\n- a\n" * 2,
        "items:\n- a\n...\n" + "- b\n" * 20,
        "%YAML 1.2\n---\n" + "a: 1\n---\n" * 20,
        "items:\n" + "- a\n" * 20 + "<<: {kind: List}\n",
        "# a comment that is no document\n\n\n" + "---\na: 1\n" * 20,
        "a: 'x\n---\n" * 20,
        "items:\n" + "- a\n" * 20 + "\tb\n",
    ],
)
def test_what_only_looks_like_items_or_documents_is_not_joined(text):
    assert by_pieces(text, 16) in {None, whole(text)}
    assert len(cut(text.encode(), 16)) == 1 or by_pieces(text, 16) is None


LINES = (
    *("items:", "items:", "- a: 1", "- a: 1", "- a: 1", "  c: 2", "  - x", "  - y", "kind: List", "b: 1", "---", "---"),
    *("--- # x", "--- a", "---b", "...", "# c", "- |", "- >-", "    text", "  text", "items: |", "items: &a", "- &a x"),
    *(
        "- *a",
        "  d: 'q",
        "- 'q",
        "q'",
        '- "',
        '"',
        "%YAML 1.2",
        "<<: {kind: a}",
        "- <<: {a: 1}",
        "null: 1",
        "1: 1",
        "{",
    ),
    *(
        "}",
        "- [",
        "]",
        "? a",
        ": b",
        "\tx",
        "",
        "\ufeff",
        "- - z",
        "-",
        "items: [1]",
        "items: []",
        '"items":',
        "- a: \r",
    ),
)


@given(
    st.lists(st.sampled_from(LINES), max_size=20).map(lambda lines: "".join(f"{line}\n" for line in lines)),
    st.integers(1, 12),
)
@example("items:\n- a\n- 'b\n- c'\n", 1)
def test_any_lines_in_pieces_are_what_they_are_as_a_whole(text, size):
    found = by_pieces(text, size)
    if len(cut(text.encode(), size)) > 1 and found is not None:
        assert found == whole(text)


def test_a_piece_is_never_much_smaller_than_asked_for_and_there_are_not_too_many(monkeypatch):
    monkeypatch.setattr(yaml_pieces, "MOST", 8)
    pieces = cut(LISTED.encode(), 1)
    assert 4 < len(pieces) <= 8
    assert [each.start for each in pieces[1:]] == [each.end for each in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].end) == (0, len(LISTED))
    assert cut(b"a: 1\n", 100) == [Piece(0, 5)]


def test_children_convert_pieces_and_the_whole_where_pieces_mean_nothing():
    item = "- kind: Service\n  name: a-rather-long-name-for-it\n"
    text = "kind: List\nitems:\n" + item * 25_000
    assert len(cut(text.encode())) > 2
    assert Converter().convert(text.encode()) == to_json(text)
    alias = text.replace("name: a", "name: &a a", 1) + "- kind: *a\n"
    assert msgspec.json.decode(Converter().convert(alias.encode())) == msgspec.json.decode(to_json(alias))
    broken = text + "- kind: 'x\n"
    with pytest.raises(YamlError, match=r"^line 50004, column 1: found unexpected end"):
        Converter().convert(broken.encode())
    later = text + "  kind: twice\n"
    with pytest.raises(YamlError, match=r"^line 50001, column 3: .*duplicate"):
        Converter().convert(later.encode())

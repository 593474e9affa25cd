"""Manifests that are read once, as verbs do: without what it takes to follow them (`proxy.sources.manifests`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from proxy.sources.manifest_files import Files, Tools, scan
from proxy.sources.manifest_objects import FileError, Loaded, merge, parse
from proxy.sources.yaml_children import Converter


def given(name: str) -> Loaded:
    """What a verb was given with `-f`: a file or a directory, as `load`; `-` is standard input.

    Raises:
        Unreadable: as `load`.
        FileError: as `loads`.
    """
    return loads("standard input", sys.stdin.buffer.read()) if name == "-" else load(name)


def load(path: str | os.PathLike[str], node_name: str | None = None) -> Loaded:
    """What a directory or a file of manifests holds; what is wrong in it stands in `problems`.

    With `node_name` the nodes are that one alone, as a running agent sees it.

    Raises:
        Unreadable: there is no such directory or file, or the directory may not be listed.
    """
    return together(scan(absolute(path), {}, Tools(Converter().convert)), node_name)


def loads(name: str, data: bytes, node_name: str | None = None) -> Loaded:
    """The same from bytes, such as those of standard input; `name` is for complaints.

    Raises:
        FileError: they are neither YAML nor JSON.
    """
    try:
        content = parse(name, data, Converter().convert)
    except FileError as error:
        raise FileError(f"{name}: {error}") from None
    return merge({name: content}, node_name=node_name)


def together(files: Files, node_name: str | None) -> Loaded:
    """What files that were read come to."""
    return merge(
        {name: state.content for name, state in files.items()},
        troubles={name: state.trouble for name, state in files.items() if state.trouble},
        node_name=node_name,
    )


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path from the root on, links not followed."""
    return Path(os.path.normpath(Path.cwd() / path))

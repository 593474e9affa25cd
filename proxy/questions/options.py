"""What the verbs that ask share: options, what -f was given, and flags that mean nothing without manifests."""

from __future__ import annotations

import sys
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.command_line import READING_FLAGS

if TYPE_CHECKING:
    from proxy.foreign.sources import Files

OF = click.option("--of", type=click.Choice(["sluice", "kube-proxy"]), help="whose rules [sluice's, where it has any]")
AS_TEXT_OR_JSON = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="how to print it [text]"
)

SERVER_FLAGS = frozenset(("kubeconfig", "master"))
"""Flags that name an API server, whose objects another proxy's rules are compared with."""
ONLY_OF_OTHERS = "--{} is for rules of another proxy: --of kube-proxy"


def address_in(option: str, text: str) -> bytes:
    """The address that an option was given, an IPv6 one with brackets or without; empty: it was not given.

    Raises:
        UsageError: it is none.
    """
    from proxy.addresses import lenient_address  # noqa: PLC0415  # see the head of proxy.cli

    try:
        return lenient_address(text.removeprefix("[").removesuffix("]")) if text else b""
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None


def service_in(text: str) -> str:
    """What `--service` was given, without the kind that kubectl puts before a name."""
    from proxy.naming import without_kind  # noqa: PLC0415  # see the head of proxy.cli

    return without_kind(text)


def log_warnings_alone(ctx: click.Context) -> None:
    """Have the sources of objects log to standard error, from warnings up: what a verb prints is its answer alone."""
    from proxy.logs import warnings_alone  # noqa: PLC0415  # see the head of proxy.cli

    ctx.call_on_close(warnings_alone(sys.stderr))


def sorted_by_content(names: tuple[str, ...]) -> Files:
    """What was given with -f, by what is in it."""
    from proxy.foreign.sources import Files, sort_files  # noqa: PLC0415  # see the head of proxy.cli

    if not names:
        return Files("", ())
    try:
        return sort_files(names)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def bundle_in(names: tuple[str, ...]) -> str:
    """The archive of `sluice bundle` that was given with -f; empty: none was.

    Raises:
        UsageError: one was given, and something else; or a file cannot be read.
    """
    from proxy.foreign.sources import STANDARD_INPUT  # noqa: PLC0415  # see the head of proxy.cli

    def is_bundle(name: str) -> bool:
        path = Path(name)
        if name == STANDARD_INPUT or not path.is_file():
            return False
        try:
            with path.open("rb") as file:
                return file.read(2) == b"\x1f\x8b"
        except OSError as error:
            raise click.UsageError(f"{name}: {error.strerror}") from None

    found = next((each for each in names if is_bundle(each)), "")
    if found and len(names) > 1:
        raise click.UsageError(f"{found} is a bundle, with which -f takes nothing else")
    return found


def need_manifests(given: list[tuple[str, str]], meaningful: AbstractSet[str] = READING_FLAGS) -> None:
    """Refuse flags that say how manifests are meant, where there are none; all but the `meaningful` ones do.

    Raises:
        UsageError: such a flag was given.
    """
    needless = next((name for name, _ in given if name not in meaningful), None)
    if needless:
        raise click.UsageError(f"--{needless} says how manifests are meant: it needs -f")

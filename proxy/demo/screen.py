"""What the demo prints: with colour and drawn tables on a terminal, as plain aligned text elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

_WIDTHS = (8, 29, 20, 11)
"""Of the columns of tables, at least, so that they stand under each other."""


class Screen:
    """Where the demo prints to."""

    def __init__(self, out: TextIO, *, plain: bool | None = None) -> None:
        """Of a stream; plain or not by what the stream is, unless told."""
        self.out = out
        self._console: Any = None
        if not (not out.isatty() if plain is None else plain):
            from rich.console import Console  # noqa: PLC0415  # 60 ms that a pipe does without

            self._console = Console(file=out, highlight=False)

    def line(self, text: str = "", style: str = "") -> None:
        if self._console is None:
            self.out.write(f"{text}\n")
        else:
            self._console.print(text, style=style, markup=False)
        self.out.flush()

    def title(self, text: str, about: str) -> None:
        self.line(text, "bold cyan")
        self.line(about, "dim")
        self.line()

    def heading(self, text: str, about: str) -> None:
        self.line()
        if self._console is None:
            self.line(f"{text}: {about}")
        else:
            from rich.text import Text  # noqa: PLC0415  # only on a terminal

            self._console.print(Text.assemble((text, "bold cyan"), (f"  {about}", "dim")))

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A line for a piece of work, with how long it took."""
        began = time.monotonic()
        try:
            if self._console is None:
                yield
            else:
                with self._console.status(text):
                    yield
        except BaseException:
            self._step(text, began, right=False)
            raise
        self._step(text, began, right=True)

    def _step(self, text: str, began: float, *, right: bool) -> None:
        seconds = f"{time.monotonic() - began:6.2f} s"
        if self._console is None:
            self.line(f"{'ok    ' if right else 'failed'}  {seconds}  {text}")
        else:
            mark, style = ("✓", "green") if right else ("✗", "bold red")
            self._console.print(f"[{style}]{mark}[/] [dim]{seconds}[/]  ", end="")
            self._console.print(text, markup=False)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], rights: Sequence[bool]) -> None:
        """Rows under headings, with a mark on each that says whether it is right."""
        if self._console is None:
            marked = [(*row, "" if right else "WRONG") for row, right in zip(rows, rights, strict=True)]
            cells = [(*headings, ""), *marked]
            least = (*_WIDTHS[: len(headings)], 0)
            widths = [max(low, *map(len, column)) for low, column in zip(least, zip(*cells, strict=True), strict=True)]
            for each in cells:
                line = "  ".join(cell.ljust(width) for cell, width in zip(each, widths, strict=True))
                self.line(f"  {line}".rstrip())
            return
        from rich.table import Table  # noqa: PLC0415  # only on a terminal
        from rich.text import Text  # noqa: PLC0415  # likewise

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("")
        for heading, style, width in zip(headings, ("", "green", "cyan", "yellow"), _WIDTHS, strict=False):
            table.add_column(heading, style=style, min_width=width)
        for row, right in zip(rows, rights, strict=True):
            mark = Text("✓", "green") if right else Text("✗", "bold red")
            table.add_row(mark, *(Text(cell) for cell in row))
        self._console.print(table)

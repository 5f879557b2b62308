"""What the command line shows: data on stdout, everything else on stderr, for people or for programs.

With --json stdout carries JSON and nothing else. Without a terminal there are no colours, no bars and no cursor
movements; NO_COLOR is respected. rich is loaded only when a table goes to a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TextIO


class Console:
    """Two streams and whether people read them. Safe to call from a loading thread."""

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.as_json = as_json
        self._quiet = quiet
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._line_open = False

    def data(self, text: str, *, end: str = "\n") -> None:
        """A piece of the result."""
        self._out.write(text + end)
        self._out.flush()

    def json(self, value: object) -> None:
        """The result as one line of JSON."""
        self.data(json.dumps(value, ensure_ascii=False))

    def note(self, text: str) -> None:
        """A line about what is going on."""
        if not self._quiet:
            self._end_line()
            self._err.write(text + "\n")
            self._err.flush()

    def progress(self, what: str, done: int, total: int, unit: str = "") -> None:
        """How far something is: rewritten in place on a terminal, else a line at each tenth at most."""
        if self._quiet or total <= 0:
            return
        text = f"{what} {_amount(done, unit)}/{_amount(total, unit)}{' ' + unit if unit and unit != 'bytes' else ''}"
        if self._err.isatty():
            self._err.write(f"\r\x1b[2K{text}")
            self._line_open = True
            if done >= total:
                self._end_line()
        elif total <= 64 or done >= total or done * 10 // total > (done - 1) * 10 // total:
            self._err.write(text + "\n")
        self._err.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table: rich on a terminal, aligned columns otherwise."""
        if self._out.isatty() and "NO_COLOR" not in os.environ:
            self._rich_table(columns, rows)
            return
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        for row in (columns, *rows):
            self.data("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def _rich_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console as Rich
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))  # peers' names must not be read as markup
        Rich(file=self._out).print(table)

    def _end_line(self) -> None:
        if self._line_open:
            self._err.write("\n")
            self._line_open = False


def _amount(count: int, unit: str) -> str:
    return f"{count / 1e6:.0f} MB" if unit == "bytes" else str(count)


def milliseconds(seconds: float | None) -> str:
    """Seconds as people read latencies; empty when unknown."""
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"

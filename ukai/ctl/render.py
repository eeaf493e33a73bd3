"""How things look: tables and words for people, JSON for programs.

What was asked for goes to stdout, remarks and errors to stderr.  On a terminal tables fit its width; in a pipe
nothing is cut or folded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ukai.model import parse_size

PIPE_WIDTH = 1000
FOLDED_WIDTH = 18
STYLES = {
    "ok": "green",
    "up": "green",
    "done": "green",
    "in-sync": "green",
    "running": "cyan",
    "syncing": "cyan",
    "waiting": "yellow",
    "degraded": "yellow",
    "out-of-sync": "yellow",
    "stopped": "yellow",
    "offline": "dim",
    "unknown": "dim",
    "down": "red",
    "failed": "red",
}


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


class Output:
    """Where a command's results go."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._console = console()

    def json(self, value: Any) -> None:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def json_line(self, value: Any) -> None:
        """One object on a line of its own, at once: for what is followed."""
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def raw(self, text: str) -> None:
        """A line as it is, for what other programs read."""
        sys.stdout.write(text + "\n")

    def line(self, text: str | Text = "") -> None:
        self._print(text)

    def unfolded(self, text: Text) -> None:
        """A line that may be longer than the terminal is wide, as of a log."""
        self._print(text, fold=False)

    def notes(self, notes: Iterable[str]) -> None:
        for note in notes:
            self._print(f"note: {note}")

    def remark(self, text: str) -> None:
        """One line on stderr, beside the results."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[str | Text]], indent: int = 0) -> None:
        """A header in ``>`` is right-aligned, one in ``*`` may be folded; all others keep their width.

        A column that may be folded keeps FOLDED_WIDTH, so that not one of them is crushed for another's sake.
        """
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for header in headers:
            table.add_column(
                header.strip(">*"),
                justify="right" if header.startswith(">") else "left",
                no_wrap=not header.startswith("*"),
                min_width=FOLDED_WIDTH if header.startswith("*") and self._console.is_terminal else None,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        self._print(table, indent)

    def pairs(self, rows: Iterable[tuple[str, str | Text]]) -> None:
        """Names and values below a heading."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(Text("  " + name), value if isinstance(value, Text) else Text(value))
        self._print(table)

    def _print(self, what: str | Text | Table, indent: int = 0, fold: bool = True) -> None:
        """Lines without the blanks that pad the last column."""
        if isinstance(what, str):
            what = Text(what)
        folds = isinstance(what, Table) or (fold and self._console.is_terminal)
        with self._console.capture() as capture:
            self._console.print(what, soft_wrap=not folds)
        for line in capture.get().splitlines():
            sys.stdout.write(" " * indent + line.rstrip() + "\n")


def styled(word: str, extra: str = "") -> Text:
    """A status word in its colour."""
    return Text.assemble((word, STYLES.get(word, "")), extra)


def heading(text: str) -> Text:
    return Text(text, style="bold")


def size(value: float | None) -> str:
    """Bytes in the largest unit that leaves at least 1: ``8 GiB``, ``7.45 GiB``."""
    if value is None:
        return "-"
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(amount) < 1024 or unit == "PiB":
            break
        amount /= 1024
    return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"


def plain_size(value: int) -> str:
    """``64 MiB``, or ``50000000 bytes`` where that would not be exact."""
    return size(value) if parse_size(size(value)) == value else f"{value} bytes"


def exact_size(value: int) -> str:
    """``8 GiB (8589934592 bytes)``."""
    return f"{size(value)} ({value} bytes)"


def rate(value: float | None) -> str:
    return "-" if value is None else f"{size(value)}/s"


def duration(seconds: float | None) -> str:
    """``12 s``, ``3 min``, ``2 h 5 min``, ``4 d 2 h``."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    if whole < 172800:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def age(since: float | None) -> str:
    """How long ago a time was."""
    return "-" if since is None else duration(time.time() - since)


def moment(at: float | None) -> str:
    """Local date and time."""
    if at is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "-"


def clock(at: float | None) -> str:
    """Local time with milliseconds, for the lines of a log."""
    return moment(at) + (f".{int(at * 1000) % 1000:03d}" if at is not None else "")


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"

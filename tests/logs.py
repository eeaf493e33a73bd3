"""The log files of the processes: one JSON map per line; anything else is a fault in itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SERIOUS = ("warning", "error", "critical")
TAIL_LINES = 8
NOISE = ("Ignoring invalid max threads value",)
"""Printed by libfuse 3.14.0 about its own default."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line.  ``level`` is ``raw`` for what is not in our form: a traceback, a crash, a print."""

    node: str
    process: str
    level: str
    message: str

    @property
    def serious(self) -> bool:
        return self.level in SERIOUS or self.level == "raw"

    def __str__(self) -> str:
        return f"{self.node} {self.process} {self.level}: {self.message}"


class LogFile:
    """What one process wrote to stdout and stderr, over all its lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen_bytes = 0

    def lines(self) -> Iterator[LogLine]:
        """All complete lines."""
        return self._parse(0)[0]

    def news(self) -> Iterator[LogLine]:
        """The complete lines since the last call."""
        lines, self._seen_bytes = self._parse(self._seen_bytes)
        return lines

    def tail(self) -> str:
        """The last lines, for a message."""
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        return "\n  ".join(["", *text.splitlines()[-TAIL_LINES:]])

    def _parse(self, start_bytes: int) -> tuple[Iterator[LogLine], int]:
        data = self.path.read_bytes()[start_bytes:] if self.path.exists() else b""
        data = data[: data.rfind(b"\n") + 1]
        return map(self._line, data.splitlines()), start_bytes + len(data)

    def _line(self, line: bytes) -> LogLine:
        try:
            fields = json.loads(line)
            return LogLine(fields["node"], fields["process"], fields["level"], fields["message"])
        except (ValueError, KeyError, TypeError):
            text = line.decode(errors="replace")
            return LogLine("", self.path.stem, "noise" if text.startswith(NOISE) else "raw", text)

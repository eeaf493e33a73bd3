"""metad with 20 images of 160,000 blocks on two nodes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.results import Sample


def measure(directory: Path, keep: Callable[[Sample], None]) -> None:
    """Start, memory, snapshot, changes per second, and what a node's loss costs."""

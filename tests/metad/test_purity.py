"""The decisions import no socket, clock, randomness or thread."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ukai

ROOT = Path(ukai.__file__).parent
WITH_IO = {"server.py", "store.py", "main.py"}
PURE = [p for p in sorted((ROOT / "metad").glob("*.py")) if p.name not in WITH_IO]
FORBIDDEN = {
    "zmq",
    "socket",
    "time",
    "random",
    "secrets",
    "uuid",
    "threading",
    "os",
    "sqlite3",
    "pathlib",
    "subprocess",
}


@pytest.mark.parametrize("path", PURE, ids=lambda p: p.name)
def test_a_module_of_decisions_is_pure(path: Path) -> None:
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            used.add(node.module or "")
    assert not {name.split(".")[0] for name in used} & FORBIDDEN
    assert not {name for name in used if name in ("ukai.wire", "ukai.metad.server", "ukai.metad.store", "ukai.daemon")}


def test_there_are_decisions() -> None:
    assert len(PURE) > 8

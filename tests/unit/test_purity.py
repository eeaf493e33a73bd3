"""The decisions can't reach a socket, clock, randomness, thread or file but through what is handed to them.

Proved from the syntax tree: a list of what may be imported, not of what may not.  ``tests/metad`` has its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ukai

ROOT = Path(ukai.__file__).parent
PURE = (
    "errors",
    "faults",
    "messages",
    "mirror",
    "model",
    "ranges",
    "blockd/activity",
    "blockd/ahead",
    "blockd/behind",
    "blockd/coordinator",
    "blockd/core",
    "blockd/frontends",
    "blockd/orders",
    "blockd/flush",
    "blockd/jobs",
    "blockd/marks",
    "blockd/peer",
    "blockd/posted",
    "blockd/replica",
    "blockd/reads",
    "blockd/resync",
    "blockd/role",
    "blockd/verify",
    "blockd/writes",
    "frontend/core",
    "frontend/posted",
    "frontend/shortcut",
    "loans",
    "blockd/readable",
)
LIBRARY = {
    "__future__",
    "abc",
    "asyncio",
    "bisect",
    "collections",
    "collections.abc",
    "contextlib",
    "dataclasses",
    "enum",
    "errno",
    "functools",
    "itertools",
    "logging",
    "msgpack",
    "re",
    "typing",
}
HANDED_IN = {"ukai.blockd.files", "ukai.blockd.image_store", "ukai.blockd.store", "ukai.config", "ukai.telemetry"}
"""Whose classes they name, and whose objects they are given."""

BUILTINS = {"open", "input", "print", "exec", "eval", "compile", "__import__", "breakpoint"}
OF_ASYNCIO = {
    "to_thread",
    "run_in_executor",
    "open_connection",
    "open_unix_connection",
    "start_server",
    "create_connection",
    "create_server",
    "create_subprocess_exec",
    "create_subprocess_shell",
    "add_reader",
    "add_writer",
    "sock_recv",
    "sock_sendall",
    "run",
}


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            module = node.module or ""
            yield from (f"ukai.{name.name}" for name in node.names) if module == "ukai" else (module,)


def faults(source: str) -> list[str]:
    """What a module does that a decision may not do."""
    tree = ast.parse(source)
    own = {"ukai." + name.replace("/", ".") for name in PURE}
    found = [f"imports {name}" for name in _imports(tree) if name not in LIBRARY | HANDED_IN | own]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            found.append(f"calls {node.func.id}")
        elif isinstance(node, ast.Attribute) and node.attr in OF_ASYNCIO:
            found.append(f"uses {node.attr}")
    return found


@pytest.mark.parametrize("name", PURE)
def test_a_module_of_decisions_is_pure(name: str) -> None:
    assert faults((ROOT / f"{name}.py").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import socket",
        "import os.path",
        "from time import time",
        "def f():\n    import random",
        "import zmq as asyncio",
        "from ukai import wire",
        "from ukai.metalink import MetadLink",
        "if TYPE_CHECKING:\n    from threading import Lock",
        "open('/x')",
        "asyncio.to_thread(f)",
        "loop.run_in_executor(None, f)",
    ],
)
def test_the_proof_finds_what_it_looks_for(source: str) -> None:
    assert len(faults(source)) == 1

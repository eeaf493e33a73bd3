"""Errors of callbacks, and what the self-check says, without a mount."""

from __future__ import annotations

import ctypes
import errno
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ukai.errors import Busy, NoSpace, NotFound, UkaiError
from ukai.frontend import binding


def raising(error: BaseException) -> int:
    def work() -> int:
        raise error

    return binding._guarded("fsync", work, None)()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "gone"), errno.ENOENT),
        (TimeoutError(errno.ETIMEDOUT, "late"), errno.ETIMEDOUT),
        (NotFound("x"), errno.ENOENT),
        (Busy("x"), errno.EBUSY),
        (NoSpace("x"), errno.ENOSPC),
        (UkaiError("x"), errno.EIO),
    ],
)
def test_errors_with_a_meaning_keep_it(error: BaseException, expected: int) -> None:
    assert raising(error) == -expected


@pytest.mark.expect_log("fsync failed in the frontend itself")
@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionError("x"),
        OSError(-5, "x"),
        OSError(0, "x"),
        OSError("no number"),
        OSError(2**31, "x"),
        ValueError("x"),
        AssertionError(),
        MemoryError(),
        RecursionError(),
        KeyboardInterrupt(),
        SystemExit(0),
        SystemExit(1),
        GeneratorExit(),
        BaseException("x"),
    ],
    ids=repr,
)
def test_every_other_exception_is_eio(error: BaseException) -> None:
    assert raising(error) == -errno.EIO


def test_even_a_broken_log_is_eio(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logging.getLogger("ukai.frontend.binding"), "error", broken)
    assert raising(ValueError("x")) == -errno.EIO


@pytest.mark.parametrize(("name", "major"), [("mfusepy", 3), ("fusepy", 2)])
def test_each_binding_gets_its_library(name: str, major: int) -> None:
    library = binding.load(name)
    assert (library.name, library.version[0]) == (name, major)
    assert name in str(library)


def test_auto_prefers_libfuse3() -> None:
    assert binding.load("auto").name == "mfusepy"


@pytest.mark.parametrize(
    ("result", "order"),
    [
        (0, "new mount loop others unmount destroy"),
        (-5, "new mount loop unmount others unmount destroy"),  # nothing else ends the waiting of the others
    ],
)
def test_other_threads_end_after_the_loop_and_before_the_session(result: int, order: str) -> None:
    calls: list[str] = []

    def function(name: str, returns: int) -> Any:
        def called(*_: object) -> int:
            calls.append(name)
            return returns

        return called

    names = {"new": 1, "mount": 0, "loop": result, "unmount": 0, "destroy": 0}
    library = SimpleNamespace(**{f"fuse_{name}": function(name, returns) for name, returns in names.items()})
    others: Any = SimpleNamespace(close=function("others", 0))
    operations = binding.load("mfusepy").module.fuse_operations()
    assert bool(binding._run_beside(library, [b"ukai"], operations, b"/nowhere", others)) == bool(result)
    assert calls == order.split()


def test_what_is_kept_of_libfuse_s_memory_shows_what_is_there_now() -> None:
    handle = binding.load("mfusepy").module.fuse_file_info
    memory, info, buffer = binding._Memory(handle), handle(), ctypes.create_string_buffer(16)
    address = ctypes.addressof(buffer)
    view = memory.view(address, 16, binding._WRITABLE)
    view[0] = 7
    assert buffer.raw[0] == 7
    assert memory.view(address, 16, binding._WRITABLE) is view
    assert memory.view(address, 16, binding._READ_ONLY).readonly
    assert len(memory.view(address, 8, binding._WRITABLE)) == 8
    for number in (1, 2**64 - 1):
        info.fh = number
        assert memory.handle(ctypes.addressof(info)) == number


def test_libfuse_s_memory_is_not_kept_without_end() -> None:
    handle = binding.load("mfusepy").module.fuse_file_info
    memory, infos = binding._Memory(handle), (handle * 1)()
    buffer = ctypes.create_string_buffer(2 * binding._REMEMBERED)
    for size in range(1, 2 * binding._REMEMBERED):
        memory.view(ctypes.addressof(buffer), size, binding._READ_ONLY)
        memory.handle(ctypes.addressof(infos))
        assert len(memory._views) <= binding._REMEMBERED


def test_fusepy_gets_fallocate_where_libfuse_looks_for_it() -> None:
    module = binding.load("fusepy").module
    full = binding._with_fallocate(module)
    assert ctypes.sizeof(full) == ctypes.sizeof(module.fuse_operations) + 5 * ctypes.sizeof(ctypes.c_void_p)
    assert full.fallocate.offset == ctypes.sizeof(full) - ctypes.sizeof(ctypes.c_void_p)


@pytest.mark.parametrize(
    ("missing", "wanted", "says"),
    [
        ("fuse3", "mfusepy", "install libfuse3"),
        ("fuse", "fusepy", "install libfuse2"),
        ("fuse fuse3", "auto", "install libfuse3.*install libfuse2"),
        ("fuse3", "auto", "fusepy with libfuse 2.9"),
    ],
)
def test_a_missing_library_is_one_clear_line(missing: str, wanted: str, says: str) -> None:
    code = f"""
import ctypes.util
real = ctypes.util.find_library
ctypes.util.find_library = lambda name: None if name in {missing.split()!r} else real(name)
from ukai.errors import UkaiError
from ukai.frontend import binding
try:
    print(binding.load({wanted!r}))
except UkaiError as e:
    print(e.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert __import__("re").search(says, lines[0]), lines

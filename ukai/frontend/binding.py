"""FUSE: the one module that knows which library is underneath.

mfusepy brings the structures of libfuse3, fusepy those of libfuse2; the callbacks, their error mapping and the
start are ours, so that both behave alike.  An exception that leaves a callback is taken for success by ctypes, and
the bindings' own wrappers turn some into success or EINVAL: here each becomes its errno or EIO, and nothing runs
after that.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ukai.errors import UkaiError
from ukai.frontend.core import REFUSED
from ukai.frontend.spare import SMALL_BYTES, Spares

log = logging.getLogger(__name__)

MAX_BACKGROUND = 64
ATTRIBUTE_SECONDS = 1
ERRNO_LIMIT = 4096
NOT_MADE, NOT_MOUNTED, LOOP_FAILED = 3, 4, 8
"""What fuse_main returns in these cases."""
_SPLICE = 1 << 7 | 1 << 8 | 1 << 9

INSTALL = {
    "mfusepy": "install libfuse3 (Debian: fuse3) and the Python package mfusepy",
    "fusepy": "install libfuse2 (Debian: libfuse2 and fuse3) and the Python package fusepy",
}

_keep_thread_state = ctypes.pythonapi.PyGILState_Ensure
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_memory.restype = ctypes.py_object
_READ_ONLY, _WRITABLE = 0x100, 0x200
_REMEMBERED = 1000
_free = ctypes.CDLL(None).free
_free.argtypes = [ctypes.c_void_p]
_FUSE_BUF_BYTES, _FUSE_BUF_MEM = 128, 16
"""struct fuse_buf, with room for what later versions add; where in it libfuse notes the memory that it has made."""


class Filesystem(Protocol):
    """What is mounted.  ``path`` is as libfuse gives it, or None where ``fh`` says it all.  Any method may raise
    OSError or UkaiError.
    """

    def getattr(self, path: bytes | None, fh: int | None) -> dict[str, int]:
        """Fields of struct stat; times in nanoseconds as ``st_mtime`` and so on."""
        ...

    def readdir(self) -> list[str]: ...

    def open(self, path: bytes, flags: int) -> int: ...

    def read(self, fh: int, into: memoryview, offset: int) -> int:
        """Fill ``into``, libfuse's own buffer, which is valid until this returns."""
        ...

    def write(self, fh: int, data: memoryview, offset: int) -> int: ...

    def fsync(self, fh: int) -> None: ...

    def release(self, fh: int) -> None: ...

    def truncate(self, path: bytes | None, fh: int | None, length: int) -> None: ...

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None: ...

    def statfs(self) -> dict[str, int]:
        """Fields of struct statvfs."""
        ...

    def chmod(self, path: bytes | None, fh: int | None, mode: int) -> None: ...

    def chown(self, path: bytes | None, fh: int | None, uid: int, gid: int) -> None: ...

    def utimens(self, path: bytes | None, fh: int | None, mtime_ns: int | None) -> None: ...


@dataclass(frozen=True)
class Library:
    """A binding that was found to work."""

    name: str
    module: Any
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} with libfuse {self.version[0]}.{self.version[1]}"

    def run(
        self,
        filesystem: Filesystem,
        mount_point: str,
        allow_other: bool,
        mounted: Callable[[], None],
        spares: Spares | None = None,
    ) -> int:
        """Mount and serve until unmounted; returns libfuse's exit code (0: it was unmounted).

        Not on the main thread: there no Python signal handler would run.  ``mounted`` is called once requests
        are taken.  With ``spares``, and where libfuse can do that, its own loop has one thread.
        """
        if self.version < (3, 12):
            spares = None
        callbacks = _Callbacks(self.module, filesystem, self.version[0], mounted, spares)
        operations = callbacks.structure()
        options = ["fsname=ukai", "subtype=ukai", "nosuid", "nodev", f"attr_timeout={ATTRIBUTE_SECONDS}"]
        options.append(f"entry_timeout={ATTRIBUTE_SECONDS}")
        if allow_other:
            # who may open a disk is what chmod and chown say (libvirt gives it to the machine's user)
            options += ["allow_other", "default_permissions"]
        if self.version[0] == 2:
            options += ["direct_io", "big_writes", f"max_background={MAX_BACKGROUND}"]
        words, point = [b"ukai", b"-o", ",".join(options).encode()], os.fsencode(mount_point)
        library = self.module._libfuse
        if spares is not None:
            return _run_beside(library, words, operations, point, spares)
        words += [b"-f", point]
        argv = (ctypes.c_char_p * len(words))(*words)
        return int(library.fuse_main_real(len(words), argv, ctypes.byref(operations), ctypes.sizeof(operations), None))


def load(wanted: str) -> Library:
    """The binding ``wanted``: mfusepy, fusepy, or auto for the first of them that works.

    Raises UkaiError with one line that says what to install.
    """
    if wanted != "auto":
        return _load(wanted)
    try:
        return _load("mfusepy")
    except UkaiError as first:
        try:
            return _load("fusepy")
        except UkaiError as second:
            raise UkaiError(f"no FUSE library: {first.message}; or {second.message}") from None


def _load(name: str) -> Library:
    os.environ["FUSE_LIBRARY_NAME"] = "fuse3"  # mfusepy takes libfuse2 first; fusepy doesn't look at it
    os.environ.pop("FUSE_LIBRARY_PATH", None)  # fusepy with libfuse3 crashes
    try:
        module = importlib.import_module("fuse" if name == "fusepy" else name)
        number = int(module._libfuse.fuse_version())
    except (ImportError, OSError, AttributeError) as e:
        raise UkaiError(f"{name} can't be used ({e}): {INSTALL[name]}") from None
    version = (number // 10, number % 10) if number < 100 else (number // 100, number % 100)
    if name == "mfusepy" and version[0] != 3:
        raise UkaiError(f"mfusepy has found libfuse {number}, not libfuse3: {INSTALL[name]}")
    if name == "fusepy" and version != (2, 9):
        raise UkaiError(f"fusepy has found libfuse {number}, not libfuse 2.9: {INSTALL[name]}")
    return Library(name, module, version)


class _Arguments(ctypes.Structure):
    """struct fuse_args"""

    _fields_ = (("argc", ctypes.c_int), ("argv", ctypes.POINTER(ctypes.c_char_p)), ("allocated", ctypes.c_int))


def _run_beside(library: Any, words: list[bytes], operations: ctypes.Structure, point: bytes, spares: Spares) -> int:
    """What fuse_main does, with libfuse's loop on this thread and others beside it.

    They have to end after the loop, and before anything of the session is given up: fuse_main leaves no time for that.
    """
    for name in ("loop", "unmount", "destroy"):
        getattr(library, f"fuse_{name}").argtypes = [ctypes.c_void_p]
    library.fuse_mount.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.fuse_new.restype = ctypes.c_void_p
    library.fuse_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    arguments = _Arguments(len(words), (ctypes.c_char_p * len(words))(*words), 0)
    fuse = library.fuse_new(ctypes.byref(arguments), ctypes.byref(operations), ctypes.sizeof(operations), None)
    if not fuse:
        return NOT_MADE
    try:
        if library.fuse_mount(fuse, point) != 0:
            return NOT_MOUNTED
        failed = library.fuse_loop(fuse) != 0
        if failed:
            library.fuse_unmount(fuse)  # or the others would wait for requests for ever
        spares.close()
        library.fuse_unmount(fuse)
        return LOOP_FAILED if failed else 0
    finally:
        library.fuse_destroy(fuse)


def _server(library: Any, session: int) -> Callable[[Callable[[], bool]], None]:
    """Takes requests of the mount, as libfuse's own threads do, while what it is given says yes.

    The types of libfuse's functions are set once, here: to set them while another thread is in a call is its end.
    """
    receive, process, exited = (
        getattr(library, f"fuse_session_{name}") for name in ("receive_buf", "process_buf", "exited")
    )
    receive.argtypes = process.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    exited.argtypes = [ctypes.c_void_p]

    def serve(wanted: Callable[[], bool]) -> None:
        buffer = ctypes.create_string_buffer(_FUSE_BUF_BYTES)
        try:
            while wanted() and not exited(session):
                got = receive(session, buffer)
                if got > 0:
                    process(session, buffer)
                elif got not in (-errno.EINTR, -errno.EAGAIN):
                    break  # unmounted
        finally:
            _free(ctypes.c_void_p.from_buffer(buffer, _FUSE_BUF_MEM))

    return serve


def _guarded(name: str, work: Callable[..., int], seen: threading.local | None) -> Callable[..., int]:
    """The callback for libfuse: no exception leaves it, and only a return of ``work`` is success.

    Python makes a state for a foreign thread at each callback and throws it away after it.  With ``seen`` it is
    kept, which at depth 16 gave a third more requests; only for threads that live as long as the mount does.
    """

    def callback(*args: Any) -> int:
        try:
            if seen is not None and not hasattr(seen, "yes"):
                seen.yes = True
                _keep_thread_state()
            return work(*args)
        except BaseException as error:
            try:
                return -_errno(name, error)
            except BaseException:  # not even the log works
                return -errno.EIO

    return callback


def _errno(name: str, error: BaseException) -> int:
    if isinstance(error, OSError) and isinstance(error.errno, int) and 0 < error.errno < ERRNO_LIMIT:
        return error.errno
    if isinstance(error, UkaiError):
        return error.errno
    log.error("%s failed in the frontend itself, the caller gets EIO", name, exc_info=error)
    return errno.EIO


class _Memory:
    """libfuse's memory as Python sees it.

    The same few addresses come again and again, so what is made for one is kept: half a microsecond of each request.
    A view is of use only during the callback that was given its address.
    """

    def __init__(self, handle: Any) -> None:
        """``handle``: the class of struct fuse_file_info."""
        self._offset = handle.fh.offset
        self._views: dict[tuple[int, int, int], memoryview] = {}
        self._handles: dict[int, Any] = {}

    def view(self, address: int, size: int, access: int) -> memoryview:
        view = self._views.get((address, size, access))
        if view is None:
            if len(self._views) >= _REMEMBERED:
                self._views.clear()
            view = self._views[address, size, access] = _memory(address, size, access)
        return view

    def handle(self, info: int) -> int:
        """``fh`` of the struct fuse_file_info there."""
        number = self._handles.get(info)
        if number is None:
            if len(self._handles) >= _REMEMBERED:
                self._handles.clear()
            number = self._handles[info] = ctypes.c_uint64.from_address(info + self._offset)
        return int(number.value)


_TRANSFER = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_longlong, ctypes.c_void_p)
)
"""read and write, with addresses as plain numbers."""


class _Callbacks:
    """The functions that libfuse calls.  libfuse3 gives some of them one argument more than libfuse2 does."""

    def __init__(
        self, module: Any, filesystem: Filesystem, major: int, mounted: Callable[[], None], spares: Spares | None
    ) -> None:
        self._module, self._fs, self._major, self._mounted = module, filesystem, major, mounted
        self._spares = spares
        self._memory = _Memory(module.fuse_file_info)
        self._kept: list[Any] = []
        """Callbacks that libfuse knows by another type."""

    def structure(self) -> ctypes.Structure:
        """struct fuse_operations; what has no callback stays empty."""
        kind = self._module.fuse_operations if self._major == 3 else _with_fallocate(self._module)
        operations: ctypes.Structure = kind()
        work: dict[str, Callable[..., int]] = {name: self._refusal(number) for name, number in REFUSED.items()}
        for name in (
            *("init", "getattr", "readdir", "open", "read", "write", "fsync", "release", "truncate"),
            *("fallocate", "statfs", "chmod", "chown", "utimens"),
        ):
            work[name] = getattr(self, "_" + name)
        if self._major == 2:
            work["fgetattr"], work["ftruncate"] = self._getattr, self._truncate
            operations.flag_nullpath_ok = operations.flag_nopath = 1
        # libfuse2 ends idle threads and makes new ones: what is kept for each would pile up
        seen = threading.local() if self._major == 3 else None
        for field in kind._fields_:
            name, prototype = field[:2]
            if name in ("read", "write"):
                self._kept.append(_TRANSFER(_guarded(name, work[name], seen)))
                setattr(operations, name, ctypes.cast(self._kept[-1], prototype))
            elif name in work:
                setattr(operations, name, prototype(_guarded(name, work[name], seen)))
        return operations

    @staticmethod
    def _refusal(number: int) -> Callable[..., int]:
        def refuse(*_: Any) -> int:
            return -number

        return refuse

    def _init(self, connection: Any, config: Any = None) -> int:
        if config is not None:
            connection.contents.max_background = MAX_BACKGROUND
            connection.contents.congestion_threshold = MAX_BACKGROUND * 3 // 4
            connection.contents.want &= ~_SPLICE  # data go through memory anyway: pipes only add system calls
            config.contents.nullpath_ok = 1
            config.contents.direct_io = 1
        if self._spares is not None:
            self._spares.start(_server(self._module._libfuse, self._session()))
        self._mounted()
        return 0

    def _session(self) -> int:
        """libfuse's session, from within a callback."""
        library = self._module._libfuse
        session = library.fuse_get_session
        session.argtypes, session.restype = [ctypes.c_void_p], ctypes.c_void_p
        return int(session(library.fuse_get_context().contents.fuse))

    def _getattr(self, path: bytes | None, buffer: Any, info: Any = None) -> int:
        fields = self._fs.getattr(path, info.contents.fh if info else None)
        ctypes.memset(buffer, 0, ctypes.sizeof(self._module.c_stat))
        stat = buffer.contents
        for name, value in fields.items():
            if name.endswith("time"):
                spec = getattr(stat, name + "spec")
                spec.tv_sec, spec.tv_nsec = divmod(value, 10**9)
            else:
                setattr(stat, name, value)
        return 0

    def _readdir(self, path: bytes | None, buffer: Any, fill: Any, *_: Any) -> int:
        for name in (".", "..", *self._fs.readdir()):
            if fill(buffer, name.encode(), None, 0, *([0] if self._major == 3 else [])):
                return -errno.ENOMEM
        return 0

    def _open(self, path: bytes, info: Any) -> int:
        contents = info.contents
        contents.fh = self._fs.open(path, contents.flags)
        return 0

    def _read(self, path: int | None, buffer: int, size: int, offset: int, info: int) -> int:
        if size <= SMALL_BYTES and (spares := self._spares) is not None:
            spares.served += 1
        memory = self._memory
        return self._fs.read(memory.handle(info), memory.view(buffer, size, _WRITABLE), offset)

    def _write(self, path: int | None, buffer: int, size: int, offset: int, info: int) -> int:
        memory = self._memory
        return self._fs.write(memory.handle(info), memory.view(buffer, size, _READ_ONLY), offset)

    def _fsync(self, path: bytes | None, datasync: int, info: Any) -> int:
        self._fs.fsync(info.contents.fh)
        return 0

    def _release(self, path: bytes | None, info: Any) -> int:
        self._fs.release(info.contents.fh)
        return 0

    def _truncate(self, path: bytes | None, length: int, info: Any = None) -> int:
        self._fs.truncate(path, info.contents.fh if info else None, length)
        return 0

    def _fallocate(self, path: bytes | None, mode: int, offset: int, length: int, info: Any) -> int:
        self._fs.fallocate(info.contents.fh, mode, offset, length)
        return 0

    def _statfs(self, path: bytes | None, buffer: Any) -> int:
        fields = self._fs.statfs()
        for name, value in fields.items():
            setattr(buffer.contents, name, value)
        return 0

    def _chmod(self, path: bytes | None, mode: int, info: Any = None) -> int:
        self._fs.chmod(path, info.contents.fh if info else None, mode)
        return 0

    def _chown(self, path: bytes | None, uid: int, gid: int, info: Any = None) -> int:
        # −1, which means unchanged, arrives as the largest number
        uid, gid = (-1 if n == 2**32 - 1 else n for n in (uid, gid))
        self._fs.chown(path, info.contents.fh if info else None, uid, gid)
        return 0

    def _utimens(self, path: bytes | None, times: Any, info: Any = None) -> int:
        fh = info.contents.fh if info else None
        now, omit = 2**30 - 1, 2**30 - 2  # UTIME_NOW, UTIME_OMIT
        mtime = times.contents.modtime if times else None
        if mtime is None or mtime.tv_nsec == now:
            self._fs.utimens(path, fh, None)
        elif mtime.tv_nsec != omit:
            self._fs.utimens(path, fh, mtime.tv_sec * 10**9 + mtime.tv_nsec)
        return 0


def _with_fallocate(module: Any) -> Any:
    """fusepy's structure ends before the fields that libfuse 2.9 has added."""
    fields = list(module.fuse_operations._fields_)
    handle = ctypes.POINTER(module.fuse_file_info)
    offset = ctypes.c_longlong
    fields += [(name, ctypes.c_void_p) for name in ("poll", "write_buf", "read_buf", "flock")]
    fields.append(("fallocate", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, offset, offset, handle)))
    return type("fuse_operations", (ctypes.Structure,), {"_fields_": fields})

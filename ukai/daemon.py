"""What the three daemons have in common: settings, signals, the loop and the way out.

Everything that can be wrong for the user is found before the first thread, bind or mount.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import zmq

from ukai import __version__, fault_dir, messages
from ukai.config import Config, load
from ukai.errors import UkaiError
from ukai.node import own_address
from ukai.polling import BusySelector, Patience
from ukai.telemetry import Telemetry, log_to_stderr

log = logging.getLogger(__name__)

EXIT_USAGE = 2
EXIT_NOT_HERE = 64
"""metad on a node that is not metad's: supervisord takes it as expected."""

PR_SET_IO_FLUSHER = 57
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
GC_OBJECTS = 20_000
"""New objects between two looks for cycles.  Python's 700 made a large snapshot of the metadata cost four times as
much: it is all new, and has no cycles."""
KEPT_BYTES = 16 * 2**20
LARGEST_BYTES = 16 * 2**20
"""Beyond it a piece of memory is given back to the kernel as soon as it is free."""
ARENAS = 4
"""Each of malloc's heaps keeps memory of its own, and libfuse has many threads."""


class Server(Protocol):
    """A daemon's sockets and tasks."""

    async def start(self) -> None: ...

    async def stop(self) -> bool:
        """Drain and close; false when something forbids it (the process then goes on)."""
        ...


Factory = Callable[[Config, str, "zmq.Context[Any]", Telemetry], Server]


def be_io_flusher() -> None:
    """Ask the kernel not to wait for our own writeback when it needs memory; not permitted is fine."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def keep_memory() -> None:
    """Have malloc keep some free memory: else that of each large request comes from the kernel anew, page by page."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES)
        libc.mallopt(_M_ARENA_MAX, ARENAS)


def main(
    process: str,
    factory: Factory,
    *,
    check: Callable[[Config, str], int | None] | None = None,
    busy_poll: bool = False,
    argv: list[str] | None = None,
) -> int:
    """Run one daemon until it is told to stop; returns its exit code.

    ``check(config, node)`` looks for what can be wrong (raises UkaiError) or returns an exit code to leave with.
    ``busy_poll``: its loop is one that guests wait for.
    """
    parser = argparse.ArgumentParser(prog=f"ukai-{process}", description=f"The {process} process of UKAI.")
    parser.add_argument("--config", help="settings, a TOML file (default: $UKAI_CONFIG or /etc/ukai/ukai.toml)")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args(argv)
    try:
        config = load(options.config)
        node = own_address(config)
        log_to_stderr(node, process, config.log_level, config.log_format)
        if config.fault_dir:
            fault_dir.arm(config.fault_dir, node, process)
        code = check(config, node) if check is not None else None
        if code is not None:
            return code
        be_io_flusher()
        keep_memory()
        loop_factory = functools.partial(_busy_loop, config.busy_poll_us) if busy_poll and config.busy_poll_us else None
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_serve(process, factory, config, node))
    except UkaiError as e:
        print(f"ukai-{process}: {e.message}", file=sys.stderr)
        return EXIT_USAGE if e.exit_code == EXIT_USAGE else 1
    except zmq.ZMQError as e:
        print(f"ukai-{process}: cannot open a socket: {e}; is another one running on this node?", file=sys.stderr)
        return 1


def _busy_loop(limit_us: float) -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(BusySelector(Patience(limit_us)))


async def _serve(process: str, factory: Factory, config: Config, node: str) -> int:
    loop = asyncio.get_running_loop()
    context: zmq.Context[Any] = zmq.Context()
    wanted = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, wanted.set)
    try:
        telemetry = Telemetry(context, config.events_endpoint(process, node), node, process, config.metrics_interval)
        try:
            server = factory(config, node, context, telemetry)
            telemetry.start()
            await server.start()
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_OBJECTS)
            how = ", not compiled" if str(messages.__file__).endswith(".py") else ""
            log.info("%s %s of node %s runs as process %d%s", process, __version__, node, os.getpid(), how)
            while True:
                await wanted.wait()
                wanted.clear()
                if await server.stop():
                    break
            log.info("stopped")
        finally:
            telemetry.close()
    finally:
        context.destroy(linger=0)
    return 0


def supervise(name: str, work: Awaitable[None]) -> asyncio.Task[None]:
    """Run a background task whose end by an exception is a defect: logged, and the process ends.

    A half-dead daemon is worse than one that supervisord starts anew.
    """

    async def run() -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException:
            log.exception("%s failed; the process ends to be started anew", name)
            os._exit(70)

    return asyncio.get_running_loop().create_task(run(), name=name)

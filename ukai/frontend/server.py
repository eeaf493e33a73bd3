"""The frontend's parts put together: the metadata, the requests to blockd, the mount; and the way out of it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import zmq

from ukai.config import Config
from ukai.daemon import supervise
from ukai.errors import RemoteProtocolError, UkaiError
from ukai.frontend import binding, core, mount
from ukai.frontend.borrower import Borrower
from ukai.frontend.client import Client
from ukai.frontend.files import Files
from ukai.frontend.spare import Spares
from ukai.metalink import MetadLink
from ukai.model import Change
from ukai.telemetry import Telemetry

log = logging.getLogger(__name__)

FORCE_SECONDS = 10.0
"""A second SIGTERM within this time unmounts under open images."""
DRAIN_SECONDS = 5.0
END_SECONDS = 10.0
BUSY_SECONDS = 0.05
BUSY_TRIES = 10


class FrontendServer:
    """Implements ``daemon.Server``.  libfuse runs in a thread of its own and calls ``Files`` in more of them."""

    def __init__(self, config: Config, node: str, context: zmq.Context[Any], telemetry: Telemetry) -> None:
        self._config, self._node, self._metrics = config, node, telemetry.metrics
        self._library = binding.load(config.fuse_binding)
        borrower = Borrower(config.loans_socket, config.lent_files_limit) if config.short_circuit else None
        self._client = Client(
            context,
            config.blockd_endpoint,
            config.io_timeout,
            config.beat_interval,
            borrower,
            config.busy_poll_us,
        )
        self._files = Files(self._client, self._metrics, config.io_timeout)
        self._files.on_release = self._released
        self._link = MetadLink(context, config, detail=False, on_garbage=self._garbage)
        self._link.mirror.on_change.append(self._changed)
        self._link.mirror.on_reset.append(self._show)
        self._metrics.gauges.append(self._gauges)
        self._loop = asyncio.get_running_loop()
        self._mounted = asyncio.Event()
        self._ended = asyncio.Event()
        self._result = 0
        self._thread = threading.Thread(target=self._serve, name="fuse", daemon=True)
        self._mount: mount.Mount | None = None
        self._asked_at = 0.0
        self._leaving = False
        self._idle = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._leaver: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Mount.  Raises UkaiError when libfuse can't."""
        self._client.start()
        self._link.start()
        self._thread.start()
        waits = [asyncio.ensure_future(event.wait()) for event in (self._mounted, self._ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._ended.is_set():
            self._close()
            raise UkaiError(f"{self._config.mount_point} could not be mounted with {self._library}; see above")
        self._mount = mount.find(self._config.mount_point)
        self._watcher = supervise("the mount", self._watch())
        log.info("mounted at %s: %s", self._config.mount_point, self._library)

    def _serve(self) -> None:
        try:
            allow_other = mount.allows_other()
            spares = Spares(self._client)
            self._result = self._library.run(
                self._files, self._config.mount_point, allow_other, self._is_mounted, spares
            )
        except BaseException:
            log.critical("libfuse could not be run", exc_info=True)
            self._result = 1
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)

    def _is_mounted(self) -> None:
        self._loop.call_soon_threadsafe(self._mounted.set)

    async def _watch(self) -> None:
        """Ends the process when somebody else has unmounted: supervisord mounts anew by starting it again."""
        await self._ended.wait()
        if not self._leaving:
            raise UkaiError(f"{self._config.mount_point} was unmounted by somebody else")

    # -- metadata and metrics

    def _changed(self, change: Change) -> None:
        if change["t"] in ("image", "image-drop"):
            self._show()

    def _show(self) -> None:
        images = self._link.mirror.cluster.images.values()
        self._files.show(core.shown(images, self._node, self._files.disks, time.time_ns()))

    def _garbage(self, error: RemoteProtocolError) -> None:
        self._metrics.count("ukai_protocol_errors_total")

    def _gauges(self) -> Iterable[tuple[str, dict[str, str], float]]:
        requests, size = self._client.under_way()
        yield "ukai_inflight_requests", {}, requests
        yield "ukai_inflight_bytes", {}, size
        yield "ukai_open_handles", {}, len(self._client.handles())
        yield "ukai_peers_up", {}, int(self._client.connected)
        yield "ukai_metadata_seq", {}, self._link.mirror.seq
        if errors := self._client.protocol_errors:
            self._client.protocol_errors = 0
            self._metrics.count("ukai_protocol_errors_total", errors)

    # -- the way out

    def _released(self) -> None:
        """From libfuse's threads."""
        if self._leaving and not self._client.handles():
            self._loop.call_soon_threadsafe(self._idle.set)

    async def stop(self) -> bool:
        """Unmount.

        With images open: false, and the process stops when the last one is closed; asked again within
        ``FORCE_SECONDS``, it unmounts under them.
        """
        now = time.monotonic()
        forced = self._leaving and now < self._asked_at + FORCE_SECONDS
        self._asked_at, self._leaving = now, True
        if not await self._unmounted():
            if not forced:
                self._put_off()
                return False
            await self._force()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._ended.wait()
        except TimeoutError:
            log.warning("libfuse does not end; the process ends without it")
            os._exit(0)
        await asyncio.to_thread(self._thread.join)
        self._close()
        return True

    async def _unmounted(self) -> bool:
        """Try to unmount.  Open or busy for a moment after the last close is normal: the kernel tells us late."""
        point = self._config.mount_point
        for attempt in range(BUSY_TRIES):
            if self._ended.is_set():
                return True
            try:
                free = not self._client.handles() and mount.find(point) == self._mount
                if free and await asyncio.to_thread(mount.unmount, point):
                    return True
            except OSError as e:
                if attempt == 0:
                    log.warning("%s can't be unmounted: %s", point, e)
            await self._pause(BUSY_SECONDS)
        return self._ended.is_set()

    async def _pause(self, seconds: float) -> None:
        """Until the mount has ended, but not longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            pass

    def _put_off(self) -> None:
        point = self._config.mount_point
        names = sorted({h.disk.name for h in self._client.handles()})
        why = f"under open images: {', '.join(names)}" if names else "while it is in use (by a shell in it?)"
        log.warning(
            "not unmounting %s %s; the process stops as soon as it can, or when told again within %g s",
            point,
            why,
            FORCE_SECONDS,
        )
        if self._leaver is None:
            self._leaver = supervise("the end", self._leave())

    async def _leave(self) -> None:
        """Wait until nothing is open, unmount, and ask for the stop that was put off."""
        while not await self._unmounted():
            self._idle.clear()
            if self._client.handles():
                await self._idle.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    async def _force(self) -> None:
        """Requests under way get their time; then the kernel is made to fail the rest."""
        point = self._config.mount_point
        names = sorted({h.disk.name for h in self._client.handles()})
        log.warning("unmounting %s under open images: %s", point, ", ".join(names))
        try:
            await asyncio.to_thread(mount.detach, point)
        except UkaiError as e:
            log.warning("%s", e.message)
        end = time.monotonic() + DRAIN_SECONDS
        while self._client.under_way()[0] and time.monotonic() < end:
            await self._pause(BUSY_SECONDS)
        aborted = self._mount is not None and await asyncio.to_thread(mount.abort, self._mount)
        self._client.give_up()
        for handle in self._client.handles():
            await asyncio.to_thread(self._client.close_handle, handle)
        if not aborted:
            log.warning("the kernel could not be told to end the requests; the process ends without them")
            os._exit(0)

    def _close(self) -> None:
        for task in (self._watcher, self._leaver):
            if task is not None:
                task.cancel()
        self._link.close()
        self._client.close()

"""What the processes publish, as an iterator: log records and metrics of many processes from one SUB socket."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import zmq

from ukai import messages
from ukai.config import Config
from ukai.errors import RemoteProtocolError

PROCESSES = ("metad", "blockd", "frontend")
LEVELS = ("debug", "info", "warning", "error", "critical")
QUEUE_MESSAGES = 100_000
LOG_SIZE_LIMIT_BYTES = 8 * 2**20


class Source(NamedTuple):
    """A process that publishes."""

    node: str
    process: str


def sources(config: Config, nodes: Iterable[str], node: str | None, process: str | None) -> list[Source]:
    """Who is to be followed: blockd and frontend on each node, metad on its own."""
    every = [Source(config.metad_address, "metad")]
    every += [Source(n, p) for n in dict.fromkeys(nodes) for p in PROCESSES[1:]]
    return [s for s in every if node in (None, s.node) and process in (None, s.process)]


def levels_from(lowest: str) -> tuple[str, ...]:
    """``lowest`` and all that are graver."""
    return LEVELS[LEVELS.index(lowest) :]


class Follower:
    """Iterates over (kind, fields) with kind ``log`` or ``metric``; a context manager.

    PUB sends nothing to those who come late, and does not say when a subscription counts.  So metrics, which every
    process publishes now and then, are always subscribed to as well: a source is ``heard`` once anything has come
    from it, and only then is its log known to be complete from here on.  ``on_join`` is called once: when all
    sources are heard or ``join_timeout_s`` is over, with those that are not.
    """

    def __init__(
        self,
        config: Config,
        following: list[Source],
        *,
        levels: tuple[str, ...] = (),
        metrics: bool = False,
        join_timeout_s: float,
        for_s: float | None = None,
        on_join: Callable[[list[Source]], None] | None = None,
    ) -> None:
        now = time.monotonic()
        self.unheard = list(following)
        self.garbage_count = 0
        self._metrics = metrics
        self._join_at = now + join_timeout_s
        self._end_at = None if for_s is None else now + for_s
        self._on_join = on_join
        self._joined = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.set(zmq.RCVHWM, QUEUE_MESSAGES)
        self._socket.set(zmq.MAXMSGSIZE, LOG_SIZE_LIMIT_BYTES)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.set(zmq.HEARTBEAT_IVL, 1000)
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, 3000)
        for source in following:
            for level in levels:
                self._socket.subscribe(f"log.{source.node}.{source.process}.{level}.")
            self._socket.subscribe(_metric_topic(source))
            self._socket.connect(config.events_endpoint(source.process, source.node))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._watch_reader()

    def _watch_reader(self) -> None:
        """A pipe whose reader is gone ends us at once, not with the next record."""
        try:
            self._reader: int | None = sys.stdout.fileno()
        except (OSError, ValueError, AttributeError):
            self._reader = None
            return
        self._poller.register(self._reader, zmq.POLLERR)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close(0)
        self._context.term()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return self

    def __next__(self) -> tuple[str, dict[str, Any]]:
        """Raises StopIteration at the end of the time, BrokenPipeError when nobody reads our output any more."""
        while True:
            now = time.monotonic()
            if not self._joined and (not self.unheard or now >= self._join_at):
                self._join()
            if self._end_at is not None and now >= self._end_at:
                raise StopIteration
            ready = dict(self._poller.poll(self._patience_ms(now)))
            if self._reader in ready and ready[self._reader] & zmq.POLLERR:
                raise BrokenPipeError
            if self._socket in ready:
                item = self._take()
                if item is not None:
                    return item

    def _patience_ms(self, now: float) -> int | None:
        moments = [] if self._joined else [self._join_at]
        if self._end_at is not None:
            moments.append(self._end_at)
        return max(0, int((min(moments) - now) * 1000) + 1) if moments else None

    def _take(self) -> tuple[str, dict[str, Any]] | None:
        frames = self._socket.recv_multipart(zmq.DONTWAIT)
        kind = frames[0].partition(b".")[0].decode("ascii", "replace")
        try:
            if len(frames) != 2:
                raise RemoteProtocolError("a publication is a topic and a header")
            fields = messages.unpack(frames[1])
            source = Source(messages.text(fields, "node"), messages.text(fields, "process"))
        except RemoteProtocolError:
            self.garbage_count += 1
            return None
        if source in self.unheard:
            self.unheard.remove(source)
            if not self._metrics:
                self._socket.unsubscribe(_metric_topic(source))
        return (kind, fields) if kind == "log" or self._metrics else None

    def _join(self) -> None:
        self._joined = True
        if self._on_join is not None:
            self._on_join(list(self.unheard))


def _metric_topic(source: Source) -> str:
    return f"metric.{source.node}.{source.process}."


def name_all(following: Iterable[Source]) -> str:
    return ", ".join(f"{s.process} on {s.node}" for s in following)

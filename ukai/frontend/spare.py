"""Threads for when all of libfuse's wait.

libfuse has few of them (``THREADS``): the more there are, the more they take the interpreter from each other, and each
one that waits for a request is woken for one that another would have taken a moment later.  But a copy in another data
centre answers late, and a disk none of whose copies can be reached waits for ``io_timeout``: with all threads waiting,
the other disks of this hypervisor would stand still too.  So where all threads wait, and not for the processor, spare
ones take requests too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

THREADS = 10
LIMIT = 128
"""So many spare threads at most."""
LOOK_S = 0.02
IDLE, BUSY = 0.5, 0.7
"""Below, and above, so much of a core of this process, more threads can do more, or only disturb each other."""
MARGIN = 2
"""So many threads at least should be free to take requests."""

Serve = Callable[[Callable[[], bool]], None]
"""Takes requests of the mount as long as what it is given says yes, or until the mount has ended."""


class Crowd(Protocol):
    """Who knows which threads wait: ``Client``."""

    crowded: threading.Event
    crowd: int
    """``crowded`` is set when so many requests wait."""

    def under_way(self) -> tuple[int, int]:
        """Requests that wait now, and their bytes."""
        ...


class Spares:
    """The spare threads of a mount."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._threads: list[threading.Thread] = []
        self._needed = False
        self._watcher: threading.Thread | None = None
        self._end = threading.Event()

    def start(self, serve: Serve) -> None:
        self._crowd.crowd = THREADS - MARGIN
        self._watcher = threading.Thread(target=self._watch, args=(serve,), name="spares", daemon=True)
        self._watcher.start()

    def count(self) -> int:
        """Spare threads that live."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return len(self._threads)

    def _watch(self, serve: Serve) -> None:
        crowd = self._crowd
        while crowd.crowded.wait() and not self._end.is_set():
            crowd.crowded.clear()
            waited, began, used_s = crowd.under_way()[0], time.monotonic(), time.process_time()
            if self._end.wait(LOOK_S):
                return
            waiting = crowd.under_way()[0]
            busy = (time.process_time() - used_s) / (time.monotonic() - began)
            if self._adjust(min(waited, waiting), busy, serve) or waiting >= crowd.crowd:
                crowd.crowded.set()  # who waits already does not say so again

    def _adjust(self, waiting: int, busy: float, serve: Serve) -> int:
        """``busy``: how much of a core this process uses.  The spare threads that there are now."""
        count = self.count()
        if waiting >= THREADS + count - MARGIN and busy < IDLE:
            self._needed = True
            for _ in range(min(waiting, LIMIT - count)):
                thread = threading.Thread(target=serve, args=(lambda: self._needed,), name="spare", daemon=True)
                thread.start()
                self._threads.append(thread)
        elif waiting < THREADS // 2 or busy > BUSY:
            self._needed = False  # each ends after its next request
        return self.count()

    def close(self) -> None:
        """The mount has ended: no spare thread gets another request."""
        self._end.set()
        self._crowd.crowded.set()
        if self._watcher is not None:
            self._watcher.join()  # it begins none any more
        self._needed = False
        for thread in self._threads:
            thread.join()

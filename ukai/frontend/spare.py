"""How many threads take requests of the mount.

All of them share one interpreter.  The more there are, the more they take it from each other; but one that waits for an
answer takes nothing else meanwhile.  So there are three states:

- as a rule ``THREADS``: libfuse's own one and its *deputies*;
- where many small reads are under way, which need the interpreter more than anything else, threads only hand it to
  each other: one makes two to four times as many, and the slowest of them in a tenth of the time.  Then libfuse's own
  thread is alone, and for each one that waits a deputy stands in;
- a copy in another data centre answers late, and a disk none of whose copies can be reached waits for ``io_timeout``:
  with all threads waiting, the other disks of this hypervisor would stand still too.  So where all threads wait, and
  not for the processor, spare ones take requests too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

DEPUTIES = 9
THREADS = 1 + DEPUTIES
"""The first is in libfuse's own loop, and never pauses."""
LIMIT = 128
"""So many spare threads at most."""
LOOK_S = 0.02
REST_S = 0.2
"""Between two looks while there is little to do."""
IDLE, BUSY = 0.5, 0.7
"""Below, and above, so much of a core of this process, more threads can do more, or only disturb each other."""
ALONE_ENDS, ALONE_BEGINS = 0.45, 0.6
"""The same for the deputies.  One request at a time takes 0.4 to 0.5 of a core."""
SMALL_S = 250e-6
"""Where there is less of the processor's time for each read, it is mostly the interpreter's."""
SMALL_BYTES = 64 * 2**10
"""Other reads do not count: it is the kernel that works for them, and beside the interpreter."""
SEVERAL = 0.3
"""So much less of a core tells the same where several threads wait at the same time."""
NEEDLESS = 16
"""A deputy pauses when so many times in a row one more was there than needed: to wake it costs more than to keep it."""
MARGIN = 2
"""So many threads at least should be free to take requests."""

Serve = Callable[[Callable[[], bool]], None]
"""Takes requests of the mount as long as what it is given says yes, or until the mount has ended."""


class Crowd(Protocol):
    """Who knows which threads wait: ``Client``."""

    crowded: threading.Event
    crowd: int
    """``crowded`` is set when so many requests wait."""
    stand_in: Callable[[], None] | None
    """To be called when a request begins to wait; None: nobody wants to know."""

    def waiting(self) -> int:
        """Threads that wait for an answer now."""
        ...


class Spares:
    """The threads of a mount beside libfuse's own."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self.served = 0
        """Small reads so far, about: the threads count without a lock."""
        self._deputies: list[threading.Thread] = []
        self._threads: list[threading.Thread] = []
        self._needed = False
        self._watcher: threading.Thread | None = None
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._alone = False
        self._pause = threading.Semaphore(0)
        """Where deputies pause."""
        self._out = DEPUTIES
        """Deputies that do not."""
        self._needless = 0

    def start(self, serve: Serve) -> None:
        self._crowd.crowd = THREADS - MARGIN
        self._watcher = threading.Thread(target=self._watch, args=(serve,), name="spares", daemon=True)
        self._watcher.start()
        for _ in range(DEPUTIES):
            deputy = threading.Thread(target=serve, args=(self._deputy_wanted,), name="deputy", daemon=True)
            deputy.start()
            self._deputies.append(deputy)

    def count(self) -> int:
        """Spare threads that live."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return len(self._threads)

    def _watch(self, serve: Serve) -> None:
        crowd, pause = self._crowd, REST_S
        while not self._end.is_set():
            crowd.crowded.wait(pause)
            crowd.crowded.clear()
            waited, served, began, used_s = crowd.waiting(), self.served, time.monotonic(), time.process_time()
            if self._end.wait(LOOK_S):
                return
            waiting = crowd.waiting()
            used_s = time.process_time() - used_s
            busy = used_s / (time.monotonic() - began)
            constant = min(waited, waiting)
            self._set_alone(constant, busy, used_s / max(1, self.served - served))
            if self._adjust(constant, busy, serve) or waiting >= crowd.crowd:
                crowd.crowded.set()  # who waits already does not say so again
            pause = 0 if self._alone else REST_S

    # -- deputies

    def _set_alone(self, waiting: int, busy: float, each_s: float) -> None:
        """``waiting``: threads that wait; ``busy``: how much of a core this process uses; ``each_s``: that per read."""
        several = SEVERAL if waiting > 1 else 0.0
        if not self._alone and busy > ALONE_BEGINS - several and each_s < SMALL_S:
            self._crowd.stand_in = self._stand_in
            self._alone = True
        elif self._alone and (busy < ALONE_ENDS - several or each_s > 2 * SMALL_S):
            self._all_out()

    def _all_out(self) -> None:
        """No deputy pauses."""
        self._crowd.stand_in = None
        with self._lock:
            self._alone = False
            while self._out < DEPUTIES:
                self._out += 1
                self._pause.release()

    def _stand_in(self) -> None:
        """A request begins to wait."""
        with self._lock:
            if self._alone and self._out < min(DEPUTIES, self._crowd.waiting()):
                self._out += 1
                self._pause.release()

    def _deputy_wanted(self) -> bool:
        """Asked by a deputy before it takes a request; it may have to pause first."""
        if self._alone and self._is_needless():
            self._pause.acquire()
        return not self._end.is_set()

    def _is_needless(self) -> bool:
        """Whether a deputy is to pause now; it is counted as one that does."""
        with self._lock:
            if not self._alone or self._out <= self._crowd.waiting():
                self._needless = 0
                return False
            self._needless += 1
            if self._needless < NEEDLESS:
                return False
            self._needless = 0
            self._out -= 1
            return True

    # -- spare threads

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
        """The mount has ended: none of these threads gets another request."""
        self._end.set()
        self._crowd.crowded.set()
        if self._watcher is not None:
            self._watcher.join()  # it begins none any more
        self._needed = False
        self._all_out()
        for thread in (*self._deputies, *self._threads):
            thread.join()

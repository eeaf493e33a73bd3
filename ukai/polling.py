"""Looking again for a while instead of going to sleep.

To wake a process that sleeps costs more than all that is computed for a small request, most of all on a virtual
machine, where an idle core has to be woken through the host.  So who was woken soon several times running looks for
what it waits for, for up to ``busy_poll_us``, before it sleeps.  It sleeps at once where waits are long, and where
somebody else needs the core.
"""

from __future__ import annotations

import functools
import os
import select
import selectors
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

LATE_S = 0.0002
"""A look that takes longer gave the core, or the interpreter, to somebody else."""

EVENTS_AT_ONCE = 64
"""The others come in the next turn."""

_HIGHEST, _LOWEST, _CROWDED = 4, -4, -8
_SHORT, _LONG, _IN_VAIN = 1, -1, -3


class Patience:
    """Whether it pays to look for what is waited for, by what earlier waits were like."""

    __slots__ = ("_score", "limit_s")

    def __init__(self, limit_us: float) -> None:
        """``limit_us``: so long is looked for something; 0: never."""
        self.limit_s = limit_us / 1e6
        self._score = 0

    @property
    def pays(self) -> bool:
        return self._score > 0

    def waited(self, seconds: float, looked: bool) -> None:
        """A wait has lasted so long, and began with looking or did not."""
        if seconds < self.limit_s:
            self._score = min(self._score + _SHORT, _HIGHEST)
        elif self._score > _LOWEST:
            self._score = max(self._score + (_IN_VAIN if looked else _LONG), _LOWEST)

    def look(self, find: Callable[[], T], limit_s: float) -> T | None:
        """What ``find`` gives once it is true; None when it has not been within the limit, or the core is wanted.

        Who else wants the core waits for one round of this, so ``find`` should be one system call.
        """
        now = monotonic()
        until = now + min(limit_s, self.limit_s)
        while now < until:
            os.sched_yield()
            if found := find():
                return found
            before, now = now, monotonic()
            if now - before > LATE_S:
                self._score = _CROWDED
                break
        return None


class BusySelector(selectors.EpollSelector):
    """For a loop that answers requests of others."""

    def __init__(self, patience: Patience) -> None:
        super().__init__()
        self._patience = patience
        self._epoll: select.epoll = vars(self)["_selector"]  # the base class's own, as are its keys
        self._keys: dict[int, selectors.SelectorKey] = vars(self)["_fd_to_key"]
        self._look = functools.partial(self._epoll.poll, 0, EVENTS_AT_ONCE)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the base class does; the first part of a wait may be spent looking."""
        found = self._look()
        if not found and (timeout is None or timeout > 0):
            found = self._wait(timeout)
        ready = []
        for fd, event in found:
            key = self._keys.get(fd)
            if key is None:
                continue
            events = selectors.EVENT_WRITE if event & ~select.EPOLLIN else 0
            if event & ~select.EPOLLOUT:
                events |= selectors.EVENT_READ
            ready.append((key, events & key.events))
        return ready

    def _wait(self, timeout: float | None) -> list[tuple[int, int]]:
        patience = self._patience
        began = monotonic()
        looked = patience.pays
        found = patience.look(self._look, patience.limit_s if timeout is None else timeout) if looked else None
        if found is None:
            left = None if timeout is None else max(0.0, began + timeout - monotonic())
            found = self._epoll.poll(left, EVENTS_AT_ONCE)
        seconds = monotonic() - began
        if found or seconds >= patience.limit_s:
            patience.waited(seconds, looked)
        return found

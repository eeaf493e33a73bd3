"""A virtual asyncio loop: time moves only when nothing is left to do, and processes can die or freeze.

Every callback runs in the context of the process that scheduled it.  A dead process runs nothing any more, not
even its ``finally`` blocks; a frozen one (SIGSTOP) runs everything later.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)

NOBODY = contextvars.Context()
"""For what happens outside all processes."""


class Process:
    """A name for what lives and dies together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.backlog: list[_Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.tasks_limit = 200
        self.context = contextvars.Context()
        """For what is scheduled from outside the process."""
        self.context.run(CURRENT.set, self)


class _Handle:
    """One callback, of the process in whose context it was made."""

    __slots__ = ("args", "at", "callback", "context", "process")

    def __init__(
        self, at: float, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        if context is None:
            context = contextvars.copy_context()
        self.at, self.callback, self.args, self.context = at, callback, args, context
        self.process: Process | None = context.get(CURRENT)

    def cancel(self) -> None:
        self.callback, self.args = _nothing, ()

    def cancelled(self) -> bool:
        return self.callback is _nothing

    def when(self) -> float:
        return self.at


def _nothing() -> None:
    return None


class VirtualLoop(asyncio.BaseEventLoop):
    """Deterministic: the same program gives the same order of callbacks.

    asyncio's own loop spends more time on handles and selectors than the simulated cluster on its work, so this one
    has only what tasks, futures and timeouts need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = 1000.0
        self._due: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.clock

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: str = "task", context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        process = CURRENT.get() if context is None else context.get(CURRENT)
        if process is not None:
            process.tasks.append(task)
            if len(process.tasks) > process.tasks_limit:
                process.tasks = [t for t in process.tasks if not t.done()]
                process.tasks_limit = max(200, 2 * len(process.tasks))
        return task

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(self.clock, callback, args, context)
        self._due.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(when, callback, args, context)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        return self.call_at(self.clock + delay, callback, *args, context=context)

    def _run_once(self) -> None:
        """Run what is due; when nothing is, move the clock to the next timer."""
        due, timers = self._due, self._timers
        while due:
            handle = due.popleft()
            process = handle.process
            if process is not None:
                if not process.alive:
                    continue
                if process.frozen:
                    process.backlog.append(handle)
                    continue
            try:
                handle.context.run(handle.callback, *handle.args)
            except Exception as e:
                self.call_exception_handler({"message": f"in {handle.callback}", "exception": e})
        if self._stopping:  # type: ignore[attr-defined]
            return
        if not timers:
            raise RuntimeError("nothing is left that could ever happen")
        self.clock = max(self.clock, timers[0][0])
        while timers and timers[0][0] <= self.clock:
            due.append(heapq.heappop(timers)[2])


def within(process: Process, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function as that process."""
    context = contextvars.copy_context()
    context.run(CURRENT.set, process)
    return context.run(function, *args)


def kill(process: Process) -> None:
    """SIGKILL."""
    process.alive = False
    process.backlog.clear()
    for task in process.tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is never finished: the process is dead


def thaw(process: Process) -> None:
    """SIGCONT: everything that came meanwhile happens now, in its order."""
    process.frozen = False
    backlog, process.backlog = process.backlog, []
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._due.extend(backlog)

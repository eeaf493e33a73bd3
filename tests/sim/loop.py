"""A virtual asyncio loop: time moves only when nothing is left to do, and processes can die or freeze.

Every callback runs in the context of the process that scheduled it.  A dead process runs nothing any more, not
even its ``finally`` blocks; a frozen one (SIGSTOP) runs everything later.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class Process:
    """A name for what lives and dies together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.backlog: list[Callable[[], None]] = []
        self.tasks: list[asyncio.Task[Any]] = []


CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class _Selector(selectors.BaseSelector):
    """Waits by moving the clock."""

    def __init__(self) -> None:
        self.loop: VirtualLoop | None = None
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[number] = selectors.SelectorKey(fileobj, number, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def get_map(self) -> Any:
        return {k.fileobj: k for k in self._keys.values()}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is left that could ever happen")
        assert self.loop is not None
        if timeout > 0:
            self.loop.clock += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Deterministic: the same program gives the same order of callbacks."""

    def __init__(self) -> None:
        self.clock = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]  # a task factory by another name

    def time(self) -> float:
        return self.clock

    @staticmethod
    def _make_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=loop, **kwargs)
        process = CURRENT.get()
        if process is not None:
            process.tasks.append(task)
            if len(process.tasks) > 200:
                process.tasks = [t for t in process.tasks if not t.done()]
        return task

    def _guard(self, callback: Callable[..., Any], context: contextvars.Context | None) -> Callable[..., Any]:
        process = CURRENT.get() if context is None else context.get(CURRENT)
        if process is None:
            return callback

        def run(*args: Any) -> Any:
            if not process.alive:
                return None
            if process.frozen:
                process.backlog.append(lambda: callback(*args))
                return None
            return callback(*args)

        return run

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return super().call_soon(self._guard(callback, context), *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self._guard(callback, context), *args, context=context)


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
    for callback in backlog:
        within(process, loop.call_soon, callback)

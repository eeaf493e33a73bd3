"""Waiting for a resync or a verify: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ukai.ctl import render, schema
from ukai.ctl.client import Client
from ukai.ctl.params import Session
from ukai.ctl.schema import Map
from ukai.errors import Unreachable

POLL_S = 0.5
LINE_INTERVAL_S = 5.0
ENDED = frozenset(("done", "failed", "stopped"))


class Meter:
    """Shows how far something is, on stderr; a context manager.  Silent with ``quiet`` and no terminal."""

    def __init__(self, title: str, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line_at = 0.0
        self._last_line = ""

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[note]}", markup=False),
                console=render.console(stderr=True),
                expand=True,
                transient=True,  # what follows says how it ended
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=100, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, percent: float | None, note: str) -> None:
        """``percent`` from 0 to 100, None where it isn't known yet."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=percent or 0, note=note)
        elif not self._quiet:
            self._line(percent, note)

    def show_bytes(self, percent: float, size_bytes: int) -> None:
        """How far a copy of ``size_bytes`` is."""
        self.show(percent, f"{render.size(percent / 100 * size_bytes)} of {render.size(size_bytes)}")

    def _line(self, percent: float | None, note: str) -> None:
        now = time.monotonic()
        line = f"{self._title}: {f'{percent:.0f} %' if percent is not None else 'starting'}" + (note and f", {note}")
        if line != self._last_line and (now - self._last_line_at >= LINE_INTERVAL_S or percent == 100):
            self._last_line, self._last_line_at = line, now
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def wait_for_job(session: Session, client: Client, job: Map) -> Map:
    """Ask metad for the order until it has ended.

    Each question has ``--timeout`` of its own, so a restart of metad is waited out.  Raises Unreachable.
    KeyboardInterrupt passes, after a line that says how to stop the order.
    """
    name, number, what = job["image"], job["number"], "verify" if job["kind"] == "verify" else "resync"
    try:
        with Meter(f"{job['kind']} {name}", session.as_json) as meter:
            while job["state"] not in ENDED:
                meter.show(_percent(job), _note(job))
                time.sleep(POLL_S)  # metad has no way to tell us; this is how often we ask
                reply = client.call("sync.status", {"name": name}, session.fresh_deadline())
                now = [j for j in schema.jobs(reply.get("jobs")) if j["image"] == name]
                if not now:
                    return job | {"state": "failed", "reason": "the order is gone; was the image removed?"}
                if now[0]["number"] != number:
                    return job | {"state": "stopped", "reason": "another order took its place"}
                job = now[0]
            meter.show(_percent(job), _note(job))
    except KeyboardInterrupt:
        session.out.remark(f"the {what} of {name} goes on; stop it with: ukai-ctl sync stop {name}")
        raise
    except Unreachable as e:
        raise type(e)(
            f"{e.message}; the {what} of {name} was left as it is, see: ukai-ctl sync status {name}"
        ) from None
    return job


def _percent(job: Map) -> float | None:
    total, done = job["bytes_total"], job["bytes_done"]
    if job["state"] == "done":
        return 100.0
    return min(100.0, 100 * (done or 0) / total) if total else None  # 0: its coordinator has not counted yet


def _note(job: Map) -> str:
    if job["state"] == "waiting":
        return f"waiting: {job['reason']}"
    parts = []
    if job["bytes_total"]:
        parts.append(f"{render.size(job['bytes_done'] or 0)} of {render.size(job['bytes_total'])}")
        parts.append(f"{render.size(job['bytes_equal'] or 0)} equal")
    if job["state"] == "running" and job["rate"]:
        parts.append(render.rate(job["rate"]))
    if job["state"] == "running" and job["eta"] is not None:
        parts.append(f"{render.duration(job['eta'])} left")
    return ", ".join(parts)

"""Requests to the blockd of this node, from the threads of libfuse.

A thread takes a connected DEALER from a free list and puts it back after the reply: it belongs to one thread at a
time, and thread-locals don't survive between callbacks.  One whose request has no reply is never used again.

While a request waits, its thread looks every slice whether the process that it was sent to is still the running
one; ``Watch`` knows.

A write that got no reply within its time holds back further writes to that image (``core.Overdue``).

Writes that are posted (``posted.py``) go over one line per image, which belongs to whoever has its lock.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import zmq

from ukai import messages
from ukai.errors import DiskError, RemoteProtocolError, StaleHandle, Timeout, UkaiError, Unreachable, from_wire
from ukai.frontend.borrower import Borrower
from ukai.frontend.core import HOLD_TIMEOUTS, Handle, Overdue, Verdict, after_error, pause_s
from ukai.frontend.line import Line
from ukai.frontend.posted import COLLECT_REQUESTS, POST_LIMIT_BYTES, Post, cover
from ukai.frontend.shortcut import Loan, Shortcut
from ukai.frontend.watch import SLICE_MS, Watch
from ukai.messages import REPLY_LIMIT_BYTES, Header
from ukai.polling import Patience
from ukai.wire import Frames

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_CHANNELS = 64
CLOSE_WAIT_S = 2.0

CONNECT_PAUSE_S = 0.02
RESEND_PAUSE_S = 1.0
"""Between attempts at posted writes that fail, while nobody asks for them."""

_CHANGES_DATA = ("w", "z")
_DATA = ("r", "w", "z", "f")


class _Gone(Exception):
    """The blockd process that a request was sent to is not the running one any more."""


class Channel:
    """One DEALER; belongs to one thread at a time."""

    __slots__ = ("busy_bytes", "line", "number", "on_drop")

    def __init__(self) -> None:
        self.line: Line | None = None
        """None until it is connected."""
        self.number = 0
        self.busy_bytes = 0
        """Bytes of the request under way."""
        self.on_drop: Callable[[], None] | None = None


class Poster:
    """The line over which the writes of one image are posted."""

    __slots__ = ("ended_at", "inc", "line", "lock", "number", "resend_at")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Of the line, and of whoever sends posted writes again."""
        self.line: Line | None = None
        self.inc = ""
        """The blockd process that it goes to."""
        self.number = 0
        self.ended_at = 0.0
        """When the connection ended though that process runs, as far as it is known; 0: it has not."""
        self.resend_at = 0.0


class Client:
    """What the filesystem asks of blockd.  All methods may be called from any thread.

    Each request has one deadline as a whole; a lost or restarted blockd is waited for within it.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        io_timeout_s: float,
        beat_interval_s: float,
        borrower: Borrower | None = None,
        busy_poll_us: float = 0,
    ) -> None:
        self.name = secrets.token_hex(8)
        self.protocol_errors = 0
        self._endpoint = endpoint
        self._io_timeout_s = io_timeout_s
        self._inc = ""
        self._free: list[Channel] = []
        self._busy: set[Channel] = set()
        """Those with a request under way."""
        self._held_up: set[object] = set()
        """Threads that wait for something else."""
        self.crowd, self.crowded = 0, threading.Event()
        """See ``spare.Crowd``; 0: nobody wants to know."""
        self.stand_in: Callable[[], None] | None = None
        self._changed = threading.Condition(threading.RLock())
        self._overdue: Overdue[Channel] = Overdue(io_timeout_s)
        self._numbers = itertools.count((secrets.randbits(30) << 32) + 1)
        self._handles: dict[int, Handle] = {}
        self.handle = self._handles.get
        """The handle of a number, or None."""
        self._closing: set[int] = set()
        self._order = threading.Lock()
        """What Shortcut hears of writes comes one after the other."""
        self._patience, self._patience_stored = Patience(busy_poll_us), Patience(busy_poll_us)
        """Of a thread with the only request: it takes the interpreter, or a core, from others.  The second is for what
        waits for disks, so that slow ones do not keep others from looking."""
        self._borrower = borrower
        """None: all reads go through blockd."""
        self._shortcuts: dict[str, Shortcut] = {}
        """By uuid of the image: what all its handles share."""
        self._posters: dict[Shortcut, Poster] = {}
        self._closed = False
        self._watch = Watch(context, endpoint, beat_interval_s, self)

    def start(self) -> None:
        self._watch.start()

    def give_up(self) -> None:
        """Requests that wait end within a slice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """No thread may be in a request any more."""
        self.give_up()
        self._watch.stop()
        for poster in self._posters.values():
            self._poster_ended(poster)
        self._drop_held()
        self._drop_free()

    # -- what the filesystem calls

    def open(self, handle: Handle) -> None:
        """Open ``handle``'s image at blockd; fills in what the reply says.  Raises UkaiError."""
        handle.number = next(self._numbers)
        handle.gate = threading.Lock()
        with self._changed:
            handle.shortcut = self._shortcuts.setdefault(handle.disk.uuid, handle.shortcut)
            self._handles[handle.number] = handle
        try:
            self._open(handle, time.monotonic() + self._io_timeout_s)
        except BaseException:
            self._forget(handle)
            raise

    def _forget(self, handle: Handle) -> None:
        with self._changed:
            self._handles.pop(handle.number, None)
            last = not any(h.shortcut is handle.shortcut for h in self._handles.values())
            if last and not handle.shortcut.writes:
                self._shortcuts.pop(handle.disk.uuid, None)
                if (poster := self._posters.pop(handle.shortcut, None)) is not None:
                    self._poster_ended(poster)
        if last and self._borrower is not None:
            self._borrower.forget(handle.shortcut)

    def close_handle(self, handle: Handle) -> None:
        """Forget a handle.  If blockd doesn't answer, Watch goes on telling it."""
        self._settle_for_good(handle)
        self._forget(handle)
        if handle.at and handle.at == self._inc:
            self._closing.add(handle.number)
            try:
                self.call({"op": "close", "h": handle.number}, min(CLOSE_WAIT_S, self._io_timeout_s))
            except UkaiError as e:
                log.info("close of %s waits: %s", handle.disk.name, e.message)
                return
            self._closing.discard(handle.number)

    def handles(self) -> list[Handle]:
        return list(self._handles.values())

    def under_way(self) -> tuple[int, int]:
        """Requests without a reply yet, and their bytes."""
        busy, posted = list(self._busy), [s.posted for s in list(self._shortcuts.values())]
        return len(busy) + sum(len(p.posts) for p in posted), sum(c.busy_bytes for c in busy) + sum(
            p.size for p in posted
        )

    def waiting(self) -> int:
        """Threads that wait for an answer."""
        return len(self._busy) + len(self._held_up)

    @contextlib.contextmanager
    def _waits(self) -> Iterator[None]:
        """What this thread does may take longer, and is no request."""
        me = object()
        self._held_up.add(me)
        try:
            if (stand_in := self.stand_in) is not None:
                stand_in()
            yield
        finally:
            self._held_up.discard(me)

    @property
    def connected(self) -> bool:
        """Whether an answer of blockd can be expected soon."""
        return bool(self._inc) and not self._watch.silent

    def read(self, handle: Handle, offset: int, into: memoryview) -> None:
        """Fill ``into`` with what the image holds at ``offset``.  Raises UkaiError."""
        size = len(into)
        borrower, posted = self._borrower, handle.shortcut.posted
        posts = posted.seen(offset, offset + size) if posted.posts else None
        if borrower is not None:
            block, within = divmod(offset, handle.block_size)
            alone = not posts and within + size <= handle.block_size
            if alone and borrower.read(handle.shortcut, block, within, offset, into, self._waits):
                return
        reply, count = self._call({"op": "r", "h": handle.number, "o": offset, "l": size}, handle, None, into, size)
        if count != size:
            self.protocol_errors += 1
            raise RemoteProtocolError(f"blockd answered a read of {size} bytes with {count}")
        if posts:
            cover(posts, offset, into)
        if borrower is not None and reply.get("lend") is True:
            borrower.ask(handle, block)

    def write(self, handle: Handle, offset: int, data: memoryview) -> None:
        """Raises UkaiError; without one, the data are where R4 wants them, or posted."""
        header: Header = {"op": "w", "h": handle.number, "o": offset, "s": handle.synchronous}
        size = len(data)
        if handle.habit.write_begins():
            header["f"] = True
        elif not handle.synchronous and size <= POST_LIMIT_BYTES:
            block = offset // handle.block_size
            loan = handle.shortcut.loans.get(block)
            if loan is not None and loan.posts and self._post(header, handle, block, loan, data, size):
                return
            self._change(header, handle, data, size, block)
            return
        self._change(header, handle, data, size)

    def zero(self, handle: Handle, offset: int, length: int) -> None:
        """Raises UkaiError."""
        handle.habit.write_begins()
        self._change(
            {"op": "z", "h": handle.number, "o": offset, "l": length, "s": handle.synchronous}, handle, None, 0
        )

    def _change(self, header: Header, handle: Handle, data: memoryview | None, size: int, post_block: int = -1) -> None:
        """``post_block``: the next write to this block may be posted, if blockd says so."""
        shortcut, clean, deadline = handle.shortcut, False, time.monotonic() + self._io_timeout_s
        first, length = header["o"], header.get("l", size)
        if shortcut.posted.posts and (handle.synchronous or shortcut.posted.touching(first, first + length)):
            self._settle(handle, deadline)
        with self._order:
            key = shortcut.write_begins(first, length)
        try:
            reply, _ = self._call(header, handle, data, None, size, deadline)
            clean = reply.get("clean") is True
        finally:
            with self._order:
                shortcut.write_ends(key, clean)
        if post_block >= 0 and shortcut.told(post_block, reply.get("post") is True) and self._borrower is not None:
            self._borrower.ask(handle, post_block)

    def flush(self, handle: Handle) -> None:
        """All that was written is on disk (R7).  Raises UkaiError."""
        handle.habit.fsync_begins()
        if handle.lost:
            lost, handle.lost = handle.lost, ""
            raise DiskError(lost)
        deadline = time.monotonic() + self._io_timeout_s
        if handle.shortcut.posted.posts:
            self._settle(handle, deadline)
        if not handle.shortcut.flushed:
            self._call({"op": "f", "h": handle.number}, handle, None, None, 0, deadline)

    def call(self, header: Header, timeout_s: float) -> Header:
        """A request that belongs to no handle.  Raises UkaiError."""
        return self._call(header, None, None, None, 0, time.monotonic() + timeout_s)[0]

    # -- posted writes

    def _post(self, header: Header, handle: Handle, block: int, loan: Loan, data: memoryview, size: int) -> bool:
        """Send a write that nobody waits for; false: it can't be posted.  Raises UkaiError."""
        inc, shortcut, offset = self._inc, handle.shortcut, header["o"]
        within = offset - block * handle.block_size
        if handle.at != inc or not inc or handle.stale or self._overdue.by_image or within + size > handle.block_size:
            return False
        poster = self._posters.get(shortcut)
        if poster is None:
            poster = self._posters.setdefault(shortcut, Poster())
        if not poster.lock.acquire(blocking=False):
            return False
        try:
            if poster.inc != inc or poster.line is None:
                if shortcut.posted.posts:
                    return False  # first those that were lost with the former one
                self._connect_poster(poster, inc)  # raises _Gone
            if len(shortcut.posted.posts) >= COLLECT_REQUESTS:
                self._collect(shortcut, poster)
            with self._order:
                if not shortcut.may_post(loan, block, offset, size, time.monotonic()):
                    return False
                key = shortcut.write_begins(offset, size)
            poster.number = number = poster.number + 1
            post = Post(key, handle, offset, bytes(data))
            shortcut.posted.begins(number, post)
            header["p"], header["id"], header["inc"] = True, number, inc
            sent = self._send_post(poster, header, post)
        except _Gone:
            return False
        finally:
            poster.lock.release()
        loan.used = True
        if not sent or not shortcut.stands(loan, block, time.monotonic()):
            self._await_own(handle, poster, number, post)
        post.told = True
        return True

    def _send_post(self, poster: Poster, header: Header, post: Post) -> bool:
        """Whether all of it is on its way; else it counts as one that was lost, or has no answer."""
        line = poster.line
        assert line is not None
        try:
            try:
                line.send((messages.pack(header), post.data))
            except TimeoutError as e:  # the window is smaller than the socket's buffer, unless the system has a limit
                until = time.monotonic() + self._io_timeout_s
                self._insist(e, line.send_rest, poster.inc, until, "takes nothing", Unreachable)
        except _Gone:
            post.failed = True
            return False
        except (OSError, UkaiError):
            self._poster_ended(poster)
            return False
        return True

    def _connect_poster(self, poster: Poster, inc: str) -> None:
        """Raises _Gone, Unreachable."""
        self._poster_ended(poster)
        poster.line = self._connected(inc, time.monotonic() + self._io_timeout_s)
        poster.inc, poster.ended_at = inc, 0.0

    def _poster_ended(self, poster: Poster) -> None:
        """Its connection is of no use any more; what was sent may be done yet."""
        if poster.line is not None:
            poster.line.close()
            poster.line, poster.ended_at = None, time.monotonic()

    def _collect(self, shortcut: Shortcut, poster: Poster) -> None:
        """Take the answers that are there.  By whoever has the poster's lock."""
        try:
            while (line := poster.line) is not None and line.has_message():
                self._answered_post(shortcut, line.receive())
        except (OSError, RemoteProtocolError):
            self._poster_ended(poster)

    def _answered_post(self, shortcut: Shortcut, frames: Frames) -> None:
        """Raises RemoteProtocolError."""
        reply = messages.unpack(frames[0])
        number = reply.get("re")
        post = shortcut.posted.posts.get(number) if isinstance(number, int) else None
        if post is None or not isinstance(number, int):
            self.protocol_errors += 1
            raise RemoteProtocolError("blockd answered with a message that is no reply to a posted write")
        if "err" in reply:
            shortcut.posted.failed(number)
            if post.withdrawn:
                self._post_done(shortcut, number)
            else:
                log.info("a posted write to %s is to be sent again: %s", post.handle.disk.name, reply.get("msg"))
        else:
            shortcut.told(post.offset // post.handle.block_size, reply.get("post") is True)
            self._post_done(shortcut, number)

    def _post_done(self, shortcut: Shortcut, number: int) -> None:
        if (post := shortcut.posted.done(number)) is not None:
            with self._order:
                shortcut.write_ends(post.key)

    def _await_own(self, handle: Handle, poster: Poster, number: int, post: Post) -> None:
        """Wait until it is done, as any other write; it is sent again no more once the caller is told of an error."""
        shortcut, deadline = handle.shortcut, time.monotonic() + self._io_timeout_s
        if not poster.lock.acquire(timeout=self._io_timeout_s):
            post.withdrawn = True
            raise Timeout(f"earlier writes to {handle.disk.name} have not been answered yet")
        try:
            while number in shortcut.posted.posts:
                if post.failed:
                    self._send_again(shortcut, number, post, deadline)
                else:
                    self._await_post(shortcut, poster, deadline)
            if handle.stale:
                raise StaleHandle(handle.stale)
        except UkaiError:
            post.withdrawn = True
            if post.failed:
                self._post_done(shortcut, number)
            raise
        finally:
            poster.lock.release()

    def _settle(self, handle: Handle, deadline: float) -> None:
        """Have all posted writes of an image done, those that failed by sending them again.  Raises UkaiError."""
        shortcut = handle.shortcut
        poster = self._posters.get(shortcut)
        if poster is None:
            return  # nothing was ever posted, or the last handle is closed
        with self._waits():
            if not poster.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise Timeout(f"earlier writes to {handle.disk.name} have not been answered yet")
            try:
                while shortcut.posted.posts:
                    if shortcut.posted.unanswered():
                        self._await_post(shortcut, poster, deadline)
                    elif (again := shortcut.posted.to_send()) is not None:
                        self._send_again(shortcut, *again, deadline)
            finally:
                poster.lock.release()

    def _await_post(self, shortcut: Shortcut, poster: Poster, deadline: float) -> None:
        """Wait for one answer, or until none can come any more.  Raises Timeout, Unreachable."""
        inc, line = poster.inc, poster.line
        try:
            if line is None:
                # What was sent may yet be done, and must not be done after what would be sent again.
                if time.monotonic() >= poster.ended_at + HOLD_TIMEOUTS * self._io_timeout_s:
                    raise _Gone
                self._look(inc, deadline, "has ended the connection, and has not answered", Timeout)
                with self._changed:
                    if self._inc == inc:
                        self._changed.wait(SLICE_MS / 1000)
                return
            try:
                frames = line.receive(None, None if self._busy else self._patience)
            except TimeoutError as e:
                frames = self._insist(e, line.receive, inc, deadline, "did not answer a write", Timeout)
            self._answered_post(shortcut, frames)
        except _Gone:
            shortcut.posted.lost()
            self._poster_ended(poster)
        except (OSError, RemoteProtocolError):
            self._poster_ended(poster)

    def _send_again(self, shortcut: Shortcut, number: int, post: Post, deadline: float) -> None:
        """Raises UkaiError, and it is kept."""
        if post.withdrawn:
            self._post_done(shortcut, number)
            return
        if post.handle.number not in self._handles:
            self._give_up(shortcut, number, "its handle was closed before it could be done")
            return
        header: Header = {"op": "w", "h": post.handle.number, "o": post.offset, "s": False, "p": True}
        try:
            self._call(header, post.handle, memoryview(post.data), None, len(post.data), deadline)
        except StaleHandle as e:
            self._give_up(shortcut, number, e.message)
        else:
            self._post_done(shortcut, number)

    def _settle_for_good(self, handle: Handle) -> None:
        """Before a handle is closed: what can't be done now is given up."""
        shortcut = handle.shortcut
        if not shortcut.posted.posts:
            return
        try:
            self._settle(handle, time.monotonic() + self._io_timeout_s)
        except UkaiError as e:
            for number, post in list(shortcut.posted.posts.items()):
                if post.handle is handle and post.failed:
                    self._give_up(shortcut, number, e.message)

    def _give_up(self, shortcut: Shortcut, number: int, why: str) -> None:
        """The caller was told that it is done, and no fsync has followed; one of another handle will fail (R7)."""
        post = shortcut.posted.posts[number]
        if post.told:  # else the caller will be
            handle: Handle = post.handle
            log.error("a write to %s that no fsync has followed is lost: %s", handle.disk.name, why)
            if not handle.stale:
                for other in self.handles():
                    if other.shortcut is shortcut and other is not handle:
                        other.lost = f"a write to {handle.disk.name} by somebody who has closed it is lost: {why}"
        self._post_done(shortcut, number)

    def _look_after_posts(self) -> None:
        """Take answers that nobody waits for, and see to what has to be sent again."""
        for shortcut, poster in list(self._posters.items()):
            if not shortcut.posted.posts or not poster.lock.acquire(blocking=False):
                continue
            try:
                self._collect(shortcut, poster)
                if poster.inc != self._inc and self._inc:
                    shortcut.posted.lost()
                again = shortcut.posted.to_send()
            finally:
                poster.lock.release()
            if again is not None and time.monotonic() >= poster.resend_at:
                poster.resend_at = time.monotonic() + RESEND_PAUSE_S
                threading.Thread(
                    target=self._settle_beside, args=(again[1].handle,), name="posted", daemon=True
                ).start()

    def _settle_beside(self, handle: Handle) -> None:
        try:
            self._settle(handle, time.monotonic() + self._io_timeout_s)
        except UkaiError as e:
            log.info("posted writes to %s are not done yet: %s", handle.disk.name, e.message)

    # -- one request: as often as it takes

    def _call(
        self,
        header: Header,
        handle: Handle | None,
        payload: memoryview | None,
        into: memoryview | None,
        size: int,
        deadline: float = 0.0,
    ) -> tuple[Header, int]:
        """The reply and the length of its payload, which is in ``into``."""
        deadline = deadline or time.monotonic() + self._io_timeout_s
        changes_data = header["op"] in _CHANGES_DATA
        for attempt in itertools.count():
            inc = self._inc
            # Healthy: the handle is open at the running process and nothing is overdue; all of this is skipped.
            if handle is not None:
                if handle.at != inc or not inc or (handle.stale and into is None):
                    inc = self._bring(handle, deadline)
                if changes_data and self._overdue.by_image:
                    self._await_overdue(handle, deadline)
            elif not inc:
                inc = self._await_blockd(deadline)
            header["inc"] = inc
            writer = handle if changes_data else None
            try:
                reply, count = self._exchange(inc, header, payload, into, size, deadline, writer)
            except _Gone:
                continue
            code = reply.get("err")
            if code is None:
                return reply, count
            self._judge(from_wire(code, reply.get("msg", "")), handle, inc, attempt, deadline)
        raise AssertionError

    def _judge(self, error: UkaiError, handle: Handle | None, inc: str, attempt: int, deadline: float) -> None:
        """Raise ``error``, or return when the request is to be sent again."""
        verdict = after_error(error)
        if verdict is Verdict.STALE and handle is not None:
            handle.stale = error.message or "another node has written the image since it was opened"
            raise error
        if verdict is Verdict.FAIL or verdict is Verdict.STALE:
            raise error
        if verdict is Verdict.REOPEN:
            if handle is not None and handle.at == inc:
                handle.at = ""
            self._watch.doubt()
        left = deadline - time.monotonic()
        if left <= 0:
            raise Timeout(f"not done within the time: {error.message}")
        with self._changed:
            if self._inc == inc:
                self._changed.wait(min(left, pause_s(attempt)))

    def _exchange(
        self,
        inc: str,
        header: Header,
        payload: memoryview | None,
        into: memoryview | None,
        size: int,
        deadline: float,
        writer: Handle | None,
    ) -> tuple[Header, int]:
        """Send once and wait.  Raises _Gone, Timeout; a write of ``writer`` left unanswered holds back others."""
        try:
            channel = self._free.pop()
        except IndexError:
            channel = Channel()
        channel.number = number = channel.number + 1
        channel.busy_bytes = size
        self._busy.add(channel)
        if (stand_in := self.stand_in) is not None:
            stand_in()
        if 0 < self.crowd <= len(self._busy) and not self.crowded.is_set():
            self.crowded.set()
        header["id"] = number
        sent = received = answered = False
        try:
            data = messages.pack(header)
            line = channel.line
            if line is None:
                line = channel.line = self._connected(inc, deadline)
            try:
                line.send((data,) if payload is None else (data, payload))
            except OSError as e:
                self._insist(e, line.send_rest, inc, deadline, "can't be reached", Unreachable)
            sent = True
            try:
                frames = line.receive(into, self._patience_for(header) if len(self._busy) == 1 else None)
            except OSError as e:
                what = f"did not answer {header['op']}"
                frames = self._insist(e, lambda: line.receive(into), inc, deadline, what, Timeout)
            received = True
            count = 0
            if len(frames) > 1:
                body = frames[1]
                count = len(body)
                if into is not None and body is not into and count == len(into):
                    into[:] = body
            reply = messages.unpack(frames[0])
            if reply.get("re") != number or len(frames) > 2:
                self.protocol_errors += 1
                raise RemoteProtocolError("blockd answered with a message that is no reply to the request")
            answered = True
            return reply, count
        except _Gone:
            sent = False
            raise
        finally:
            self._busy.discard(channel)
            if answered and len(self._free) < IDLE_CHANNELS:
                self._free.append(channel)
            elif sent and not received and writer is not None:
                self._hold(writer, header["o"], header.get("l", size), channel, inc)
            else:
                self._drop(channel)

    def _patience_for(self, header: Header) -> Patience | None:
        if header["op"] not in _DATA:
            return None
        return self._patience_stored if header["op"] == "f" or header.get("s") or "f" in header else self._patience

    def _connected(self, inc: str, deadline: float) -> Line:
        """Raises _Gone, Unreachable."""
        while True:
            try:
                return Line(self._endpoint, SLICE_MS / 1000, REPLY_LIMIT_BYTES)
            except OSError:
                self._look(inc, deadline, "can't be reached", Unreachable)
                with self._changed:
                    self._changed.wait(CONNECT_PAUSE_S)

    def _insist(
        self,
        error: OSError,
        go_on: Callable[[], T],
        inc: str,
        deadline: float,
        what: str,
        after_all: type[UkaiError],
    ) -> T:
        """Do what was not done within a slice, or was cut short: then a new blockd process is waited for, which raises
        _Gone.  Raises ``after_all`` when it is too late.
        """
        while True:
            self._look(inc, deadline, what, after_all)
            if not isinstance(error, TimeoutError):
                with self._changed:
                    if self._inc == inc:
                        self._changed.wait(SLICE_MS / 1000)
                continue
            try:
                return go_on()
            except OSError as e:
                error = e

    def _look(self, inc: str, deadline: float, what: str, error: type[UkaiError]) -> None:
        """Between two slices of waiting: is there still somebody to wait for?"""
        if self._inc != inc:
            raise _Gone
        if time.monotonic() >= deadline or self._closed:
            raise error(f"blockd of this node {what} within the time")
        self._watch.doubt()

    # -- when not everything is healthy

    def _bring(self, handle: Handle, deadline: float) -> str:
        """Have ``handle`` open at the running blockd; returns that one's name."""
        if handle.stale:
            raise StaleHandle(handle.stale)
        inc = self._await_blockd(deadline)
        if not handle.gate.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Timeout(f"{handle.disk.name} could not be opened again within the time")
        try:
            if handle.at != (inc := self._inc):
                self._open(handle, deadline)
                inc = handle.at
            return inc
        finally:
            handle.gate.release()

    def _open(self, handle: Handle, deadline: float) -> None:
        header: Header = {
            "op": "open",
            "frontend": self.name,
            "h": handle.number,
            "image": handle.disk.name,
            "epoch": handle.epoch,
        }
        try:
            reply, _ = self._call(header, None, None, None, 0, deadline)
            uuid = messages.text(reply, "uuid")
            if uuid != handle.disk.uuid:
                raise StaleHandle(f"{handle.disk.name} is another image now")
        except StaleHandle as e:
            handle.stale = e.message
            raise
        handle.size = messages.integer(reply, "size", 1)
        handle.block_size = messages.integer(reply, "block_size", 1)
        handle.epoch = messages.integer(reply, "epoch", 0)
        handle.at = header["inc"]

    def _await_blockd(self, deadline: float) -> str:
        with self._changed:
            while not self._inc:
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    raise Unreachable("blockd of this node is not running")
                self._changed.wait(left)
            return self._inc

    def _await_overdue(self, handle: Handle, deadline: float) -> None:
        with self._changed:
            while handle.disk.uuid in self._overdue.by_image:
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    raise Timeout(f"an earlier write to {handle.disk.name} has not been answered yet")
                self._changed.wait(left)

    def _hold(self, writer: Handle, offset: int, length: int, channel: Channel, inc: str) -> None:
        with self._changed:
            if self._inc == inc and not self._closed:
                with self._order:
                    key = writer.shortcut.write_begins(offset, length)  # it may yet be done: no read may pass it
                channel.on_drop = functools.partial(writer.shortcut.write_ends, key)
                self._overdue.hold(writer.disk.uuid, channel, time.monotonic())
                return
        self._drop(channel)

    def _drop(self, channel: Channel) -> None:
        if channel.line is not None:
            channel.line.close()
        if channel.on_drop is not None:
            channel.on_drop()

    def _drop_free(self) -> None:
        while self._free:
            try:
                channel = self._free.pop()
            except IndexError:
                return
            self._drop(channel)

    def _drop_held(self) -> None:
        with self._changed:
            for channel in self._overdue.clear():
                self._drop(channel)

    # -- what Watch tells

    def closing(self) -> list[int]:
        return list(self._closing)

    def was_closed(self, number: int) -> None:
        self._closing.discard(number)

    def arrived(self, inc: str) -> None:
        """Requests sent to another process than ``inc`` were lost with it; their threads send them again."""
        log.info("blockd %s is running", inc)
        with self._changed:
            self._inc = inc
            self._closing.clear()
            self._drop_held()
            self._drop_free()
            self._changed.notify_all()
        if self._borrower is not None:
            self._borrower.reset()

    def look_around(self) -> None:
        """Let go what waits for an overdue write that has been answered meanwhile, and loans that were taken back."""
        if self._borrower is not None:
            self._borrower.look_around()
        self._look_after_posts()
        if not self._overdue.by_image:
            return
        with self._changed:
            for channel in self._overdue.let_go(time.monotonic(), self._watch.silent, _answered):
                self._drop(channel)
            self._changed.notify_all()


def _answered(channel: Channel) -> bool:
    """Where the connection has ended, no answer will come: then the time decides."""
    try:
        return channel.line is not None and channel.line.has_message()
    except (OSError, RemoteProtocolError):
        return False

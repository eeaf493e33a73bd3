"""Writes of a flush image that are posted: what the frontend does about each end that they may take."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import suppress
from typing import Any, cast

import pytest
import zmq

from ukai import messages
from ukai.errors import DiskError, NoSpace, StaleHandle, Timeout, UkaiError
from ukai.frontend import client as client_module
from ukai.frontend.borrower import Borrower
from ukai.frontend.client import Client
from ukai.frontend.core import HOLD_TIMEOUTS, Disk, Handle
from ukai.frontend.posted import POST_LIMIT_BYTES, WINDOW_BYTES, WINDOW_REQUESTS
from ukai.frontend.shortcut import Loan
from ukai.messages import Header

BLOCK = 1 << 20
IO_TIMEOUT_S = 0.2
OLD = b"o" * 64


class Page:
    def __init__(self) -> None:
        self.lease: MutableSequence[float] = [float("inf")]
        self.numbers: MutableSequence[int] = [7, 0]

    def clear(self) -> None:
        self.numbers = [0, 0]

    def end(self) -> None:
        self.lease[0] = 0.0


class Blockd:
    """Takes the place of ``Line`` and of all requests that wait for an answer."""

    def __init__(self) -> None:
        self.page = Page()
        self.posted: list[Header] = []
        self.answers: deque[Header] = deque()
        self.answering = True
        self.full = False
        self.rest = 0
        self.ended = False
        self.asked: list[tuple[str, Any]] = []
        self.errors: list[UkaiError] = []
        self.on_send: Callable[[], None] = lambda: None

    # -- a line

    def __call__(self, *_args: object) -> Blockd:
        self.ended = False
        return self

    def send(self, frames: tuple[bytes, bytes]) -> None:
        if self.ended:
            raise ConnectionResetError
        header = messages.unpack(frames[0])
        self.posted.append(header)
        self.answers.append({"re": header["id"], "post": True})
        self.on_send()
        if self.full:
            self.full = False
            raise TimeoutError

    def send_rest(self) -> None:
        if self.ended:
            raise ConnectionResetError
        self.rest += 1

    def receive(self, *_args: object) -> list[bytes]:
        if self.ended:
            raise ConnectionResetError
        if not self.has_message():
            time.sleep(0.01)
            raise TimeoutError
        return [messages.pack(self.answers.popleft())]

    def has_message(self) -> bool:
        return self.answering and bool(self.answers)

    def close(self) -> None:
        self.ended = True

    # -- requests

    def call(
        self, header: Header, handle: Handle, payload: Any, into: memoryview | None, size: int, _deadline: float = 0.0
    ) -> tuple[Header, int]:
        self.asked.append((header["op"], bytes(payload) if payload is not None else None))
        if self.errors and header["op"] == "w":
            error = self.errors.pop(0)
            if isinstance(error, StaleHandle):
                handle.stale = error.message
            raise error
        if into is not None:
            into[:] = OLD[:1] * size
        return {"post": True}, size


@pytest.fixture
def blockd() -> Blockd:
    return Blockd()


@pytest.fixture
def client(blockd: Blockd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    context: zmq.Context[Any] = zmq.Context()
    made = Client(context, "ipc:///nowhere", IO_TIMEOUT_S, 1.0, cast(Borrower, None))
    monkeypatch.setattr(client_module, "Line", blockd)
    monkeypatch.setattr(made, "_call", blockd.call)
    made._inc = "i"
    yield made
    for thread in threading.enumerate():
        if thread.name == "posted":
            thread.join(5)
    context.destroy()


def opened(client: Client, blockd: Blockd, number: int = 1) -> Handle:
    handle = Handle(number, Disk("disk", "u", 2 * BLOCK, 0), False, 2 * BLOCK, BLOCK, 1, "i")
    handle.shortcut = client._shortcuts.setdefault("u", handle.shortcut)
    handle.gate = threading.Lock()
    client._handles[number] = handle
    if handle.shortcut.page is None:
        handle.shortcut.take(0, Loan(blockd.page, 7, "file", posts=True))
    return handle


@pytest.fixture
def handle(client: Client, blockd: Blockd) -> Handle:
    return opened(client, blockd)


def write(client: Client, handle: Handle, offset: int, data: bytes = b"new") -> None:
    client.write(handle, offset, memoryview(data))


def read(client: Client, handle: Handle, offset: int, size: int) -> bytes:
    into = bytearray(size)
    client.read(handle, offset, memoryview(into))
    return bytes(into)


def test_a_posted_write_is_answered_before_blockd_has_and_read_at_once(
    client: Client, blockd: Blockd, handle: Handle
) -> None:
    blockd.answering = False
    write(client, handle, 10)
    assert [h["p"] for h in blockd.posted] == [True]
    assert blockd.asked == []
    assert read(client, handle, 8, 8) == b"oonewooo"
    assert read(client, handle, 11, 1) == b"e"
    assert client.under_way() == (1, 3)
    blockd.answering = True
    client.look_around()
    assert client.under_way() == (0, 0)
    assert not handle.shortcut.writes
    assert read(client, handle, 11, 1) == b"o", "what blockd says"


def test_an_fsync_waits_for_what_is_posted(client: Client, blockd: Blockd, handle: Handle) -> None:
    write(client, handle, 0)
    write(client, handle, 10)
    client.flush(handle)
    assert not handle.shortcut.posted.posts
    assert blockd.asked == [("f", None)]
    blockd.answering = False
    write(client, handle, 0)
    with pytest.raises(Timeout):
        client.flush(handle)
    assert blockd.asked == [("f", None)]


def test_what_may_not_be_posted_is_answered_first(client: Client, blockd: Blockd, handle: Handle) -> None:
    """No permission, another block, across blocks, large, a second one in the same place, an O_SYNC handle, no room."""
    count = 0

    def waits(offset: int, data: bytes = b"new", who: Handle = handle) -> None:
        nonlocal count
        posted = len(blockd.posted)
        write(client, who, offset, data)
        count += 1
        assert (len(blockd.posted), len(blockd.asked)) == (posted, count)

    waits(BLOCK)
    waits(BLOCK - 1)
    waits(0, bytes(POST_LIMIT_BYTES + 1))
    blockd.page.numbers[0] = 8
    waits(0)
    blockd.page.numbers[0] = 7
    write(client, handle, 20)
    waits(22)
    assert not handle.shortcut.posted.posts, "it waited for the answer of the one before"
    write(client, handle, 20)
    synchronous = opened(client, blockd, 2)
    synchronous.synchronous = True
    waits(100, who=synchronous)
    assert not handle.shortcut.posted.posts, "all that was acknowledged before has to be stored with it"
    blockd.answering = False
    for number in range(WINDOW_REQUESTS):
        write(client, handle, 10 * number)
    waits(10 * WINDOW_REQUESTS)
    handle.shortcut.posted.posts.clear()
    handle.shortcut.posted.size = WINDOW_BYTES - 2
    handle.shortcut.writes.clear()
    waits(0)


@pytest.mark.parametrize("how", ["taken back", "ended"])
def test_what_the_second_look_does_not_find_good_waits_for_its_answer(
    client: Client, blockd: Blockd, handle: Handle, how: str
) -> None:
    seen: list[bytes] = []

    def take_back() -> None:
        seen.append(read(client, handle, 0, 3))
        (blockd.page.clear if how == "taken back" else blockd.page.end)()

    blockd.on_send = take_back
    write(client, handle, 0)
    assert not handle.shortcut.posted.posts, "answered"
    assert seen == [OLD[:3]], "who reads now sees what blockd has: it may never be done"
    blockd.page.numbers, blockd.page.lease[0], blockd.answering = [7, 0], float("inf"), False
    with pytest.raises(Timeout):
        write(client, handle, 0)
    assert read(client, handle, 0, 3) == OLD[:3]


def test_what_was_posted_to_a_dead_blockd_is_sent_to_the_next(client: Client, blockd: Blockd, handle: Handle) -> None:
    blockd.answering = False
    write(client, handle, 0, b"one")
    write(client, handle, 10, b"two")
    blockd.answers.clear()
    client.arrived("j")
    handle.at = "j"
    client.flush(handle)
    assert sorted(blockd.asked[:-1]) == [("w", b"one"), ("w", b"two")]
    assert blockd.asked[-1] == ("f", None)
    assert not handle.shortcut.writes


def test_what_the_socket_does_not_take_at_once_is_sent_before_the_caller_is_told(
    client: Client, blockd: Blockd, handle: Handle
) -> None:
    blockd.full = True
    write(client, handle, 0)
    assert blockd.rest == 1
    assert len(handle.shortcut.posted.posts) == 1
    blockd.on_send = blockd.close
    blockd.full = True
    blockd.answering = False
    with pytest.raises(Timeout):
        write(client, handle, 10)


def test_what_nobody_asks_for_is_sent_again_all_the_same(client: Client, blockd: Blockd, handle: Handle) -> None:
    blockd.answering = False
    write(client, handle, 0, b"one")
    client.arrived("j")
    client.look_around()
    for thread in [t for t in threading.enumerate() if t.name == "posted"]:
        thread.join(5)
    assert blockd.asked == [("w", b"one")]
    assert not handle.shortcut.posted.posts


def test_a_connection_that_ended_under_a_living_blockd_is_waited_out(
    client: Client, blockd: Blockd, handle: Handle
) -> None:
    """What was sent over it may be done until blockd's own time is up: sent again, it could come after a later one."""
    blockd.answering = False
    write(client, handle, 0, b"one")
    blockd.ended = True
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(Timeout):
            client.flush(handle)
    assert blockd.asked == []
    while not blockd.asked:
        assert time.monotonic() < began + 10
        with suppress(Timeout):
            client.flush(handle)
    assert blockd.asked == [("w", b"one"), ("f", None)]
    assert time.monotonic() - began >= HOLD_TIMEOUTS * IO_TIMEOUT_S


def test_an_fsync_fails_while_what_is_posted_fails_and_it_is_read_all_the_time(
    client: Client, blockd: Blockd, handle: Handle
) -> None:
    blockd.answering = False
    write(client, handle, 0, b"one")
    blockd.answers[0] = {"re": blockd.answers[0]["re"], "err": "no-space", "msg": "full"}
    blockd.answering = True
    blockd.errors = [NoSpace("full"), NoSpace("full")]
    for _ in range(2):
        with pytest.raises(NoSpace):
            client.flush(handle)
        assert read(client, handle, 0, 4) == b"oneo"
    client.flush(handle)
    assert [a for a in blockd.asked if a[0] != "r"] == [("w", b"one")] * 3 + [("f", None)]


@pytest.mark.parametrize("how", ["fails", "is too late and fails", "finds its handle stale"])
def test_a_write_whose_caller_was_told_that_it_failed_is_not_sent_again(
    client: Client, blockd: Blockd, handle: Handle, how: str
) -> None:
    """Done later, it would come as a surprise (seed 50595)."""
    error: UkaiError = StaleHandle("taken over") if how.startswith("finds") else NoSpace("full")
    blockd.errors = [error]
    late = how.startswith("is too late")

    def send() -> None:
        blockd.page.clear()
        blockd.answering = not late
        blockd.answers[0] = {"re": blockd.answers[0]["re"], "err": "no-space", "msg": "full"}

    blockd.on_send = send
    with pytest.raises(Timeout if late else type(error)):
        write(client, handle, 0)
    assert bool(handle.shortcut.posted.posts) is bool(handle.shortcut.writes) is late, "it may yet be done"
    blockd.answering = True
    client.look_around()
    assert not handle.shortcut.posted.posts
    assert not handle.shortcut.writes
    assert [a for a in blockd.asked if a[0] == "w"] == ([] if late else [("w", b"new")])
    assert not handle.lost


@pytest.mark.expect_log("a write to disk that no fsync has followed is lost")
def test_what_a_stale_handle_has_posted_is_dropped(client: Client, blockd: Blockd, handle: Handle) -> None:
    blockd.answering = False
    write(client, handle, 0, b"one")
    blockd.errors = [StaleHandle("taken over")]
    client.arrived("j")
    other = opened(client, blockd, 2)
    client.flush(other)
    assert handle.stale
    assert not handle.shortcut.posted.posts
    assert blockd.asked == [("w", b"one"), ("f", None)]


@pytest.mark.expect_log("a write to disk that no fsync has followed is lost: full")
def test_what_is_lost_at_a_close_fails_the_next_fsync_of_others(client: Client, blockd: Blockd, handle: Handle) -> None:
    other, third = opened(client, blockd, 2), opened(client, blockd, 3)
    blockd.answering = False
    write(client, handle, 0, b"one")
    blockd.errors = [NoSpace("full")]
    client.arrived("j")
    handle.at = ""
    client.close_handle(handle)
    for open_still in (other, third):
        with pytest.raises(DiskError, match="full"):
            client.flush(open_still)
        client.flush(open_still)


def test_an_answer_to_nothing_ends_the_line(client: Client, blockd: Blockd, handle: Handle) -> None:
    write(client, handle, 0)
    blockd.answers[0]["re"] = 99
    client.look_around()
    assert client.protocol_errors == 1
    assert blockd.ended
    assert handle.shortcut.posted.unanswered()

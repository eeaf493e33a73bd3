"""ZeroMQ's wire protocol as we speak it: with ourselves, with libzmq, and with whoever doesn't keep to it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tests.machine import PortRange
from ukai import sockets, zmtp
from ukai.errors import RemoteProtocolError
from ukai.frontend.line import Line
from ukai.polling import Patience
from ukai.sockets import Dealer, Router
from ukai.wire import LARGE_BYTES, Frames
from ukai.zmtp import Data, Decoder, encode, greeting

LIMIT_BYTES = 8 * 2**20
TIMEOUT_S = 20.0
SLICE_S = 0.2
SIZES = (0, 1, 255, 256, 4096, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 1, zmtp.RECEIVE_BYTES + 1, 2**20)
READY = greeting("DEALER")[zmtp.GREETING_BYTES :]


def no_garbage(error: RemoteProtocolError) -> None:
    raise AssertionError(error)


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    ports = PortRange(["127.0.0.1"], 1)
    yield f"tcp://127.0.0.1:{ports.first}" if request.param == "tcp" else f"ipc://{tmp_path}/s"
    ports.close()


def play(story: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(story(), TIMEOUT_S)

    asyncio.run(within())


async def until(condition: Callable[[], bool]) -> None:
    """The test as a whole has the deadline."""
    while not condition():  # noqa: ASYNC110 — what is waited for has no event
        await asyncio.sleep(0.005)


def raw(endpoint: str) -> socket.socket:
    family, address = sockets.address(endpoint)
    sock = socket.socket(family)
    sock.settimeout(TIMEOUT_S)
    sock.connect(address)
    return sock


def feed(decoder: Decoder, data: bytes, cuts: Sequence[int] = ()) -> list[Frames]:
    """Give ``data`` in pieces that end at ``cuts``, or sooner where the decoder has no room for more."""
    out: list[Frames] = []
    ends = [*sorted({c for c in cuts if 0 < c < len(data)}), len(data)]
    at = 0
    for end in ends:
        while at < end:
            space = decoder.space()
            assert len(space)
            count = min(len(space), end - at)
            space[:count] = data[at : at + count]
            at += count
            out += decoder.received(count)
    return out


def joined(frames: Sequence[Data]) -> bytes:
    return b"".join(bytes(part) for part in encode(frames))


# --- the bytes


@given(
    st.lists(st.lists(st.integers(0, len(SIZES) - 2), min_size=1, max_size=3), max_size=4),
    st.lists(st.integers(0, 2**20), max_size=12),
)
def test_what_is_encoded_is_decoded_however_it_is_cut(kinds: list[list[int]], cuts: list[int]) -> None:
    numbers = itertools.count(1)
    messages = [[bytes([next(numbers) % 256]) * SIZES[k] for k in kind] for kind in kinds]
    data = greeting("DEALER") + b"".join(joined(m) for m in messages)
    near = [*cuts, *range(1, len(greeting("DEALER")) + 12)]
    got = feed(Decoder(LIMIT_BYTES), data, near)
    assert [[bytes(f) for f in frames] for frames in got] == messages
    assert all(isinstance(f, memoryview) == (len(f) >= LARGE_BYTES) for frames in got for f in frames)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_no_bytes_end_in_anything_but_messages_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder(LIMIT_BYTES)
    try:
        for frames in feed(decoder, greeting("ROUTER") + data, cuts):
            assert frames
    except RemoteProtocolError:
        pass


def test_of_too_many_frames_not_all_are_kept() -> None:
    (frames,) = feed(Decoder(LIMIT_BYTES), greeting("DEALER") + joined([b"x"] * 1000))
    assert len(frames) == zmtp.FRAMES_LIMIT


HELLO = greeting("DEALER")[: zmtp.GREETING_BYTES]
OTHERS = {
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "an older ZeroMQ": HELLO[:10] + b"\x01" + HELLO[11:],
    "another signature": HELLO[:9] + b"\x00" + HELLO[10:],
    "encryption": HELLO[:12] + b"CURVE".ljust(20, b"\0") + HELLO[32:],
    "a message before READY": HELLO + joined([b"x"]),
    "unknown flags": HELLO + READY + b"\x08\x01x",
    "a command of several frames": HELLO + READY + b"\x05\x01x",
    "a frame over the limit": HELLO + READY + b"\x02" + (LIMIT_BYTES + 1).to_bytes(8, "big"),
    "a frame of no size at all": HELLO + READY + b"\x02" + b"\xff" * 8,
    "a long command": HELLO + READY + b"\x06" + (5000).to_bytes(8, "big"),
    "a refusal": HELLO + b"\x04\x08\x05ERROR\x01x",
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=list(OTHERS))
def test_who_breaks_the_protocol_is_let_go_and_others_are_served(data: bytes, endpoint: str) -> None:
    garbage: list[RemoteProtocolError] = []

    async def story() -> None:
        router = Router(endpoint, LIMIT_BYTES, lambda frames: None, garbage.append)
        loop = asyncio.get_running_loop()
        bad = await loop.run_in_executor(None, raw, endpoint)
        await loop.run_in_executor(None, bad.sendall, data)

        def ended() -> bool:
            try:
                while bad.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            return True

        assert await loop.run_in_executor(None, ended)
        bad.close()
        assert len(garbage) == 1
        back: list[Frames] = []
        dealer = Dealer(endpoint, LIMIT_BYTES, back.append, no_garbage)
        await until(lambda: dealer.send([b"hello"]))
        dealer.close()
        await until(lambda: not router._connections)
        router.close()

    play(story)


# --- with libzmq


def echo(router: Router, frames: Frames) -> None:
    assert router.send(frames)


def test_libzmq_talks_to_a_router(endpoint: str) -> None:
    async def story() -> None:
        router = Router(endpoint, LIMIT_BYTES, lambda frames: echo(router, frames), no_garbage)

        def client() -> list[list[bytes]]:
            with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.set(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
                dealer.connect(endpoint)
                for number, size in enumerate(SIZES):
                    dealer.send_multipart([bytes([number]), bytes([number]) * size])
                return [dealer.recv_multipart() for _ in SIZES]

        got = await asyncio.get_running_loop().run_in_executor(None, client)
        assert got == [[bytes([n]), bytes([n]) * size] for n, size in enumerate(SIZES)]
        router.close()

    play(story)


@pytest.mark.parametrize("heartbeat", [False, True])
def test_a_dealer_talks_to_libzmq(endpoint: str, heartbeat: bool) -> None:
    """A server with heartbeats sends PING before it has heard anything for a while."""
    back: list[Frames] = []

    async def story() -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
            server.linger = 0
            if heartbeat:
                server.set(zmq.HEARTBEAT_IVL, 20)
                server.set(zmq.HEARTBEAT_TIMEOUT, 2000)
            server.bind(endpoint)
            dealer = Dealer(endpoint, LIMIT_BYTES, back.append, no_garbage)
            await until(lambda: dealer.send([b"first"]))
            for size in SIZES:
                assert dealer.send([b"n", bytes(size)])
            got = 0
            while got < len(SIZES) + 1:
                if server.poll(0):
                    server.send_multipart(server.recv_multipart())
                    got += 1
                await asyncio.sleep(0)
            await until(lambda: len(back) == len(SIZES) + 1)
            dealer.close()
        assert [len(f[-1]) for f in back[1:]] == list(SIZES)

    play(story)


def test_a_line_talks_to_libzmq(endpoint: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        server.set(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        server.bind(endpoint)

        def serve() -> None:
            for _ in SIZES:
                server.send_multipart(server.recv_multipart())

        thread = threading.Thread(target=serve)
        thread.start()
        line = Line(endpoint, TIMEOUT_S, LIMIT_BYTES)
        for number, size in enumerate(SIZES):
            line.send([b"header", bytes([number]) * size])
            assert [bytes(f) for f in line.receive()] == [b"header", bytes([number]) * size]
        thread.join()
        line.close()


def test_a_ping_is_answered_with_its_context(endpoint: str) -> None:
    async def story() -> None:
        router = Router(endpoint, LIMIT_BYTES, lambda frames: None, no_garbage)

        def client() -> bytes:
            with raw(endpoint) as sock:
                sock.sendall(greeting("DEALER") + b"\x04\x0b\x04PING\x00\x0actxt" + b"\x04\x07\x04PING\x00\x0a")
                wanted = len(greeting("ROUTER")) + 11 + 7
                got = b""
                while len(got) < wanted:
                    got += sock.recv(wanted - len(got))
                return got.removeprefix(greeting("ROUTER"))

        pongs = await asyncio.get_running_loop().run_in_executor(None, client)
        assert pongs == b"\x04\x09\x04PONGctxt" + b"\x04\x05\x04PONG"
        router.close()

    play(story)


# --- on the loop


@pytest.mark.expect_log("defect while a message was handled")
def test_all_messages_come_in_order_and_one_defect_loses_no_other(
    endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    back: list[int] = []

    async def story() -> None:
        def serve(frames: Frames) -> None:
            number = int.from_bytes(frames[1], "big")
            seen.append(number)
            if number == 3:
                raise ValueError("a defect")
            assert router.send(frames)

        router = Router(endpoint, LIMIT_BYTES, serve, no_garbage)
        dealer = Dealer(endpoint, LIMIT_BYTES, lambda f: back.append(int.from_bytes(f[0], "big")), no_garbage)
        await until(lambda: dealer.send([(0).to_bytes(4, "big")]))
        for number in range(1, 2000):
            assert dealer.send([number.to_bytes(4, "big"), bytes(number % 7 * 1000)])
        await until(lambda: len(back) == 1999)
        dealer.close()
        router.close()

    play(story)
    assert seen == list(range(2000))
    assert back == [n for n in range(2000) if n != 3]
    assert [r.levelno for r in caplog.records if "defect" in r.message] == [logging.ERROR]


def test_a_peer_that_does_not_read_is_sent_no_more_than_the_limit(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was taken for it comes whole and in order when it reads again."""
    monkeypatch.setattr(sockets, "QUEUE_LIMIT_BYTES", 3 * 2**20)

    async def story() -> None:
        names: list[bytes] = []
        router = Router(endpoint, LIMIT_BYTES, lambda frames: names.append(bytes(frames[0])), no_garbage)
        loop = asyncio.get_running_loop()
        peer = await loop.run_in_executor(None, raw, endpoint)
        await loop.run_in_executor(None, peer.sendall, greeting("DEALER") + joined([b"hello"]))
        await until(lambda: bool(names))
        sent = 0
        while router.send([names[0], sent.to_bytes(4, "big"), bytes([sent % 251]) * 300_000]):
            sent += 1
            await asyncio.sleep(0)
        assert sent >= 10

        def read() -> list[Frames]:
            decoder = Decoder(LIMIT_BYTES)
            messages: list[Frames] = []
            while len(messages) < sent:
                count = peer.recv_into(decoder.space())
                assert count
                messages += decoder.received(count)
            return messages

        messages = await loop.run_in_executor(None, read)
        expected = [[n.to_bytes(4, "big"), bytes([n % 251]) * 300_000] for n in range(sent)]
        assert [[bytes(f) for f in frames] for frames in messages] == expected
        assert router.send([names[0], b"on it goes"])
        peer.close()
        router.close()

    play(story)


def test_what_peers_have_sent_is_taken_in_at_once(tmp_path: Path) -> None:
    """Without a turn of the loop, and no more than they had sent when it began."""
    endpoint = f"ipc://{tmp_path}/s"

    async def story() -> None:
        seen: list[bytes] = []

        def serve(frames: Frames) -> None:
            seen.append(bytes(frames[1]))
            if len(seen) == 3:
                peers[0].sendall(joined([b"came meanwhile"]))

        router = Router(endpoint, LIMIT_BYTES, serve, no_garbage)
        loop = asyncio.get_running_loop()
        peers = [await loop.run_in_executor(None, raw, endpoint) for _ in range(2)]
        for peer in peers:
            await loop.run_in_executor(None, peer.sendall, greeting("DEALER") + joined([b"hello"]))
        await until(lambda: len(seen) == 2)
        sent = [bytes([n]) * 3000 for n in range(20)]
        for peer in peers:
            peer.sendall(b"".join(joined([data]) for data in sent))
        router.take_in()
        assert sorted(seen[2:]) == sorted(sent * 2)
        await until(lambda: seen[-1] == b"came meanwhile")
        for peer in peers:
            peer.close()
        router.close()

    play(story)


def test_what_was_sent_by_who_died_is_handled(tmp_path: Path) -> None:
    """Though it takes no answer any more: it may have told others already that it is done."""
    endpoint = f"ipc://{tmp_path}/s"

    async def story() -> None:
        seen: list[bytes] = []

        def serve(frames: Frames) -> None:
            seen.append(bytes(frames[1]))
            router.send(frames)

        router = Router(endpoint, LIMIT_BYTES, serve, no_garbage)
        loop = asyncio.get_running_loop()
        peer = await loop.run_in_executor(None, raw, endpoint)
        sockets.prepare(peer)
        await loop.run_in_executor(None, peer.sendall, greeting("DEALER") + joined([b"hello"]))
        await until(lambda: len(seen) == 1)
        sent = [n.to_bytes(4, "big") + bytes(10_000) for n in range(80)]
        assert sum(map(len, sent)) > 2 * zmtp.RECEIVE_BYTES, "more than is handled together"
        for data in sent:
            peer.sendall(joined([data]))
        peer.close()
        await until(lambda: not router._connections)
        assert seen[1:] == sent
        router.close()

    play(story)


def test_a_dealer_connects_anew_and_queues_nothing_meanwhile(endpoint: str) -> None:
    got: list[bytes] = []
    ends: list[bytes] = []

    async def story() -> None:
        dealer = Dealer(endpoint, LIMIT_BYTES, lambda frames: None, no_garbage, lambda: ends.append(got[-1]))
        assert not dealer.send([b"nobody is there"])
        for life in (b"one", b"two"):
            router = Router(endpoint, LIMIT_BYTES, lambda frames: got.append(bytes(frames[1])), no_garbage)
            await until(lambda life=life: dealer.send([life]))  # type: ignore[misc]
            await until(lambda life=life: got[-1:] == [life])  # type: ignore[misc]
            router.close()
            await until(lambda: not dealer.send([b"lost"]))
            await until(lambda life=life: ends[-1:] == [life])  # type: ignore[misc]
        assert b"nobody is there" not in got
        dealer.close()

    play(story)


def test_who_never_says_ready_is_let_go(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "GREETING_TIMEOUT_S", 0.05)

    async def story() -> None:
        router = Router(endpoint, LIMIT_BYTES, lambda frames: None, no_garbage)
        peer = await asyncio.get_running_loop().run_in_executor(None, raw, endpoint)
        await until(lambda: len(router._connections) == 1)
        await until(lambda: not router._connections)
        peer.close()
        router.close()

    play(story)


@pytest.mark.expect_log("no connection can be taken")
def test_a_router_without_descriptors_goes_on_when_it_has_some(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sockets, "ACCEPT_PAUSE_S", 0.02)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def story() -> None:
        router = Router(endpoint, LIMIT_BYTES, lambda frames: None, no_garbage)
        family, address = sockets.address(endpoint)
        peer = socket.socket(family)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            peer.connect(address)
            await until(lambda: "no connection can be taken" in caplog.text)
            assert not router._connections
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: len(router._connections) == 1)
        peer.close()
        router.close()

    play(story)


def test_an_address_that_is_taken_is_an_error(endpoint: str) -> None:
    async def story() -> None:
        router = Router(endpoint, LIMIT_BYTES, lambda frames: None, no_garbage)
        with pytest.raises(OSError, match="in use"):
            Router(endpoint, LIMIT_BYTES, lambda frames: None, no_garbage)
        router.close()

    play(story)


# --- in a thread


class Listener:
    """The far end of a line, played by hand."""

    def __init__(self, endpoint: str, slice_s: float = SLICE_S) -> None:
        family, address = sockets.address(endpoint)
        self._socket = socket.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(address)
        self._socket.listen()
        thread = threading.Thread(target=self._greet)
        thread.start()
        self.line = Line(endpoint, slice_s, LIMIT_BYTES)
        thread.join()

    def _greet(self) -> None:
        self.far, _ = self._socket.accept()
        self.far.settimeout(TIMEOUT_S)
        self.far.sendall(greeting("ROUTER"))

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()
        self.far.close()
        self._socket.close()


def test_a_line_waits_a_slice_at_a_time(endpoint: str) -> None:
    with Listener(endpoint) as at:
        at.line.send([b"question"])
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                at.line.receive()
        assert time.monotonic() - began >= 2 * SLICE_S * 0.9
        answer = joined([b"answer", b"x" * 1000])
        at.far.sendall(answer[:700])
        with pytest.raises(TimeoutError):
            at.line.receive()
        at.far.sendall(answer[700:])
        assert at.line.receive() == [b"answer", b"x" * 1000]


def test_a_line_looks_for_an_answer_without_waiting(endpoint: str) -> None:
    with Listener(endpoint, slice_s=10 * TIMEOUT_S) as at:
        at.line.send([b"question"])
        assert not at.line.has_message()
        at.far.sendall(joined([b"answer"]))
        deadline = time.monotonic() + TIMEOUT_S
        while not at.line.has_message():
            assert time.monotonic() < deadline
        assert at.line.has_message()
        assert at.line.receive() == [b"answer"]
        at.far.shutdown(socket.SHUT_RDWR)
        select.select([at.line._fd], [], [], TIMEOUT_S)
        with pytest.raises(ConnectionError):
            at.line.has_message()


def test_a_line_with_patience_looks_before_it_sleeps(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(1e7)
    with Listener(endpoint, slice_s=10 * TIMEOUT_S) as at:
        for said in (b"slept", b"looked"):
            at.line.send([b"question"])
            if said == b"looked":
                assert patience.pays
                monkeypatch.setattr(os, "sched_yield", lambda: at.far.sendall(joined([b"looked"])))
            else:
                at.far.sendall(joined([said]))
            assert at.line.receive(None, patience) == [said]
        monkeypatch.setattr(os, "sched_yield", lambda: at.far.shutdown(socket.SHUT_RDWR))
        with pytest.raises(ConnectionError):
            at.line.receive(None, patience)


def test_a_line_to_who_says_nothing_is_none(endpoint: str) -> None:
    family, address = sockets.address(endpoint)
    with socket.socket(family) as mute:
        mute.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        mute.bind(address)
        mute.listen()
        with pytest.raises(TimeoutError):
            Line(endpoint, SLICE_S, LIMIT_BYTES)


def test_a_large_answer_goes_where_it_is_wanted(endpoint: str) -> None:
    with Listener(endpoint) as at:
        at.line.send([b"question"])
        into = memoryview(bytearray(2**20))

        def answered(size: int, byte: bytes) -> Frames:
            thread = threading.Thread(target=at.far.sendall, args=(joined([b"answer", byte * size]),))
            thread.start()
            while True:
                try:
                    frames = at.line.receive(into)
                    break
                except TimeoutError:
                    continue
            thread.join()
            assert [bytes(f) for f in frames] == [b"answer", byte * size]
            return frames

        assert answered(2**20, b"y")[1] is into
        for size in (100, 2**20 - 1, 2**20 + 1):
            assert answered(size, b"z")[1] is not into
            assert into == b"y" * 2**20, "an answer of another size goes elsewhere"


@pytest.mark.parametrize("size", [1000, LARGE_BYTES - 1, 2**22])
def test_what_a_line_can_not_send_within_a_slice_goes_later(endpoint: str, size: int) -> None:
    with Listener(endpoint) as at:
        sent = 0
        try:
            while True:
                at.line.send([sent.to_bytes(4, "big"), bytes([sent % 251]) * size])
                sent += 1
        except TimeoutError:
            sent += 1
        decoder = Decoder(LIMIT_BYTES)
        messages: list[Frames] = []

        def read() -> None:
            while len(messages) < sent:
                count = at.far.recv_into(decoder.space())
                assert count
                messages.extend(decoder.received(count))

        thread = threading.Thread(target=read)
        thread.start()
        while True:
            try:
                at.line.send_rest()
                break
            except TimeoutError:
                continue
        thread.join(TIMEOUT_S)
        expected = [[n.to_bytes(4, "big"), bytes([n % 251]) * size] for n in range(sent)]
        assert [[bytes(f) for f in frames] for frames in messages] == expected


def test_a_line_hears_of_the_end(endpoint: str) -> None:
    with Listener(endpoint) as at:
        at.line.send([b"question"])
        at.far.recv(1000)
        at.far.close()
        with pytest.raises(ConnectionError):
            at.line.receive()
        with pytest.raises(ConnectionError):
            at.line.send([bytes(2**22)])
    with pytest.raises(OSError, match=r"refused|No such file"):
        Line(endpoint, SLICE_S, LIMIT_BYTES)

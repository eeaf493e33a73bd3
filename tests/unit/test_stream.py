"""Messages over a stream socket: whole ones only, however they are cut; and both ends of it together."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ukai import stream
from ukai.errors import RemoteProtocolError
from ukai.frontend.channel import Channel

LIMIT = 2**20


@given(st.binary(min_size=1, max_size=50), st.none() | st.binary(min_size=1, max_size=50), st.integers(0, 200))
def test_what_is_left_to_send(header: bytes, payload: bytes | None, done: int) -> None:
    whole = b"".join(stream.parts(header, payload))
    left = stream.rest(stream.parts(header, payload), min(done, len(whole)))
    assert b"".join(left) == whole[done:]
    assert all(left)
    assert stream.lengths(whole, 50) == (len(header), len(payload or b""))


@pytest.mark.parametrize("begin", [(0, 0), (stream.HEADER_LIMIT_BYTES + 1, 0), (1, LIMIT + 1), (2**32 - 1, 2**32 - 1)])
def test_a_length_over_the_limit_is_refused(begin: tuple[int, int]) -> None:
    with pytest.raises(RemoteProtocolError):
        stream.lengths(stream.LENGTHS.pack(*begin), LIMIT)


class Echo:
    """A listener that sends each message back; what it found wrong is in ``wrong``."""

    def __init__(self, path: Path) -> None:
        self.path = str(path / "s")
        self.wrong: list[RemoteProtocolError] = []
        self.taken: list[tuple[bytes, int]] = []
        self.listener = stream.Listener(self.path, LIMIT, self._answer, self.wrong.append)

    def _answer(self, connection: stream.Connection, header: bytes, payload: stream.Bytes | None) -> None:
        self.taken.append((header, len(payload or b"")))
        connection.send(header, payload)


async def _until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is plain state
            await asyncio.sleep(0.001)


def _nobody_waits() -> None:
    raise AssertionError("it took a whole slice")


@pytest.mark.parametrize("size", [1, 4096, stream.FIRST_BYTES, 100_000, LIMIT])
@pytest.mark.parametrize("header", [b"h" * 40, b"h" * 20_000])
def test_a_message_comes_back_whole(tmp_path: Path, header: bytes, size: int) -> None:
    data = os.urandom(size)

    def ask(path: str) -> None:
        channel = Channel(path)
        for payload in (memoryview(data), None, memoryview(data)):
            channel.send(header, payload, _nobody_waits)
            into = bytearray(size)
            frame, count = channel.receive(memoryview(into), _nobody_waits)
            assert (frame, count) == (header, size if payload is not None else 0)
            assert payload is None or into == data
        assert not channel.answered()
        channel.close()

    async def main() -> None:
        echo = Echo(tmp_path)
        await asyncio.to_thread(ask, echo.path)
        await _until(lambda: not echo.listener.connections)
        echo.listener.close()
        assert not echo.wrong

    asyncio.run(main())


@pytest.mark.parametrize("cut", [3, 8, 9, 20, 5000, 30_000])
def test_a_message_in_pieces_and_two_in_one(tmp_path: Path, cut: int) -> None:
    async def main() -> None:
        echo = Echo(tmp_path)
        messages = [(b"first", b"a" * 4000), (b"second", b"b" * 20_000), (b"third", b"")]
        raw = b"".join(b"".join(stream.parts(h, p or None)) for h, p in messages)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(echo.path)
            peer.setblocking(False)
            for at in range(0, len(raw), cut):
                await asyncio.get_running_loop().sock_sendall(peer, raw[at : at + cut])
            await _until(lambda: len(echo.taken) == 3)
        assert echo.taken == [(h, len(p)) for h, p in messages]
        echo.listener.close()

    asyncio.run(main())


def test_half_a_message_is_none_and_garbage_ends_the_connection(tmp_path: Path) -> None:
    async def main() -> None:
        echo = Echo(tmp_path)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(echo.path)
            peer.sendall(stream.LENGTHS.pack(5, 100_000) + b"half." + b"x" * 60_000)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(echo.path)
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await _until(lambda: echo.wrong)
            assert peer.recv(10) == b""
        await _until(lambda: not echo.listener.connections)
        assert not echo.taken
        echo.listener.close()

    asyncio.run(main())

"""Requests over a connection that may be lost."""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import zmq

from tests.machine import PortRange
from ukai import messages
from ukai.errors import Timeout
from ukai.wire import LARGE_BYTES, Frames, Port, Requester, bound, connected

TIMEOUT_S = 20.0

Context = zmq.Context[zmq.Socket[bytes]]


def play(run: Callable[[Context, str], Awaitable[None]]) -> None:
    """With a context, and an endpoint that is free."""
    ports = PortRange(["127.0.0.1"], 1)
    with zmq.Context() as context:
        asyncio.run(run(context, f"tcp://127.0.0.1:{ports.first}"))  # type: ignore[arg-type]
    ports.close()


@asynccontextmanager
async def echoed(
    context: Context, endpoint: str, look: Callable[[Frames], None]
) -> AsyncIterator[tuple[Port, asyncio.Queue[Frames]]]:
    """A connected port, and what comes back of that which it sends; ``look`` sees it where it is sent back."""
    back: asyncio.Queue[Frames] = asyncio.Queue()

    def echo(frames: Frames) -> None:
        assert server.send(frames)
        look(frames)

    server = bound(context, endpoint, 1 << 20, echo)
    port = connected(context, endpoint, back.put_nowait)
    try:
        while not port.send([b"first"]):  # noqa: ASYNC110 a DEALER does not tell when it is connected
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(back.get(), TIMEOUT_S) == [b"first"]
        yield port, back
    finally:
        port.close()
        server.close()


def test_a_large_frame_is_passed_on_as_it_came() -> None:
    """Without a copy where one would cost, and the same bytes in either case."""
    sizes = [0, 1, LARGE_BYTES - 1, LARGE_BYTES, 4 * LARGE_BYTES + 1]

    def look(frames: Frames) -> None:
        assert isinstance(frames[1], memoryview) == (len(frames[1]) >= LARGE_BYTES)

    async def run(context: Context, endpoint: str) -> None:
        async with echoed(context, endpoint, look) as (port, back):
            for number, size in enumerate(sizes):
                data = bytes([number + 1]) * size
                for sent in (data, bytearray(data), memoryview(data), memoryview(data + b"rest")[:size]):
                    assert port.send([sent])
                    frames = await asyncio.wait_for(back.get(), TIMEOUT_S)
                    assert [bytes(f) for f in frames] == [data]

    play(run)


@pytest.mark.parametrize("together", [1, 2, 3, 200])
def test_messages_that_come_together_are_all_taken(together: int) -> None:
    """The descriptor tells once: messages that come together, and while others are answered, are all taken."""
    fails = [ValueError("a defect")]

    def look(frames: Frames) -> None:
        if frames[1] == b"0" and fails:
            raise fails.pop()

    def defect(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        assert isinstance(context["exception"], ValueError)

    async def run(context: Context, endpoint: str) -> None:
        asyncio.get_running_loop().set_exception_handler(defect)
        async with echoed(context, endpoint, look) as (port, back):
            for _ in range(20):
                sent = [b"%d" % number for number in range(together)]
                for frame in sent:
                    assert port.send([frame])
                assert [(await asyncio.wait_for(back.get(), TIMEOUT_S))[0] for _ in sent] == sent

    play(run)


def test_a_request_ends_with_its_connection() -> None:
    """Nobody will answer it: whoever asked may ask the next process, and does not wait for the whole time."""

    async def run(context: Context, endpoint: str) -> None:
        arrived = asyncio.Event()
        server = bound(context, endpoint, 1 << 20, lambda _frames: arrived.set())
        requester = Requester(context, endpoint)
        try:
            asked = asyncio.ensure_future(requester.call("first", {}, TIMEOUT_S))
            await arrived.wait()
            server.close()
            began = time.monotonic()
            with pytest.raises(Timeout, match="was lost"):
                await asked
            assert time.monotonic() - began < TIMEOUT_S / 2

            def answer(frames: Frames) -> None:
                server.send([frames[0], messages.pack({"re": messages.unpack(frames[1])["id"]})])

            server = bound(context, endpoint, 1 << 20, answer)
            await requester.call("second", {}, TIMEOUT_S)
        finally:
            requester.close()
            server.close()

    play(run)


@pytest.mark.expect_log("Exception in callback")
def test_no_message_is_left_lying() -> None:
    """libzmq tells of it once: whatever looks at the socket meanwhile must see to it, be it in vain.

    As with a daemon that was frozen: its answers go to connections that are no more, while new ones bring requests.
    """

    async def run(context: Context, endpoint: str) -> None:
        arrived: asyncio.Queue[bytes] = asyncio.Queue()

        def take(frames: Frames) -> None:
            arrived.put_nowait(bytes(frames[1]))
            if frames[1] == b"bad":
                raise ValueError("a defect")

        server = bound(context, endpoint, 1 << 20, take)
        client = context.socket(zmq.DEALER)
        client.linger = 0
        client.connect(endpoint)

        async def told() -> bytes:
            return await asyncio.wait_for(arrived.get(), 5)

        try:
            client.send(b"first")
            assert await told() == b"first"
            client.send(b"second")
            readable, _, _ = select.select([server.socket.getsockopt(zmq.FD)], [], [], TIMEOUT_S)
            assert readable
            assert not server.send([b"nobody", b"too late"])
            assert await told() == b"second"
            for message in (b"bad", b"third"):
                client.send(message)
            assert await told() == b"bad"
            assert await told() == b"third"
        finally:
            client.close()
            server.close()

    play(run)

"""Requests over a connection that may be lost."""

from __future__ import annotations

import asyncio
import time

import pytest
import zmq

from tests.machine import PortRange
from ukai import messages
from ukai.errors import Timeout
from ukai.wire import Frames, Requester, bound

TIMEOUT_S = 20.0


def test_a_request_ends_with_its_connection() -> None:
    """Nobody will answer it: whoever asked may ask the next process, and does not wait for the whole time."""
    ports = PortRange(["127.0.0.1"], 1)
    endpoint = f"tcp://127.0.0.1:{ports.first}"

    async def run(context: zmq.Context[zmq.Socket[bytes]]) -> None:
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

    with zmq.Context() as context:
        asyncio.run(run(context))
    ports.close()

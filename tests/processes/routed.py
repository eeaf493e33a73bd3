"""A daemon whose connections go where a test wants: ``routed.py blockd``, with UKAI_TEST_ROUTES as JSON."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import socket
import sys
from typing import Any

import zmq

from ukai import sockets


def main(name: str) -> None:
    routes: dict[str, str] = json.loads(os.environ["UKAI_TEST_ROUTES"])
    addresses = {sockets.address(here)[1]: sockets.address(there)[1] for here, there in routes.items()}
    connect = zmq.Socket.connect

    def routed(dealer: zmq.Socket[Any], endpoint: str) -> Any:
        return connect(dealer, routes.get(endpoint, endpoint))

    loop = asyncio.SelectorEventLoop
    sock_connect = loop.sock_connect

    async def routed_by_loop(self: Any, sock: socket.socket, where: Any) -> None:
        await sock_connect(self, sock, addresses.get(where, where))

    setattr(loop, "sock_connect", routed_by_loop)  # noqa: B010 — as below
    setattr(zmq.Socket, "connect", routed)  # noqa: B010 — what mypy takes for granted is changed here
    sys.argv = [f"ukai-{name}"]
    sys.exit(importlib.import_module(f"ukai.{name}.main").main())


if __name__ == "__main__":
    main(sys.argv[1])

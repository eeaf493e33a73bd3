"""A daemon whose connections go where a test wants: ``routed.py blockd``, with UKAI_TEST_ROUTES as JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import zmq

from ukai import sockets


def main(name: str) -> None:
    routes: dict[str, str] = json.loads(os.environ["UKAI_TEST_ROUTES"])
    connect = zmq.Socket.connect

    def routed(socket: zmq.Socket[Any], endpoint: str) -> Any:
        return connect(socket, routes.get(endpoint, endpoint))

    address = sockets.address

    setattr(sockets, "address", lambda endpoint: address(str(routes.get(endpoint, endpoint))))  # noqa: B010 — as above
    setattr(zmq.Socket, "connect", routed)  # noqa: B010 — what mypy takes for granted is changed here
    sys.argv = [f"ukai-{name}"]
    sys.exit(importlib.import_module(f"ukai.{name}.main").main())


if __name__ == "__main__":
    main(sys.argv[1])

"""The socket over which the frontend of this node gets the block files that it may read, and the pages of its loans."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from ukai import messages, page
from ukai.blockd.reads import Lent
from ukai.errors import RemoteProtocolError, UkaiError
from ukai.loans import Page
from ukai.messages import Header
from ukai.page import MappedPage

log = logging.getLogger(__name__)

CONNECTIONS_LIMIT = 8
REQUEST_BYTES = 4096
PAGES = "loans"


class Lender:
    """``lend`` decides about each request; what it raises goes back as an error."""

    def __init__(self, run_dir: str, socket_path: str, garbage: Callable[[RemoteProtocolError], None]) -> None:
        self._directory, self._path = Path(run_dir) / PAGES, socket_path
        self._garbage = garbage
        self._lend: Callable[[Header], Lent] | None = None
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._names = itertools.count(1)

    def begin(self) -> None:
        """End the loans of the former process, before anything is done that it would have taken them back for.

        Raises OSError.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        page.end_all(self._directory)

    def new_page(self, uuid: str, block_count: int) -> Page:
        """Raises OSError."""
        made = page.make(self._directory, uuid, block_count)
        made.name = next(self._names)
        return made

    def start(self, lend: Callable[[Header], Lent]) -> None:
        self._lend = lend
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(self._path)
        self._listener.listen(CONNECTIONS_LIMIT)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener)
            self._listener.close()
            Path(self._path).unlink(missing_ok=True)
        for connection in list(self._connections):
            self._drop(connection)
        page.end_all(self._directory)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            if len(self._connections) >= CONNECTIONS_LIMIT:
                connection.close()
                return
            connection.setblocking(False)
            self._connections.add(connection)
            asyncio.get_running_loop().add_reader(connection, functools.partial(self._serve, connection))

    def _drop(self, connection: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(connection)
        self._connections.discard(connection)
        connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(REQUEST_BYTES)
            if not data:
                self._drop(connection)
                return
            self._answer(connection, data)
        except BlockingIOError:
            return
        except RemoteProtocolError as e:
            self._garbage(e)
            self._drop(connection)
        except OSError as e:
            log.info("the frontend's loans: %s", e)
            self._drop(connection)

    def _answer(self, connection: socket.socket, data: bytes) -> None:
        """Raises RemoteProtocolError, OSError."""
        header = messages.unpack(data)
        known = messages.integer(header, "page")
        assert self._lend is not None
        try:
            lent = self._lend(header)
        except RemoteProtocolError:
            raise
        except UkaiError as e:
            connection.send(messages.pack({"re": header.get("id"), **messages.error_reply(e)}))
            return
        try:
            mapped = lent.page
            assert isinstance(mapped, MappedPage)
            fields = {"re": header.get("id"), "page": mapped.name, "number": lent.number}
            fds = [mapped.fd] if mapped.name != known else []
            fds += [lent.descriptor] if lent.descriptor >= 0 else []
            socket.send_fds(connection, [messages.pack(fields)], fds)
        finally:
            if lent.descriptor >= 0:
                os.close(lent.descriptor)

"""What a node does for the coordinators of other nodes.

A coordinator opens a session with ``hello`` and gets a token that this process made for it.  Whatever comes
after carries the token, and what alters data the next number too (R6): a gap, a number that was seen, an older
session or a former process are refused before a file is touched.  Then all fields are looked at, then the epoch
(R1), then the block (R8).
"""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeVar

from ukai import faults
from ukai.blockd.files import HOLE, zeros
from ukai.blockd.image_store import Borrowed, ImageStore
from ukai.blockd.store import Store
from ukai.errors import Damaged, NotReady, RemoteProtocolError, StaleSession, UkaiError
from ukai.messages import Header, error_reply, flag, integer, places, ranges, show, text
from ukai.ranges import RangeSet

Payload = bytes | bytearray | memoryview
Answer = tuple[Header, Payload | None]
Flushed = Callable[[dict[int, str]], None]
"""Hears which blocks could not be flushed, and why."""
Waiting = list[tuple[Collection[int], Flushed]]
T = TypeVar("T")
RunDisk = Callable[..., Awaitable[Any]]
Synced = Callable[[list[int]], None]
"""Hears the errno of each fdatasync; 0: it is done."""
Sync = Callable[[Sequence[int], Synced], bool]
"""fdatasync of descriptors without a thread; see aio.Aio.fdatasync."""

log = logging.getLogger(__name__)

HASH_LENGTH_LIMIT_BYTES = 64 * 2**20
READ_LIMIT_BYTES = 8 * 2**20
SUMS_AT_ONCE_BYTES = 4 * 2**20
SESSION_LIMIT = 1000
NAME_LIMIT = 255


class Later:
    """An answer that comes once and is handed on at once: a future would wait for the next turn of the loop."""

    __slots__ = ("_answer", "_told")

    def __init__(self) -> None:
        self._answer: Answer | None = None
        self._told: Callable[[Header, Payload | None], None] | None = None

    def then(self, told: Callable[[Header, Payload | None], None]) -> None:
        """``told`` hears the answer."""
        self._told = told
        if self._answer is not None:
            told(*self._answer)

    def tell(self, answer: Answer) -> None:
        self._answer = answer
        if self._told is not None:
            self._told(*answer)


def _synced_beside(count: int, ended: Synced, result: asyncio.Future[list[int]]) -> None:
    """A thread has done the fdatasyncs; a defect in it counts as the failure of all of them."""
    if result.cancelled():
        return  # the process ends
    if (error := result.exception()) is not None:
        log.error("defect in a flush", exc_info=error)
    ended(result.result() if error is None else [errno.EIO] * count)


def _tell(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _check_fit(image: ImageStore, block: int, offset: int, length: int) -> None:
    if offset + length > image.block_bytes(block):
        raise RemoteProtocolError(f"{length} bytes at {offset} do not fit into block {block}")


def _store(image: ImageStore, block: int, offset: int, data: Payload, generation: int) -> None:
    faults.point("replica.write")
    image.write(block, offset, data, generation)
    faults.point("replica.written")


class Session:
    """What one coordinator may send next."""

    __slots__ = ("attempt", "inc", "next", "node", "token")

    def __init__(self, node: str, inc: str, attempt: int, token: int) -> None:
        self.node, self.inc, self.attempt, self.token = node, inc, attempt, token
        self.next = 0


class Replica:
    """The replicas on this node, as seen by other nodes."""

    def __init__(
        self, store: Store, inc: str, first_token: int, run_disk: RunDisk, sync: Sync, now: Callable[[], float]
    ) -> None:
        self.store, self.inc, self.run_disk, self.sync, self._now = store, inc, run_disk, sync, now
        self.registered_seq = -1
        """Metadata sequence at which this process was registered; −1: not yet, and no session is opened (R8)."""
        self.flushed = asyncio.Event()
        """Set when a flush has ended."""
        self.boot_id = ""
        """Names the run of the kernel: what was not flushed does not outlive it."""
        self._flushes: dict[ImageStore, Waiting] = {}
        """Images with a flush under way → the blocks that wait for the next one, and who waits for them."""
        self._tokens = itertools.count(first_token)
        self.sessions: dict[int, Session] = {}
        self.by_node: dict[str, Session] = {}
        self._began = now()
        self._confirmed: dict[str, tuple[Collection[str], float]] = {}
        """node → images whose role it held at its last ping, and when that was answered."""
        self.before_epoch: Callable[[str, int], None] = lambda uuid, epoch: None
        self.on_epoch: Callable[[str, int], None] = lambda uuid, epoch: None
        """Called when an image's epoch has grown: a coordinator on this node may have lost its role."""
        self.numbered: dict[str, Callable[[Header, Payload | None], Answer | Later | Awaitable[Answer]]] = {
            "w": self._write,
            "wt": self._write_together,
            "ws": self._write_through,
            "z": self._punch,
            "g": self._stamp,
            "f": self._flush,
            "d": self._complete,
            "k": self._renew,
        }
        self.plain: dict[str, Callable[[Header], Answer | Awaitable[Answer]]] = {
            "hello": self._hello,
            "ping": self._ping,
        }
        self.of_session: dict[str, Callable[[Header], Answer | Awaitable[Answer]]] = {
            "fence": self._fence,
            "r": self._read,
            "h": self._hash,
            "usage": self._usage,
        }

    def handle(self, header: Header, payload: Payload | None) -> Answer | Later | Awaitable[Answer]:
        """Answer one message.  Raises UkaiError."""
        op = header.get("op")
        if type(op) is not str:
            raise RemoteProtocolError(f"op {show(op)} is not known here")
        if self.registered_seq < 0:
            raise NotReady("this node is not registered at metad yet")
        numbered = self.numbered.get(op)
        if numbered is not None:
            session = self._session(header)
            number = header.get("n")
            if type(number) is not int or number != session.next:
                self._end(session)
                raise StaleSession(f"message {show(number)} came where {session.next} was the next; say hello")
            session.next += 1
            return numbered(header, payload)
        of_session = self.of_session.get(op)
        if of_session is not None:
            self._session(header)
            return of_session(header)
        plain = self.plain.get(op)
        if plain is None:
            raise RemoteProtocolError(f"op {show(op)} is not known here")
        return plain(header)

    # --- sessions

    def _session(self, header: Header) -> Session:
        """Raises StaleSession."""
        token = header.get("t")
        session = self.sessions.get(token) if type(token) is int else None
        if session is None:
            raise StaleSession("this session is over; say hello")
        return session

    def _hello(self, header: Header) -> Answer:
        node, inc, attempt = text(header, "node", NAME_LIMIT), text(header, "inc", NAME_LIMIT), integer(header, "try")
        old = self.by_node.get(node)
        if old is not None:
            if old.inc == inc and attempt <= old.attempt:
                raise StaleSession("this hello is older than the session")
            self._end(old)
        elif len(self.by_node) >= SESSION_LIMIT:
            self._end(next(iter(self.by_node.values())))
        session = Session(node, inc, attempt, next(self._tokens))
        self.sessions[session.token] = self.by_node[node] = session
        answer = {"token": session.token, "inc": self.inc, "registered_seq": self.registered_seq}
        return {**answer, "boot": self.boot_id}, None

    def _end(self, session: Session) -> None:
        self.sessions.pop(session.token, None)
        if self.by_node.get(session.node) is session:
            del self.by_node[session.node]

    def _ping(self, header: Header) -> Answer:
        session = self._session(header) if "t" in header else None
        roles = header.get("roles", {})
        if type(roles) is not dict:
            raise RemoteProtocolError("field roles: a map is wanted")
        if session is not None:
            self._confirmed[session.node] = roles.keys(), self._now()
        stale = {}
        for uuid, epoch in roles.items():
            image = self.store.images.get(uuid)
            if image is not None and type(epoch) is int and image.epoch > epoch:
                stale[uuid] = image.epoch
        return {"stale": stale}, None

    # --- fields

    def _image(self, header: Header) -> ImageStore:
        return self.store.image(text(header, "i", 36))

    def _blocks(self, image: ImageStore, header: Header) -> list[int]:
        return list(RangeSet(ranges(header, "ranges", image.block_count - 1)).indexes())

    def _admit(self, image: ImageStore, epoch: int) -> None:
        """Once all fields are known to be good (R1).  Raises StaleEpoch, DiskError."""
        if epoch != image.epoch:
            self.before_epoch(image.uuid, epoch)
            image.admit(epoch)
            self.on_epoch(image.uuid, epoch)

    def _place(self, image: ImageStore, header: Header, length: int) -> tuple[int, int]:
        block, offset = integer(header, "b", 0, image.block_count - 1), integer(header, "o")
        _check_fit(image, block, offset, length)
        return block, offset

    # --- what alters data

    def _fence(self, header: Header) -> Answer:
        session = self._session(header)
        faults.point("replica.fence")
        image = self._image(header)
        self._admit(image, integer(header, "e"))
        faults.point("replica.fenced")
        return {"ago": int(self.confirmed_ago_s(image.uuid, session.node) * 1000)}, None

    def confirmed_ago_s(self, uuid: str, node: str) -> float:
        """How long ago a node other than ``node`` may have heard from here that no higher epoch is known (R3).

        What a former process of this node has answered is not known: as if it had done so until this one began.
        """
        times = [at for n, (roles, at) in self._confirmed.items() if n != node and uuid in roles]
        return self._now() - max([self._began, *times])

    def _write(self, header: Header, payload: Payload | None) -> Answer:
        if not payload:
            raise RemoteProtocolError("a write without data")
        image, epoch, generation = self._image(header), integer(header, "e"), integer(header, "g", 1)
        block, offset = self._place(image, header, len(payload))
        self._admit(image, epoch)
        _store(image, block, offset, payload, generation)
        return {}, None

    def _write_together(self, header: Header, payload: Payload | None) -> Answer:
        """Several writes, in their order (R6); one that fails does not keep the others from their files."""
        if not payload:
            raise RemoteProtocolError("writes without data")
        image, epoch, data = self._image(header), integer(header, "e"), memoryview(payload)
        pieces, at = [], 0
        for block, offset, generation, length in places(header, "w", image.block_count - 1):
            _check_fit(image, block, offset, length)
            pieces.append((block, offset, generation, data[at : at + length]))
            at += length
        if at != len(data):
            raise RemoteProtocolError(f"writes of {at} bytes in all with {len(data)} bytes of data")
        self._admit(image, epoch)
        failed: list[tuple[int, Header]] = []
        for number, (block, offset, generation, piece) in enumerate(pieces):
            try:
                _store(image, block, offset, piece, generation)
            except UkaiError as e:
                failed.append((number, error_reply(e)))
        return {"failed": failed} if failed else {}, None

    def _write_through(self, header: Header, payload: Payload | None) -> Later:
        """A write with its fdatasync (R7): one answer for both."""
        self._write(header, payload)
        return self._flushed(self._image(header), [header["b"]])

    def _punch(self, header: Header, _payload: Payload | None) -> Answer:
        image, epoch, generation = self._image(header), integer(header, "e"), integer(header, "g", 1)
        length = integer(header, "l", 1)
        block, offset = self._place(image, header, length)
        self._admit(image, epoch)
        image.punch(block, offset, length, generation)
        return {}, None

    def _stamp(self, header: Header, _payload: Payload | None) -> Awaitable[Answer]:
        image, epoch, generation = self._image(header), integer(header, "e"), integer(header, "g", 1)
        faults.point("replica.stamp")
        blocks, least = self._blocks(image, header), integer(header, "least", 0, generation)
        return self._one_by_one(image, epoch, blocks, lambda b: image.ready(b, generation, least))

    async def _one_by_one(
        self, image: ImageStore, epoch: int, blocks: list[int], work: Callable[[int], object]
    ) -> Answer:
        """Block after block, since each may have to make a file; others are served between two."""
        for block in blocks:
            self._admit(image, epoch)
            work(block)
            await asyncio.sleep(0)
        return {}, None

    def _flush(self, header: Header, _payload: Payload | None) -> Later:
        image, epoch = self._image(header), integer(header, "e")
        blocks = self._blocks(image, header)
        self._admit(image, epoch)
        return self._flushed(image, blocks)

    def _flushed(self, image: ImageStore, blocks: Collection[int]) -> Later:
        answer = Later()

        def done(failed: dict[int, str]) -> None:
            faults.point("replica.flushed")
            answer.tell(({"failed": [[b, reason] for b, reason in failed.items()]}, None))

        faults.point("replica.flush")
        self.flush_soon(image, blocks, done)
        return answer

    async def flush(self, image: ImageStore, blocks: Collection[int]) -> dict[int, str]:
        """fdatasync of some blocks on this node (R7); block → reason for those that failed."""
        found: asyncio.Future[dict[int, str]] = asyncio.get_running_loop().create_future()
        self.flush_soon(image, blocks, functools.partial(_tell, found))
        return await found

    def flush_soon(self, image: ImageStore, blocks: Collection[int], done: Flushed) -> None:
        """fdatasync of some blocks on this node (R7); ``done`` hears of those that failed.

        One at a time for each image: what waits for the one under way goes together in the next.  So an error that
        the kernel tells only once can't be missed by a flush beside the one that is told.  It goes on when nobody
        waits for it any more, because what it finds out must not be forgotten.
        """
        if image in self._flushes:
            self._flushes[image].append((blocks, done))
        else:
            self._flush_begins(image, [(blocks, done)])

    def _flush_begins(self, image: ImageStore, waiting: Waiting) -> None:
        self._flushes[image] = []
        blocks = sorted({block for wanted, _ in waiting for block in wanted})
        image.unflushed.difference_update(blocks)
        work = image.flush_begin(blocks)
        ended = functools.partial(self._flush_ended, image, waiting, work)
        fds = [fd for _, fd, _ in work if fd >= 0]
        if fds and not self.sync(fds, ended):
            result = asyncio.ensure_future(self.run_disk(image.flush_beside, work))
            result.add_done_callback(functools.partial(_synced_beside, len(fds), ended))
        image.flush_look(work)
        if not fds:
            ended([])

    def _flush_ended(self, image: ImageStore, waiting: Waiting, work: Borrowed, numbers: list[int]) -> None:
        failed = image.flush_end(work, numbers)
        if following := self._flushes.pop(image):
            self._flush_begins(image, following)
        self.flushed.set()
        for blocks, done in waiting:
            try:
                done({b: failed[b] for b in blocks if b in failed})
            except Exception:  # the others must hear of it all the same
                log.exception("defect after a flush")

    def _complete(self, header: Header, _payload: Payload | None) -> Awaitable[Answer]:
        image, epoch, generation = self._image(header), integer(header, "e"), integer(header, "g", 1)
        block = integer(header, "b", 0, image.block_count - 1)
        self._admit(image, epoch)
        return self._completed(image, block, generation)

    async def _completed(self, image: ImageStore, block: int, generation: int) -> Answer:
        await faults.pause("replica.complete")
        await self.complete(image, block, generation)
        return {}, None

    async def complete(self, image: ImageStore, block: int, generation: int) -> None:
        """A block of a resync is whole: its generation is stored and all of it flushed.  Raises DiskError."""
        if image.generations[block] < generation:
            image.set_generation(block, generation)
        failed = await self.flush(image, [block])
        if failed:
            raise Damaged(failed[block])

    def _renew(self, header: Header, _payload: Payload | None) -> Awaitable[Answer]:
        image, epoch = self._image(header), integer(header, "e")
        faults.point("replica.renew")
        return self.renew(image, epoch, self._blocks(image, header), flag(header, "empty"))

    async def renew(self, image: ImageStore, epoch: int, blocks: list[int], empty: bool) -> Answer:
        """Make blocks of an out-of-sync replica ready for a resync, those that stay ``empty`` without a file.

        That they are of no generation is on the disk before anything is copied into them.  Raises UkaiError.
        """
        await self._one_by_one(image, epoch, blocks, image.disown if empty else image.renew)
        if image.sums is not None and not empty:
            for block in blocks:
                self._admit(image, epoch)
                await self.renew_sums(image, block)
        await self.flush(image, [])
        image.check_generations()
        self._admit(image, epoch)
        return {}, None

    async def renew_sums(self, image: ImageStore, block: int) -> None:
        """Make the checksums of a block those of what it holds.  Raises Damaged, DiskError.

        A thread looks for what differs; only the loop, which also writes, alters anything.
        """
        length = image.block_bytes(block)
        for at in range(0, length, SUMS_AT_ONCE_BYTES):
            size = min(SUMS_AT_ONCE_BYTES, length - at)
            if not await self.run_disk(image.matches_beside, image.borrow(block), block, at, size):
                image.accept(block, at, size)

    # --- what reads

    def _read(self, header: Header) -> Answer | Awaitable[Answer]:
        image = self._image(header)
        length = integer(header, "l", 1, READ_LIMIT_BYTES)
        block, offset = self._place(image, header, length)
        if "least" in header:
            image.check_least(block, integer(header, "least"))
        else:
            image.check(block, integer(header, "g"))
        if image.generations[block] == 0:
            return {}, zeros(length)
        data = image.read_cached(block, offset, length)
        return ({}, data) if data is not None else self._read_beside(image, block, offset, length)

    async def _read_beside(self, image: ImageStore, block: int, offset: int, length: int) -> Answer:
        return {}, await self.read(image, block, offset, length)

    async def read(self, image: ImageStore, block: int, offset: int, length: int) -> bytes:
        """Read from the disk.  Raises Damaged, DiskError."""
        try:
            data: bytes = await self.run_disk(image.read_beside, image.borrow(block), block, offset, length)
        except Damaged:
            if image.sums is None:
                raise
            data = image.read(block, offset, length)  # nothing is being written now
        return data

    def _hash(self, header: Header) -> Awaitable[Answer]:
        image, length = self._image(header), integer(header, "l", 1, HASH_LENGTH_LIMIT_BYTES)
        block, offset = self._place(image, header, length)
        chunk = integer(header, "c", 512)
        image.check_least(block, integer(header, "least", default=0))
        if "g" in header:
            image.check(block, integer(header, "g"))
        return self._hashed(image, block, offset, length, chunk)

    async def _hashed(self, image: ImageStore, block: int, offset: int, length: int, chunk: int) -> Answer:
        return {}, await self.hash(image, block, offset, length, chunk)

    async def hash(self, image: ImageStore, block: int, offset: int, length: int, chunk: int) -> bytes:
        """16 bytes for each chunk of a part of a block.  Raises Damaged, DiskError."""
        if image.generations[block] == 0 and not image.there(block):
            return HOLE * -(-length // chunk)
        while True:
            try:
                data: bytes = await self.run_disk(image.hash_beside, image.borrow(block), block, offset, length, chunk)
                return data
            except Damaged as e:
                at = e.details.get("at")
                if type(at) is not int:
                    raise
                image.read(block, at, 1)  # raises as well, unless the chunk was just being written

    async def _usage(self, header: Header) -> Answer:
        image = self._image(header)
        wanted = ranges(header, "ranges", image.block_count - 1)
        if flag(header, "all"):
            wanted = [(0, image.block_count - 1)]
        return {"allocated": await self.run_disk(image.allocated, wanted)}, None

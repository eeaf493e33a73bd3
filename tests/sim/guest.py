"""The guest and the register checker.

Each 512-byte sector is a register.  A written value is unique, so a read tells which write it saw.  For each
sector ``possible`` holds what may be read now: the value of the last acknowledged write, and values of writes
whose outcome is open.  A read that sees one of them settles it: what came must not go again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from ukai.errors import UkaiError

if TYPE_CHECKING:
    from tests.sim.world import Frontend, World

SECTOR = 512
DEADLINE_SLACK_S = 1.5


@lru_cache(maxsize=1000)
def content(value: int) -> bytes:
    return value.to_bytes(8, "big") * (SECTOR // 8)


class Register:
    """One sector."""

    __slots__ = ("busy", "last", "pending", "possible", "readers", "shaky", "unflushed")

    def __init__(self) -> None:
        self.possible: set[int] = {0}
        self.pending: set[int] = set()
        """Values being written now."""
        self.unflushed: set[int] = set()
        """Values that were possible since the last flush began: power cuts may bring them back."""
        self.readers: list[set[int]] = []
        self.last: Guest | None = None
        """Whose write was acknowledged last."""
        self.busy = False
        self.shaky = False
        """The last copy lost power under a living guest, which has not been told yet."""

    def _seen(self) -> None:
        for reader in self.readers:
            reader |= self.possible

    def write_begins(self, value: int) -> None:
        self.unflushed |= self.possible
        self.possible = self.possible | {value}
        self.pending.add(value)
        self._seen()

    def write_ends(self, value: int, acknowledged: bool) -> None:
        self.pending.discard(value)
        if acknowledged:
            self.possible = {value} | self.pending | (self.possible if self.shaky else set())
        self._seen()

    def read_begins(self) -> set[int]:
        reader = set(self.possible)
        self.readers.append(reader)
        return reader

    def read_ends(self, reader: set[int], value: int | None) -> bool:
        """Whether the value may have been read; None: the read failed."""
        self.readers = [r for r in self.readers if r is not reader]
        if value is None:
            return True
        if value not in reader:
            return False
        if value in self.possible and not self.pending and not self.shaky:
            self.possible = {value}
        elif value in self.pending and not self.shaky:
            self.possible = {value}  # it was read before it was acknowledged: it may not go away again
        return True

    def may_be_lost(self) -> None:
        """Power cuts took every copy's unflushed writes."""
        self.possible = self.possible | self.unflushed | self.pending
        self._seen()


class Guest:
    """One virtual machine with a disk on one hypervisor."""

    def __init__(
        self, world: World, frontend: Frontend, registers: list[Register], block_sectors: int, pairs: float = 0.0
    ) -> None:
        self.world, self.frontend, self.registers, self.block_sectors = world, frontend, registers, block_sectors
        self.pairs = pairs
        """How often a write is followed by a flush."""
        self.running = True
        self.dead = False
        """Its machine lost power: nobody hears its acknowledgements any more."""
        self.wrote = False
        self.tasks: list[asyncio.Task[None]] = []
        self.size = len(registers)
        self.mine: dict[int, tuple[int, float]] = {}
        """Sector → the last value that this guest knows to be written."""

    async def thread(self) -> None:
        """Random requests, one at a time, on sectors that no other thread of a guest is using."""
        chance = self.world.chance
        while await self._next():
            kind = chance.random()
            if kind < 0.08:
                await self.flush()
                continue
            first = chance.randrange(self.size)
            count = min(chance.choice((1, 1, 1, 2, 4, 8, 20)), self.size - first)
            span = self.registers[first : first + count]
            if any(r.busy for r in span):
                continue
            for register in span:
                register.busy = True
            try:
                if kind < 0.5:
                    good = await self.write(first, count, discard=kind > 0.46)
                    if not good and self.running:
                        await self.write(first, count)  # as QEMU does when the machine is told to go on
                    if self.pairs and chance.random() < self.pairs:
                        await self.flush()
                else:
                    await self.read(first, count)
            finally:
                for register in span:
                    register.busy = False

    async def _next(self) -> bool:
        await asyncio.sleep(self.world.chance.expovariate(1 / 0.01))
        return self.running

    def stale(self) -> bool:
        """Whether what was acknowledged to it may be gone: it must not be served any more."""
        early = self.world.early
        return early is not None and early.is_stale(self.frontend.node, self.frontend.epoch)

    async def write(self, first: int, count: int, discard: bool = False) -> bool:
        world = self.world
        was_stale = self.stale()
        span = self.registers[first : first + count]
        values = [0 if discard else next(world.numbers) for _ in span]
        for register, value in zip(span, values, strict=True):
            register.write_begins(value)
        began = asyncio.get_running_loop().time()
        header = {"o": first * SECTOR, "s": world.chance.random() < 0.05}
        try:
            if discard:
                await self.frontend.request({**header, "op": "z", "l": count * SECTOR}, None, True)
            else:
                await self.frontend.request({**header, "op": "w"}, b"".join(map(content, values)), True)
            acknowledged = True
        except UkaiError as e:
            world.note(f"write {first}+{count} failed: {e.message}")
            acknowledged = False
        if acknowledged and was_stale:
            world.violation(f"write {first}+{count} on {self.frontend.node}, whose writes may be lost, is acknowledged")
        acknowledged = acknowledged and not self.stale()  # it came too late to count for anything
        if self.dead:
            for register, value in zip(span, values, strict=True):
                register.pending.discard(value)
            return False
        self.wrote = self.wrote or acknowledged
        for register, value in zip(span, values, strict=True):
            register.write_ends(value, acknowledged)
        for sector, value in enumerate(values, first):
            if acknowledged:
                self.mine[sector] = (value, began)
                self.registers[sector].last = self
            else:
                self.mine.pop(sector, None)
        if acknowledged and world.early is None:
            self._everywhere(first, values)
        if acknowledged and header["s"]:
            self._stored({sector: self.mine[sector] for sector in range(first, first + len(values))}, "with O_SYNC")
        world.note(f"{self.frontend.node} write {first}+{count} {values[0]}.. {'ok' if acknowledged else 'failed'}")
        world.count("acknowledged" if acknowledged else "failed")
        if acknowledged and not discard:
            world.count("stored")
        self._in_time(began, f"write {first}+{count}")
        return acknowledged

    def _everywhere(self, first: int, values: list[int]) -> None:
        """An acknowledged write is in every replica that counts (R4)."""
        wanted = {s: v for s, v in enumerate(values, first) if not self.registers[s].shaky}
        for sector, value, node in self._missing(wanted, flushed=False):
            self.world.violation(f"write {value} of sector {sector} is acknowledged, {node} does not have it")
            return

    def _missing(self, wanted: dict[int, int], flushed: bool) -> Iterator[tuple[int, int, str]]:
        """(sector, value, node) for each sector whose value is not on the disk of a replica that counts."""
        copies: dict[str, bytes | bytearray] = {}
        last = -1
        for sector, value in wanted.items():
            block, at = divmod(sector, self.block_sectors)
            if block != last:
                last, copies = block, self.world.copies(block, flushed)
            at *= SECTOR
            for node, data in copies.items():
                if (data[at : at + SECTOR] or bytes(SECTOR)) != content(value):
                    yield sector, value, node

    def _in_time(self, began: float, what: str) -> None:
        from tests.sim.world import CONFIG

        took = asyncio.get_running_loop().time() - began
        if took > CONFIG.io_timeout + DEADLINE_SLACK_S:
            self.world.violation(f"{what} took {took:.3f} s")

    async def read(self, first: int, count: int) -> bool:
        world = self.world
        span = self.registers[first : first + count]
        readers = [r.read_begins() for r in span]
        was_stale = self.stale()
        began = asyncio.get_running_loop().time()
        try:
            data = await self.frontend.request({"op": "r", "o": first * SECTOR, "l": count * SECTOR}, None, False)
        except UkaiError as e:
            world.note(f"read {first}+{count} failed: {e.message}")
            world.count("failed reads")
            for register, reader in zip(span, readers, strict=True):
                register.read_ends(reader, None)
            return False
        if was_stale:
            world.violation(f"read {first}+{count} on {self.frontend.node}, whose writes may be lost, is answered")
        self._in_time(began, f"read {first}+{count}")
        world.count("reads")
        for index, (register, reader) in enumerate(zip(span, readers, strict=True)):
            sector = data[index * SECTOR : (index + 1) * SECTOR]
            value = int.from_bytes(sector[:8], "big")
            if bytes(sector) != content(value):
                world.violation(f"sector {first + index} is torn")
            elif value in reader and self.stale():
                register.read_ends(reader, None)  # it may be lost since it was read: nothing is settled by it
            elif not register.read_ends(reader, value):
                world.violation(
                    f"sector {first + index} on {self.frontend.node} reads {value}, possible were {sorted(reader)}"
                )
        return True

    async def flush(self) -> bool:
        covered = [(r, r.read_begins()) for r in self.registers]
        settled = dict(self.mine)
        was_stale = self.stale()
        try:
            await self.frontend.request({"op": "f"}, None, True)
        except UkaiError as e:
            self.world.note(f"flush failed: {e.message}")
            self.world.count("failed flushes")
            self.mine.clear()  # it has been told
            return False
        finally:
            for register, seen in covered:
                register.read_ends(seen, None)
        if was_stale:
            self.world.violation(f"a flush on {self.frontend.node}, whose writes may be lost, succeeds")
        self.world.count("flushes")
        self.world.note("flushed")
        if not self.dead and not self.stale():
            self._stored(settled)
        if self.world.early is not None and not self.wrote:
            return True  # what another machine has written is none of its business
        for register, seen in covered:
            register.unflushed = register.possible | seen
        return True

    def _stored(self, settled: dict[int, tuple[int, float]], how: str = "and flushed") -> None:
        """What this guest wrote before a flush began is on every disk that counts when it has ended (R7)."""
        wanted = {}
        for sector, (value, began) in sorted(settled.items()):
            register = self.registers[sector]
            if self.mine.get(sector) != (value, began) or register.last is not self:
                continue  # written again meanwhile, perhaps with the same value: all discards are zeros
            if register.possible == {value} and not register.pending and not register.shaky:
                wanted[sector] = value
        for sector, value, node in self._missing(wanted, flushed=True):
            self.world.violation(f"write {value} of sector {sector}, {how}: {node} has not stored it")
            return

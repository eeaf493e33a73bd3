"""One run: a cluster, a guest that moves, faults by chance, then healing; all from one seed."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
from dataclasses import dataclass, field, replace
from typing import Any

from tests.sim.disk import Copy, SimDisk
from tests.sim.early import Early
from tests.sim.guest import SECTOR, Guest, Register
from tests.sim.loop import CURRENT, VirtualLoop
from tests.sim.world import CONFIG, METAD, NODES, Frontend, World
from ukai.errors import UkaiError
from ukai.frontend.posted import Post
from ukai.metad.registration import NO_DATA
from ukai.model import IN_SYNC, Image, written

BLOCK_BYTES = 8192
BLOCKS = 5
HEAL_LIMIT_S = 60.0
QUIET_S = 20.0
UNANSWERED = "a guest's request is never answered"


@dataclass
class Result:
    """What a run gave."""

    seed: int
    parameters: dict[str, Any]
    violations: list[str]
    trace: list[str]
    counts: dict[str, int]
    faults: dict[str, int] = field(default_factory=dict)

    def digest(self) -> str:
        """Names the trace."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


class Scenario:
    """See the module."""

    def __init__(self, seed: int, seconds: float = 12.0, forced: dict[str, Any] | None = None) -> None:
        self.world = World(seed)
        self.world.on_power = self._lost
        self.world.on_posts_lost = self._posts_lost
        chance = self.world.chance
        apart = random.Random(f"{seed} rare")
        self.parameters: dict[str, Any] = {
            "seconds": seconds,
            "threads": chance.choice((1, 2, 4)),
            "locations": chance.choice((1, 2, 2, 2, 3)),
            "faults": sorted(chance.sample(FAULTS, chance.randint(1, 5))),
            "fault_every_s": chance.choice((0.5, 1.0, 3.0)),
            "lossy_publish": chance.choice((0.0, 0.3, 1.0)),
            "repeat": chance.choice((0.0, 0.02)),
            "slow_ms": chance.choice((0.2, 1.0, 5.0)),
            "local": chance.random() < 0.8,
            "rare": sorted(apart.sample(RARE, apart.randint(1, 2))) if apart.random() < 0.4 else [],
            "accept": apart.random() < 0.1,
            "power_s": 2.0,
            "struck": list(NODES),
            "direct": random.Random(f"{seed} direct").random() < 0.7,
            "replication": "flush" if random.Random(f"{seed} replication").random() < 0.4 else "sync",
            "active_limit": apart.choice((3, 4)),
            "checksum": random.Random(f"{seed} checksum").random() < 0.15,
            "pairs": random.Random(f"{seed} pairs").choice((0.0, 0.0, 0.5, 0.95)),
            **(forced or {}),
        }
        self.faults: dict[str, int] = {}
        self.registers = [Register() for _ in range(BLOCKS * BLOCK_BYTES // SECTOR)]
        self.guest: Guest | None = None
        self.tasks: list[asyncio.Task[Any]] = []
        self.shaken: list[Register] = []
        """What was lost under a living guest, until it is started anew."""
        self.written: set[int] = set()
        self.copies: list[tuple[float, dict[str, Copy]]] = []
        """Moment, and each disk as it was then."""
        self.lengths: list[tuple[float, int]] = []
        """Moment, and how many changes metad's database had."""

    # --- the run

    async def run(self) -> None:
        world, p = self.world, self.parameters
        world.net.slow, world.direct = p["slow_ms"] / 1000, p["direct"]
        world.config = replace(CONFIG, active_limit=p["active_limit"])
        world.net.slow = p["slow_ms"] / 1000
        world.start_metad()
        for node in NODES:
            world.start_blockd(node)
        await self._until(
            "all nodes are registered", lambda: all(b.core.registered for b in world.blockds.values()), 10
        )
        places = list(NODES[: p["locations"]]) if p["local"] else list(NODES[-p["locations"] :])
        size = BLOCKS * BLOCK_BYTES
        if p["replication"] == "flush":
            world.early = Early(self._lost_early)
        await world.ctl(
            "image.create",
            name="disk",
            size=size,
            block_size=BLOCK_BYTES,
            locations=places,
            hypervisors=list(NODES),
            replication=p["replication"],
            checksum=p["checksum"],
        )
        world.net.repeat, world.lossy_publish = p["repeat"], p["lossy_publish"]
        self._boot_guest(NODES[0])
        watcher = self._task(self._watch())
        end = world_time() + p["seconds"]
        while world_time() < end:
            await asyncio.sleep(world.chance.expovariate(1 / p["fault_every_s"]))
            await self._fault(world.chance.choice([*p["faults"], *p["rare"], *(["accept"] if p["accept"] else [])]))
            await self._replace_stale()
        await self._heal()
        watcher.cancel()
        for task in self.tasks:
            task.cancel()

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.append(task)
        return task

    async def _until(self, what: str, condition: Any, limit_s: float) -> bool:
        end = world_time() + limit_s
        while not condition():
            if world_time() >= end:
                self.world.violation(f"{what}: not within {limit_s:g} s")
                return False
            await asyncio.sleep(0.02)
        return True

    # --- guests

    def _present(self) -> Guest | None:
        return self.guest

    def _boot_guest(self, node: str) -> None:
        frontend = Frontend(self.world, node)
        self.world.note(f"a guest starts on {node}")
        self._task(frontend.keep())
        self.guest = Guest(self.world, frontend, self.registers, BLOCK_BYTES // SECTOR, self.parameters["pairs"])
        for _ in range(self.parameters["threads"]):
            self.guest.tasks.append(self._task(self.guest.thread()))

    async def _replace_stale(self) -> None:
        """A guest that was told that its disk is another's now, or has lost something, is started anew."""
        guest, early = self.guest, self.parameters["replication"] == "flush"
        if guest is not None and (self.shaken or guest.stale() or (early and guest.frontend.stale)):
            self.world.note("what the guest has written is lost" if self.shaken else "the guest's handles are stale")
            await self._end_guest(flush=False)
            for register in self.shaken:
                register.shaky = False
            self.shaken.clear()
            self._boot_guest(self.world.chance.choice(NODES))

    async def _end_guest(self, flush: bool) -> None:
        """The guest stops; it has no request under way when this returns."""
        guest = self.guest
        if guest is None:
            return
        self.guest = None
        guest.running = False
        await self._quiet()
        if flush:
            await guest.flush()
        await guest.frontend.close()

    # --- faults

    async def _fault(self, kind: str) -> None:
        world = self.world
        self.faults[kind] = self.faults.get(kind, 0) + 1
        chance = world.chance
        node = chance.choice(self.parameters["struck"])
        loop = asyncio.get_running_loop()
        if kind == "kill blockd":
            world.kill_blockd(node)
            loop.call_later(chance.uniform(0.05, 2), self._start_blockd, node)
        elif kind == "kill metad":
            world.kill_metad()
            loop.call_later(chance.uniform(0.05, 2), self._start_metad)
        elif kind == "cut":
            a, b = chance.sample([METAD, *NODES], 2)
            ways = {(a, b)} if chance.random() < 0.4 else {(a, b), (b, a)}
            world.note(f"cut {sorted(ways)}")
            world.net.cuts |= ways
            loop.call_later(chance.uniform(0.05, 3), self._join, ways)
        elif kind == "freeze":
            if world.blockds[node].alive and not world.blockds[node].process.frozen:
                world.freeze(node)
                loop.call_later(chance.uniform(0.1, 4), world.thaw, node)
        elif kind == "long freeze":  # longer than a request may take: its guest's writes are overdue
            home = self.guest.frontend.node if self.guest is not None else node
            if world.blockds[home].alive and not world.blockds[home].process.frozen:
                world.freeze(home)
                loop.call_later(CONFIG.io_timeout + chance.uniform(0.2, 3), world.thaw, home)
        elif kind == "power":
            await self._power_cut(node)
        elif kind == "disk":
            what = chance.choice(("pwrite", "fdatasync", "pread"))
            world.note(f"{what} fails on {node}")
            world.disks[node].fail[what] = chance.randint(1, 2)
        elif kind == "full":
            world.note(f"disk full on {node}")
            world.disks[node].full = True
            loop.call_later(chance.uniform(0.2, 2), self._space, node)
        elif kind == "database":
            world.database.fail = chance.randint(1, 2)
        elif kind == "sync":
            await self._order("sync.start", name="disk")
        elif kind == "stop sync":
            await self._order("sync.stop", name="disk")
        elif kind == "migrate":
            await self._end_guest(flush=True)
            self._boot_guest(node)
        elif kind == "zombie":
            await self._zombie(node)
        elif kind == "location":
            if chance.random() < 0.5:
                await self._order("location.add", name="disk", node=node)
                await self._order("sync.start", name="disk")
            else:
                await self._order("location.remove", name="disk", node=node)
        elif kind == "slow disk":
            world.disks[node].slow_s = chance.uniform(0.05, 0.8)
            loop.call_later(chance.uniform(0.5, 2), self._fast, node)
        elif kind == "takeover":
            await self._takeover(node)
        elif kind == "split":
            await self._split(node)
        elif kind in ("block file", "old directory"):
            await self._tamper(node, kind)
        elif kind == "swap":
            await self._swap(node, chance.choice([n for n in NODES if n != node]))
        elif kind == "old metad":
            await self._old_metad()
        elif kind == "rot":
            await self._rot(node)
        elif kind == "accept":
            await self._accept()

    def _fast(self, node: str) -> None:
        self.world.disks[node].slow_s = 0.0

    def _start_blockd(self, node: str) -> None:
        if not self.world.blockds[node].alive:
            self.world.start_blockd(node)

    def _start_metad(self) -> None:
        if self.world.metad is not None and not self.world.metad.alive:
            self.world.start_metad()

    def _join(self, ways: set[tuple[str, str]]) -> None:
        self.world.note(f"join {sorted(ways)}")
        self.world.net.cuts -= ways

    def _space(self, node: str) -> None:
        self.world.disks[node].full = False

    async def _order(self, op: str, **fields: Any) -> None:
        try:
            await self.world.ctl(op, **fields)
            self.world.note(f"{op} {fields}")
        except UkaiError as e:
            self.world.note(f"{op} refused: {e.message}")

    async def _power_cut(self, node: str) -> None:
        """A machine loses power: its guest, its blockd and what its disk had not stored."""
        world = self.world
        if not world.blockds[node].alive:
            return
        guest = self.guest
        with_guest = guest is not None and guest.frontend.node == node
        if guest is not None and with_guest:
            self.guest = None
            guest.running, guest.dead = False, True
        world.kill_blockd(node, power=True)
        if world.early is not None:
            world.early.power_cut(node)
        if with_guest:
            await self._quiet()
        await asyncio.sleep(world.chance.uniform(0.05, self.parameters["power_s"]))
        self._start_blockd(node)
        if self.guest is None:
            self._boot_guest(world.chance.choice(NODES))

    def _lost_early(self, block: int) -> None:
        """What a flush image has acknowledged of a block and not flushed may be gone."""
        at = block * BLOCK_BYTES // SECTOR
        for register in self.registers[at : at + BLOCK_BYTES // SECTOR]:
            register.may_be_lost()

    def _posts_lost(self, posts: list[Post]) -> None:
        for post in posts:
            for register in self.registers[post.offset // SECTOR : post.end // SECTOR]:
                register.may_be_lost()

    def _lost(self, image: Image) -> None:
        """All that only lay in page caches may be gone where the last copies lost power: no storage can keep that.

        A living guest hears of it at its next fsync, and is started anew.
        """
        for block in range(image.block_count):
            good = {n for n, r in image.replicas(block).items() if r.status == IN_SYNC}
            if good <= self.world.powerless:
                at = block * BLOCK_BYTES // SECTOR
                for register in self.registers[at : at + BLOCK_BYTES // SECTOR]:
                    register.may_be_lost()
                    if self.guest is not None or register.busy:  # by one that is being ended
                        register.shaky = True
                        self.shaken.append(register)

    async def _quiet(self) -> None:
        """Wait until no guest has a request under way."""
        end = world_time() + QUIET_S
        while any(r.busy for r in self.registers):
            if world_time() > end:
                self.world.violation(UNANSWERED)
                return
            await asyncio.sleep(0.01)

    async def _zombie(self, node: str) -> None:
        """The administrator starts the machine elsewhere while the old one may still run."""
        old = self.guest
        if old is None or old.frontend.node == node or not old.wrote:
            return  # one that never wrote may still become the writer
        self.guest = None
        old.running = False
        await self._quiet()
        self._boot_guest(node)
        new = self._present()
        end = world_time() + 8
        while world_time() < end:
            if new is not None and new.wrote:  # until then it may have the role only to read
                break
            await asyncio.sleep(0.1)
        else:
            return
        # the old machine wakes up: none of its writes may count any more
        for _ in range(3):
            sector = self.world.chance.randrange(len(self.registers))
            register = self.registers[sector]
            if register.busy:
                continue
            register.busy = True
            try:
                if await old.write(sector, 1):
                    self.world.violation(f"a machine that was replaced wrote sector {sector}")
                await old.read(sector, 1)
            finally:
                register.busy = False
        await old.frontend.close()

    async def _takeover(self, node: str) -> None:
        """The guest's machine freezes for a while, and the guest is started elsewhere at once."""
        world, old = self.world, self.guest
        if old is None or old.frontend.node == node or not world.registered(old.frontend.node):
            return
        if not old.wrote:
            return  # a write that it has asked for may still make it the writer
        home = old.frontend.node
        if world.blockds[home].process.frozen:
            return
        self.guest = None
        world.freeze(home)
        await asyncio.sleep(world.chance.uniform(0, 0.1))  # what it asks for now is done when it is thawed, or not
        old.running, old.dead = False, True
        world.lose_frontend(home)
        for task in old.tasks:
            task.cancel()
        await self._quiet()
        self._boot_guest(node)
        await asyncio.sleep(world.chance.uniform(1.5, 4))
        world.thaw(home)

    async def _split(self, node: str) -> None:
        """The guest's machine is cut off and runs on, and a second one of the same disk is started elsewhere."""
        world, old = self.world, self.guest
        if old is None or old.frontend.node == node or not old.wrote:
            return
        home = old.frontend.node
        ways = {
            w for other in (METAD, *NODES) if other != home for w in ((home, other), (other, home))
        } - world.net.cuts
        world.note(f"split: {home} is alone")
        self.guest = None
        world.net.cuts |= ways
        self._boot_guest(node)
        readers = [self._task(self._reader(old)) for _ in range(2)]
        await asyncio.sleep(world.chance.uniform(1.5, 4))
        for reader in readers:
            reader.cancel()
        self._join(ways)
        await asyncio.sleep(world.chance.uniform(0, 1))
        old.running = False
        _, left = await asyncio.wait(old.tasks, timeout=QUIET_S)  # not the other one's requests: it runs on
        if left:
            world.violation(UNANSWERED)
        await old.frontend.close()

    async def _reader(self, guest: Guest) -> None:
        """A thread that only reads, also what is being written: others may have to wait while the machine is alone."""
        while guest.running:
            await asyncio.sleep(0.003)
            sector = self.world.chance.randrange(len(self.registers))
            register = self.registers[sector]
            if register.busy:
                await guest.read(sector, 1)
            else:
                register.busy = True
                try:
                    await guest.read(sector, 1)
                finally:
                    register.busy = False

    def _elsewhere(self, node: str) -> bool:
        """Whether another steady node has an in-sync copy of whatever is in-sync on this one."""
        image = next(iter(self.world.database.committed.images.values()))
        for block in range(image.block_count):
            replicas = image.replicas(block)
            good = {n for n, r in replicas.items() if r.status == IN_SYNC and self.world.registered(n)}
            if written(replicas) and node in good and not any(self.world.steady(n) for n in good - {node}):
                return False
        return True

    async def _tamper(self, node: str, kind: str) -> None:
        """Files are removed, cut off or replaced by older ones while blockd is down: it must be found out (R8)."""
        world = self.world
        disk = world.disks[node]
        old = [copies[node] for at, copies in self.copies if world_time() - at > OLD_COPY_S and node in copies]
        image = next(iter(world.database.committed.images.values()))
        old = [
            files for files in old if f"/data/{image.name}/.ukai.json" in files[0] and self._older(node, image, files)
        ]
        paths = [_path(image.name, b) for b in range(BLOCKS) if _path(image.name, b) in disk.names_now]
        if not world.registered(node) or not self._elsewhere(node) or not (old if kind == "old directory" else paths):
            self.faults[kind] -= 1
            return
        world.kill_blockd(node)
        world.tampered.add(node)
        if kind == "old directory":
            world.note(f"an older copy of the disk of {node} is put back")
            disk.put_back(world.chance.choice(old))
            world.epochs = {key: epoch for key, epoch in world.epochs.items() if key[0] != node}
        else:
            path = world.chance.choice(paths)
            world.note(f"{path} of {node} is removed or cut off")
            if world.chance.random() < 0.5:
                disk.remove(path)
            else:
                disk.shorten(path, world.chance.choice((0, 512, 4096, BLOCK_BYTES - SECTOR)))
        before = {path for path in disk.names_now if not path.rpartition("/")[2].startswith(".")}
        self._start_blockd(node)
        end = world_time() + 3
        while not world.registered(node) and world_time() < end:  # noqa: ASYNC110  # another process's state
            await asyncio.sleep(0.02)
        if gone := before - set(disk.names_now):
            world.violation(f"{sorted(gone)} of {node} was deleted")

    def _older(self, node: str, image: Image, files: Copy) -> bool:
        """Whether a copy can be told from the present directory, even by a metad that was started anew (R8)."""
        store = json.loads(files[0]["/data/.ukai/store.json"])
        if store["serial"] < self.world.database.committed.nodes[node].serial:
            return True
        data = files[0][f"/data/{image.name}/.ukai.gen"]
        for block in range(BLOCKS):
            replica = image.replica(node, block)
            if replica is not None and replica.status == IN_SYNC:
                have = int.from_bytes(data[8 * block : 8 * block + 8], "little")
                held = files[0].get(_path(image.name, block), b"")
                if have >= image.required(node, block) and held != _block(self.world.disks[node], image.name, block):
                    return False
        return True

    async def _swap(self, a: str, b: str) -> None:
        """Two machines come up with each other's disk: neither may take part until that is put right (R8)."""
        world = self.world
        if not all(world.registered(n) and not world.blockds[n].process.frozen for n in (a, b)):
            self.faults["swap"] -= 1
            return
        for again in (False, True):
            for node in (a, b):
                world.kill_blockd(node)
                world.tampered.add(node)
            world.note(f"{a} and {b} have {'their own disks again' if again else 'swapped disks'}")
            world.disks[a].swap(world.disks[b])
            if again:
                world.tampered -= {a, b}
            self._start_blockd(a)
            self._start_blockd(b)
            if not again:
                end = world_time() + world.chance.uniform(0.5, 1.5)
                while world_time() < end:
                    await asyncio.sleep(0.05)
                    for node in (a, b):
                        if world.registered(node):
                            world.violation(f"{node} takes part with the disk of another node")

    async def _old_metad(self) -> None:
        """metad's database is an older copy for a while: nobody may go by it (R12)."""
        world = self.world
        if world.metad is None or not world.metad.alive or world.net.cuts:
            lengths = []
        else:
            lengths = [count for at, count in self.lengths if world_time() - at > OLD_DATABASE_S]
        quiet = all(world.registered(n) and not world.blockds[n].process.frozen for n in NODES)
        if not lengths or not quiet or lengths[-1] == len(world.database.entries):
            self.faults["old metad"] -= 1
            return
        await asyncio.sleep(SAVED_S)  # by then each node has stored what it saw, if metad answered its beats
        lengths = [count for count in lengths if self._noticed(count)]
        if not lengths:
            self.faults["old metad"] -= 1
            return
        count = world.chance.choice(lengths)
        world.note(f"metad's database is put back to change {count} of {len(world.database.entries)}")
        world.kill_metad()
        world.start_metad(world.database.older(count))
        if world.chance.random() < 0.5:
            node = world.chance.choice(NODES)
            world.kill_blockd(node)
            self._start_blockd(node)
        await asyncio.sleep(world.chance.uniform(0.5, 2))
        world.kill_metad()
        world.note("metad has its database again")
        world.start_metad()

    def _noticed(self, count: int) -> bool:
        """Whether each node will know that metadata of ``count`` changes is older than what it has seen (R12)."""
        last = self.world.database.entries[count - 1][0] if count else 0
        return all(self.world.saved_seq(n) > last for n in NODES)

    async def _rot(self, node: str) -> None:
        """A disk alters a sector silently.  Checksums keep it from every read; a verify finds it in any case."""
        world = self.world
        image = next(iter(world.database.committed.images.values()))
        blocks = [b for b in range(BLOCKS) if self._may_rot(image, node, b)] if self._calm() else []
        if not blocks:
            self.faults["rot"] -= 1
            return
        block, offset = world.chance.choice(blocks), world.chance.randrange(BLOCK_BYTES // SECTOR) * SECTOR
        path = _path(image.name, block)
        spoilt = world.disks[node].spoil(path, offset)
        world.note(f"{path} of {node} rots at {offset}")
        world.rotten.add((node, block))
        if await self._verified() and await self._marked(node, block):
            world.rotten.discard((node, block))
            replica = image.replica(node, block)
            found = _block(world.disks[node], image.name, block)[offset : offset + SECTOR]
            if replica is not None and replica.status == IN_SYNC and found == spoilt:
                world.violation(f"block {block} of {node} is altered, in-sync and verified")

    def _calm(self) -> bool:
        """Whether nothing is going on that could take another copy: a repeated message may end a session."""
        world = self.world
        disks = world.disks.values()
        return (
            all(world.registered(n) and not world.blockds[n].process.frozen for n in NODES)
            and world.metad is not None
            and world.metad.alive
            and not (
                world.net.cuts
                or world.net.repeat
                or world.database.fail
                or any(d.full or any(d.fail.values()) for d in disks)
            )
        )

    def _may_rot(self, image: Image, node: str, block: int) -> bool:
        """Whether there is a good copy elsewhere; without checksums, also that the guest does not read this one."""
        good = {n for n, r in image.replicas(block).items() if r.status == IN_SYNC and r.generation}
        guest = self.guest.frontend.node if self.guest is not None else ""
        unread = image.checksum or (guest == image.writer and guest in good - {node})
        stored = _path(image.name, block) in self.world.disks[node].names_now
        return stored and node in good and len(good) > 1 and block not in image.active and unread

    async def _verified(self) -> bool:
        """A verify, to its end."""
        world, number = self.world, 0
        end = world_time() + 4 * CONFIG.io_timeout
        while world_time() < end:
            try:
                if not number:
                    number = (await world.ctl("verify.start", name="disk"))["job"]["number"]
                jobs = (await world.ctl("sync.status", name="disk"))["jobs"]
                if jobs[0]["number"] == number and jobs[0]["state"] == "done":
                    return True
            except UkaiError as e:
                world.note(f"verify: {e.message}")  # another order is under way
            await asyncio.sleep(0.05)
        world.violation("a verify does not come to its end")
        return False

    async def _marked(self, node: str, block: int) -> bool:
        """Whether no mark of a replica is on its way any more: one that is goes without a comparison."""
        end = world_time() + CONFIG.io_timeout
        while world_time() < end:
            held = [c for b in self.world.blockds.values() if b.alive for c in b.core.coordinators.values() if c.held]
            if not any(node in c.marker.suspects(block) for c in held):
                return True
            await asyncio.sleep(0.01)
        return False

    async def _accept(self) -> None:
        """metad's database is lost but for an older copy, and an administrator says which node to trust (R12)."""
        world, old = self.world, self.guest
        if old is None or world.metad is None or not world.metad.alive or world.net.cuts:
            self.faults["accept"] -= 1
            return
        await self._end_guest(flush=True)
        lengths = [count for at, count in self.lengths if world_time() - at > OLD_DATABASE_S]
        await asyncio.sleep(SAVED_S)  # by then each node has stored what it saw, and the role is given up
        node = self._whole()
        lengths = [count for count in lengths if self._noticed(count)]
        quiet = all(world.registered(n) and not world.blockds[n].process.frozen and world.steady(n) for n in NODES)
        if not node or not lengths or not quiet or not world.metad.alive:
            self.faults["accept"] -= 1
            self._boot_guest(old.frontend.node)
            return
        count = world.chance.choice(lengths)
        world.note(f"only the metadata of change {count} of {len(world.database.entries)} is left")
        world.kill_metad()
        world.database = world.database.older(count)
        world.jumps = True
        world.start_metad()
        if world.chance.random() < 0.3:
            restarted = world.chance.choice(NODES)
            world.kill_blockd(restarted)
            self._start_blockd(restarted)
        metad = world.metad
        reported = await self._until("all nodes have reported", lambda: set(metad.core.reports) == set(NODES), 20)
        if reported:
            await self._order("metadata.accept", trust=[node])
            await self._until(
                "all nodes are registered after older metadata was accepted",
                lambda: all(world.registered(n) for n in NODES),
                20,
            )
        world.jumps = False
        self.lengths.clear()
        self._boot_guest(world.chance.choice(NODES))

    def _whole(self) -> str:
        """A node with an in-sync copy of all that was written, while nobody writes; nothing: there is none."""
        image = next(iter(self.world.database.committed.images.values()))
        if image.writer or len(image.active):
            return ""
        if self.world.rotten:
            return ""
        blocks = [b for b in range(image.block_count) if written(image.replicas(b))]
        good = [n for n in sorted(image.locations) if all(_in_sync(image, n, b) for b in blocks)]
        return self.world.chance.choice(good) if good else ""

    # --- oracles

    async def _watch(self) -> None:
        for count in itertools.count():
            await asyncio.sleep(0.05)
            self.check_replicas()
            if count % 10 == 0:
                self.lengths.append((world_time(), len(self.world.database.entries)))
                if "old directory" in self.parameters["rare"]:
                    self.copies.append(
                        (
                            world_time(),
                            {n: d.copy() for n, d in self.world.disks.items() if n not in self.world.tampered},
                        )
                    )

    def check_replicas(self) -> None:
        """In-sync replicas differ only in active blocks; the last copy is never lost."""
        world = self.world
        if world.jumps:
            return  # what the older metadata says of them goes for nothing
        for image in world.database.committed.images.values():
            for block in range(image.block_count):
                replicas = image.replicas(block)
                good = [n for n, r in replicas.items() if r.status == IN_SYNC]
                if written(replicas):
                    self.written.add(block)
                if not good and (replicas or block in self.written):
                    world.violation(f"block {block} has no in-sync replica")
                if block in image.active or not written(replicas):
                    continue
                known = [n for n in good if not world.altered(n) and (n, block) not in world.rotten]
                found = {n: _block(world.disks[n], image.name, block) for n in known}
                first = next(iter(found.values()), b"")
                if any(data != first for data in found.values()):
                    world.violation(f"block {block} is not active and differs between {good}: {_differences(found)}")

    async def _heal(self) -> None:
        world = self.world
        world.note("heal")
        world.net.cuts.clear()
        world.lossy_publish = world.net.repeat = 0.0
        world.database.fail = 0
        for node in NODES:
            world.disks[node].full = False
            world.disks[node].slow_s = 0.0
            world.disks[node].fail.clear()
            world.thaw(node)
            if "disk" in self.faults:  # a last copy whose flush failed stays failed until blockd is started anew
                world.kill_blockd(node)
            self._start_blockd(node)
        self._start_metad()
        await self._until(
            "all nodes are registered again", lambda: all(b.core.registered for b in world.blockds.values()), 20
        )
        if self.guest is None:
            self._boot_guest(NODES[0])
        wanted, end = world.counts.get("stored", 0) + 30, world_time() + 4 * CONFIG.io_timeout
        while world.counts.get("stored", 0) < wanted:
            await self._replace_stale()
            if world_time() >= end:
                world.violation("writes do not go on after healing")
                break
            await asyncio.sleep(0.02)
        end = world_time() + HEAL_LIMIT_S
        while not self._all_in_sync():
            if world_time() > end:
                world.violation(f"not all in-sync after healing: {self._statuses()}")
                break
            await self._add_anew()
            await self._order("sync.start", name="disk")
            await asyncio.sleep(0.5)
        guest = self.guest
        assert guest is not None
        guest.running = False
        await self._quiet()
        for sector in range(len(self.registers)):
            if not await guest.read(sector, 1):
                world.violation(f"sector {sector} can't be read after healing")
        await guest.flush()
        await guest.frontend.close()
        image = next(iter(world.database.committed.images.values()))
        await self._until(
            "after the last close there is no writer and no active block",
            lambda: not image.writer and not len(image.active),
            CONFIG.io_timeout + CONFIG.role_linger + 1,  # a node may still wait for a metad that was replaced
        )
        self.check_replicas()

    async def _add_anew(self) -> None:
        """An accepted older metadata may name a location that was removed since; what to do stands in the README."""
        image = next(iter(self.world.database.committed.images.values()))
        for node, where in list(image.locations.items()):
            if all(r.reason == NO_DATA for _, _, r in where):
                await self._order("location.remove", name="disk", node=node)
                await self._order("location.add", name="disk", node=node)

    def _statuses(self) -> dict[str, list[Any]]:
        image = next(iter(self.world.database.committed.images.values()))
        return {n: list(where) for n, where in image.locations.items()}

    def _all_in_sync(self) -> bool:
        image = next(iter(self.world.database.committed.images.values()))
        return all(r.status == IN_SYNC for where in image.locations.values() for _, _, r in where)


FAULTS = (
    "kill blockd", "kill metad", "cut", "freeze", "power", "disk", "full", "database", "sync", "stop sync", "migrate",
    "zombie", "location",
)  # fmt: skip
RARE = ("slow disk", "takeover", "split", "block file", "old directory", "swap", "old metad", "rot", "long freeze")
"""Drawn apart, so that they leave the chances of the others as they are."""
OLD_COPY_S = CONFIG.active_age + 1.0
"""How old a copy of a directory must be to be found out: by then each block that is written was announced anew."""
SAVED_S = 7 * CONFIG.beat_interval
"""A node stores each few beats which change it has seen."""
OLD_DATABASE_S = 1.0


def _in_sync(image: Image, node: str, block: int) -> bool:
    replica = image.replica(node, block)
    return replica is not None and replica.status == IN_SYNC


def world_time() -> float:
    return asyncio.get_running_loop().time()


def _path(image: str, block: int) -> str:
    return f"/data/{image}/{block:016d}"


def _block(disk: SimDisk, image: str, block: int) -> bytes | bytearray:
    inode = disk.names_now.get(_path(image, block))
    return b"" if inode is None else inode.cache


def _differences(found: dict[str, bytes | bytearray]) -> list[tuple[int, list[int]]]:
    """(sector of the block, value at each node) where they differ."""
    out = []
    for at in range(0, BLOCK_BYTES, SECTOR):
        values = [int.from_bytes(data[at : at + 8], "big") for data in found.values()]
        if len(set(values)) > 1:
            out.append((at // SECTOR, values))
    return out


def run(seed: int, seconds: float = 12.0, forced: dict[str, Any] | None = None, hasty: bool = False) -> Result:
    """One run from one seed; ``forced`` parameters instead of drawn ones; ``hasty``: the first violation ends it."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    scenario: Scenario | None = None
    try:
        CURRENT.set(None)

        async def main() -> Scenario:
            nonlocal scenario
            scenario = Scenario(seed, seconds, forced)
            work = loop.create_task(scenario.run())
            ended = asyncio.Event()
            work.add_done_callback(lambda _: ended.set())
            if hasty:
                scenario.world.on_violation = ended.set
            await ended.wait()
            if work.done():
                work.result()
            else:
                work.cancel()
            for task in scenario.tasks:
                task.cancel()
            return scenario

        loop.run_until_complete(main())
    finally:
        world = scenario.world if scenario is not None else None
        if world is not None:
            bury(world)
        asyncio.set_event_loop(None)
        loop.close()
    assert scenario is not None
    w = scenario.world
    return Result(seed, scenario.parameters, w.violations, w.trace, w.counts, scenario.faults)


def bury(world: World) -> None:
    """Close what never ended, quietly: these processes are dead."""
    processes = [*world.dead, *(b.process for b in world.blockds.values())]
    if world.metad is not None:
        processes.append(world.metad.process)
    for process in processes:
        process.alive = False
        for task in process.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            if not task.done():
                try:
                    # not close(): a compiled coroutine that awaits another may crash of GeneratorExit (mypyc)
                    task.get_coro().throw(asyncio.CancelledError())
                except BaseException:  # its finally blocks find a dead world
                    continue

"""Races that seeds have found, each played on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.sim.guest import SECTOR
from tests.sim.loop import VirtualLoop, within
from tests.sim.scenario import BLOCK_BYTES, BLOCKS, bury
from tests.sim.world import CONFIG, METAD, NODES, Frontend, World
from ukai.blockd.activity import Activity
from ukai.blockd.coordinator import Coordinator, Handle
from ukai.blockd.core import Core
from ukai.blockd.reads import Reads
from ukai.blockd.replica import Replica
from ukai.blockd.role import Role
from ukai.errors import StaleSession, Timeout, UkaiError, Unreachable
from ukai.messages import Header
from ukai.model import IN_SYNC, Image


def play(work: Callable[[World], Awaitable[None]], **settings: Any) -> None:
    """Three nodes without faults, and an image on the first two, in virtual time."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    world = World(1)
    world.config = replace(CONFIG, **settings)

    async def main() -> None:
        world.start_metad()
        for node in NODES:
            world.start_blockd(node)
        await until(lambda: all(b.core.registered for b in world.blockds.values()))
        fields = {"name": "disk", "size": BLOCKS * BLOCK_BYTES, "block_size": BLOCK_BYTES, "hypervisors": list(NODES)}
        await create(world, locations=list(NODES[:2]), **fields)
        await work(world)
        assert world.violations == []

    try:
        loop.run_until_complete(main())
    finally:
        bury(world)
        asyncio.set_event_loop(None)
        loop.close()


async def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  # another process's state
            await asyncio.sleep(0.01)


async def create(world: World, **fields: Any) -> None:
    await world.ctl("image.create", **fields)
    await until(lambda: all(b.mirror.seq >= world.database.committed.seq for b in world.blockds.values()))


def image_of(world: World) -> Image:
    return next(iter(world.database.committed.images.values()))


async def write(frontend: Frontend, block: int) -> None:
    await frontend.request({"op": "w", "o": block * BLOCK_BYTES, "s": False}, b"x" * SECTOR, True)


@pytest.mark.expect_log("out-of-sync: resync interrupted")
def test_a_block_first_written_while_its_resync_begins_is_not_left_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Coordinator.ask_metad
    raced: list[int] = []

    async def race(world: World) -> None:
        frontend = Frontend(world, NODES[0])

        async def ask_metad(self: Coordinator, op: str, fields: Header) -> Any:
            if op == "sync.begin" and not raced:
                raced.append(1)
                await write(frontend, 1)
            return await real(self, op, fields)

        monkeypatch.setattr(Coordinator, "ask_metad", ask_metad)
        await write(frontend, 0)
        await world.ctl("location.add", name="disk", node=NODES[2])
        await world.ctl("sync.start", name="disk")
        await until(lambda: world.database.committed.jobs[image_of(world).uuid].state == "done")
        assert raced
        assert all(r.status == IN_SYNC for _, _, r in image_of(world).locations[NODES[2]])
        await frontend.close()

    play(race)


def test_a_sequential_writer_does_not_wait_for_each_cold_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it comes to next is announced in the background, several blocks in one request (R5)."""
    asked: list[list[list[int]]] = []
    real = Coordinator.ask_metad

    async def ask_metad(self: Coordinator, op: str, fields: Header) -> Any:
        if op == "activate":
            asked.append(fields["ranges"])
        return await real(self, op, fields)

    async def sequence(world: World) -> None:
        monkeypatch.setattr(Coordinator, "ask_metad", ask_metad)
        fields = {"name": "long", "size": 64 * BLOCK_BYTES, "block_size": BLOCK_BYTES, "hypervisors": list(NODES)}
        await create(world, locations=[NODES[1]], **fields)
        frontend = Frontend(world, NODES[0], "long")
        cold = 0
        for block in range(64):
            active = world.blockds[NODES[0]].core.coordinators
            before = any(block in c.activity.warm for c in active.values())
            cold += not before
            for part in range(BLOCK_BYTES // SECTOR):
                header = {"op": "w", "o": block * BLOCK_BYTES + part * SECTOR, "s": False}
                await frontend.request(header, b"x" * SECTOR, True)
        assert cold == 2, "only the first two are waited for"
        assert len(asked) < 20
        await frontend.close()

    play(sequence, active_limit=32)


@pytest.mark.parametrize("replication", ["sync", "flush"])
def test_a_write_and_its_fsync_go_in_one_message(monkeypatch: pytest.MonkeyPatch, replication: str) -> None:
    """Of a synchronous write, and of one that is followed by an fsync each time (R7)."""
    asked: list[str] = []
    real = Replica.handle

    def handle(self: Replica, header: Header, payload: Any) -> Any:
        if header["op"] in ("w", "wt", "ws", "f"):
            asked.extend(["w"] * len(header["w"]) if header["op"] == "wt" else [header["op"]])
        return real(self, header, payload)

    async def sequence(world: World) -> None:
        if replication == "flush":
            await world.ctl("image.set", name="disk", replication="flush")
        frontend = Frontend(world, NODES[0])
        monkeypatch.setattr(Replica, "handle", handle)

        async def does(*ops: tuple[str, int, bool]) -> list[str]:
            asked.clear()
            for op, block, synchronous in ops:
                header = {"op": op, "o": block * BLOCK_BYTES, "s": synchronous} if op == "w" else {"op": op}
                await frontend.request(header, b"x" * SECTOR if op == "w" else None, True)
            return list(asked)

        await write(frontend, 0)
        await write(frontend, 1)
        await does(("f", 0, False))
        assert await does(("f", 0, False)) == [], "nothing is left to do"
        assert await does(("w", 0, True), ("f", 0, False)) == ["ws"]
        if replication == "sync":  # else the first is still under way
            assert await does(("w", 0, False), ("w", 0, True), ("f", 0, False)) == ["w", "ws"]
        assert await does(("w", 0, False), ("w", 1, True), ("f", 0, False)) == ["w", "w", "f"], "all before is stored"
        one = (("w", 1, False), ("f", 0, False))
        assert await does(*one, *one, *one, *one) == ["w", "f", "w", "f", "ws", "ws"]
        await frontend.close()

    play(sequence)


async def pair(frontend: Frontend, happens: list[str]) -> None:
    """A write to block 1 and its fsync."""
    await write(frontend, 1)
    happens.append("written")
    await frontend.request({"op": "f"}, None, True)
    happens.append("fsync")


@pytest.mark.parametrize("replication", ["sync", "flush"])
def test_what_is_acknowledged_early_is_stored_before_its_fsync(
    monkeypatch: pytest.MonkeyPatch, replication: str
) -> None:
    """The fdatasyncs of a write that an fsync follows each time begin with it, and a flush image does not wait (R7)."""
    happens: list[str] = []
    real = Replica._flush_ended

    def flush_ended(self: Replica, *args: Any) -> None:
        happens.append("stored")
        real(self, *args)

    async def pairs(world: World) -> None:
        await world.ctl("image.set", name="disk", replication=replication)
        frontend = Frontend(world, NODES[0])
        for _ in range(4):
            await pair(frontend, happens)
        monkeypatch.setattr(Replica, "_flush_ended", flush_ended)
        happens.clear()
        await pair(frontend, happens)
        written = ["written", "stored", "stored"] if replication == "flush" else ["stored", "stored", "written"]
        assert happens == [*written, "fsync"]
        await frontend.close()

    play(pairs)


@pytest.mark.expect_log("(out-of-sync|image disk): fdatasync of")
@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)])
def test_an_early_acknowledgement_whose_fdatasync_fails_is_marked_before_the_fsync_ends(bad: tuple[int, ...]) -> None:
    """Also where it is the writer's own copy, and the last one fails the fsync (R4, R7)."""

    async def pairs(world: World) -> None:
        await world.ctl("image.set", name="disk", replication="flush")
        frontend, happens = Frontend(world, NODES[0]), list[str]()
        for _ in range(4):
            await pair(frontend, happens)
        for number in bad:
            world.disks[NODES[number]].fail["fdatasync"] = 1
        if len(bad) == 2:
            with pytest.raises(UkaiError):
                await pair(frontend, happens)
        else:
            await pair(frontend, happens)
        out = {n for n, r in image_of(world).replicas(1).items() if r.status != IN_SYNC}
        assert out in ([{NODES[bad[0]]}] if len(bad) == 1 else [{NODES[0]}, {NODES[1]}])
        coordinator = world.blockds[NODES[0]].core.coordinators[image_of(world).uuid]
        assert coordinator.behind.ops == {}
        await frontend.close()

    play(pairs)


async def nothing(_self: object) -> None:
    """Takes the place of something."""


@pytest.mark.expect_log("the frontend (is silent|was started anew)")
@pytest.mark.parametrize("then", ["read", "moved", "fenced", "retired", "blockd dies", "frontend dies", "another one"])
def test_what_is_posted_counts_though_blockd_has_not_read_it(monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """It lies in a socket when another machine reads or writes, or when a role or a process ends (R1, R2)."""
    home, there = NODES[:2]

    async def story(world: World) -> None:
        await world.ctl("image.set", name="disk", replication="flush")
        world.direct = True
        frontend, other = Frontend(world, home), Frontend(world, there)
        beats = [asyncio.create_task(f.keep()) for f in (frontend, other)]
        while not world.counts.get("posted"):
            await write(frontend, 1)
        await frontend.request({"op": "f"}, None, True)
        server = world.blockds[home]
        with monkeypatch.context() as patch:
            patch.setattr(server, "posted", server._posted.append)
            await frontend.request({"op": "w", "o": BLOCK_BYTES, "s": False}, b"new" + bytes(SECTOR - 3), True)
        assert len(server._posted) == 1
        coordinator = server.core.coordinators[image_of(world).uuid]
        if then == "moved":
            await write(other, 2)
        elif then == "fenced":
            elsewhere = world.blockds[there]
            peer = within(elsewhere.process, elsewhere.core.peer, home)
            assert await within(elsewhere.process, asyncio.create_task, peer.settled())
            fields = {"i": coordinator.uuid, "e": coordinator.epoch + 1}
            await within(elsewhere.process, asyncio.create_task, peer.ask("fence", fields))
        elif then == "retired":
            await within(server.process, asyncio.create_task, coordinator.activity.retire_all())
        elif then == "blockd dies":
            world.kill_blockd(home)
            world.start_blockd(home)
            await frontend.request({"op": "f"}, None, True)
        elif then in ("frontend dies", "another one"):
            world.lose_frontend(home)
            with monkeypatch.context() as patch:
                patch.setattr(Activity, "tick", nothing)
                if then == "another one":
                    beats.append(asyncio.create_task(Frontend(world, home).keep()))
                await until(lambda: frontend.number not in server.core.frontends.handles, 60)
        if then == "read":
            data = await other.request({"op": "r", "o": BLOCK_BYTES, "l": 3}, None, False)
            assert bytes(data) == b"new"
        for copy in (
            world.copies(1, flushed=False).values() if then == "blockd dies" else [world.copies(1, False)[home]]
        ):
            assert bytes(copy[:3]) == b"new"
        assert then == "blockd dies" or not server._posted
        for beat in beats:
            beat.cancel()
        await frontend.close()
        await other.close()

    play(story)


@pytest.mark.expect_log("store.json can't be written")
def test_a_full_disk_that_could_not_store_what_was_seen_is_not_taken_for_an_older_copy() -> None:
    async def restart(world: World) -> None:
        frontend, node = Frontend(world, NODES[0]), NODES[1]
        await write(frontend, 0)
        world.disks[node].full = True
        for _ in range(3):
            await world.ctl("hypervisor.remove", name="disk", node=NODES[2])
            await world.ctl("hypervisor.add", name="disk", node=NODES[2])
        await asyncio.sleep(7 * CONFIG.beat_interval)
        assert world.saved_seq(node) < world.database.committed.seq - 4, "it could not store it"
        world.kill_blockd(node)
        world.disks[node].full = False
        world.start_blockd(node)
        await until(lambda: world.registered(node))
        assert all(r.status == IN_SYNC for _, _, r in image_of(world).locations[node])
        await frontend.close()

    play(restart)


def test_a_block_whose_announcement_was_not_answered_stays_active_when_the_role_is_released(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """metad has it as active in a new generation, and no replica has that."""
    real = Coordinator.ask_metad

    async def ask_metad(self: Coordinator, op: str, fields: Header) -> Any:
        reply = await real(self, op, fields)
        if op == "activate" and fields["ranges"] == [[1, 1]] and self.own == NODES[0]:
            raise Unreachable("the answer was lost")
        return reply

    async def release(world: World) -> None:
        first, second = Frontend(world, NODES[0]), Frontend(world, NODES[1])
        await write(first, 1)
        await write(first, 0)
        monkeypatch.setattr(Coordinator, "ask_metad", ask_metad)
        await until(lambda: 1 not in image_of(world).active)
        unanswered = asyncio.ensure_future(write(first, 1))
        await until(lambda: 1 in image_of(world).active)
        await write(second, 1)
        with pytest.raises(UkaiError):
            await unanswered
        await first.close()
        await second.close()

    play(release)


def test_a_copy_elsewhere_is_read_the_short_way_while_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be looked up or waited for; where the node is lost, or its copy fails, another one is found."""
    slow: list[int] = []
    real = Reads._read_slow

    async def read_slow(self: Reads, handle: Handle, offset: int, *rest: Any) -> None:
        slow.append(offset)
        await real(self, handle, offset, *rest)

    async def read(world: World) -> None:
        monkeypatch.setattr(Reads, "_read_slow", read_slow)
        fields = {"name": "far", "size": 8 * BLOCK_BYTES, "block_size": BLOCK_BYTES, "hypervisors": list(NODES)}
        await create(world, locations=[NODES[1], NODES[2]], **fields)
        frontend = Frontend(world, NODES[0], "far")

        async def reads(times: int) -> int:
            slow.clear()
            for _ in range(times):
                data = await frontend.request({"op": "r", "o": 0, "l": SECTOR}, None, False)
                assert data == b"x" * SECTOR
            return len(slow)

        await write(frontend, 0)
        assert await reads(8) == 1
        world.kill_blockd(NODES[1])
        assert await reads(8) <= 2
        await frontend.close()

    play(read)


def test_a_writer_that_its_peers_have_just_confirmed_reads_nothing_that_was_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """metad has missed it for a lease, and its peers have not: what they have confirmed is waited out (R3)."""
    here, there = NODES[0], NODES[1]
    read_at: list[float] = []
    real = Role._fence

    def cut(world: World, *others: str) -> None:
        world.net.cuts |= {w for other in others for w in ((here, other), (other, here))}

    async def race(world: World) -> None:
        loop = asyncio.get_running_loop()

        async def fence(self: Role, node: str, epoch: int) -> Any:
            cut(world, *NODES[1:])
            return await real(self, node, epoch)

        async def read_all() -> None:
            while True:
                began = loop.time()
                if await old.request({"op": "r", "o": 0, "l": SECTOR}, None, False) == b"x" * SECTOR:
                    read_at.append(began)
                await asyncio.sleep(0.002)

        old, new = Frontend(world, here), Frontend(world, there)
        beside = [loop.create_task(work) for work in (old.keep(), new.keep())]
        await write(old, 0)
        server = world.blockds[there]
        server.process.context.run(server.core.peer, here)  # it is connected, and so does not wait for it later
        cut(world, METAD)
        beside.append(loop.create_task(read_all()))
        await asyncio.sleep(2 * CONFIG.lease)
        assert read_at[-1] > loop.time() - 0.1
        monkeypatch.setattr(Role, "_fence", fence)
        await new.request({"op": "w", "o": 0, "s": False}, b"y" * SECTOR, True)
        replaced_at = loop.time()
        await asyncio.sleep(2 * CONFIG.lease)
        assert max(read_at) < replaced_at
        for task in beside:
            task.cancel()

    play(race, active_idle=60.0, active_age=60.0)


@pytest.mark.expect_log("out-of-sync")
def test_a_node_that_is_away_costs_no_request_for_blocks_that_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Header] = []
    real = Coordinator.ask_metad

    async def ask_metad(self: Coordinator, op: str, fields: Header) -> Any:
        if op == "mark":
            asked.append(fields)
        return await real(self, op, fields)

    async def away(world: World) -> None:
        monkeypatch.setattr(Coordinator, "ask_metad", ask_metad)
        fields = {"name": "long", "size": 64 * BLOCK_BYTES, "block_size": BLOCK_BYTES, "hypervisors": list(NODES)}
        await create(world, locations=[NODES[1], NODES[2]], **fields)
        world.kill_blockd(NODES[2])
        frontend = Frontend(world, NODES[0], "long")
        for block in range(64):
            await write(frontend, block)
        assert 0 < len(asked) < 32, "those announced together are marked together"
        asked.clear()
        for block in range(64):
            await write(frontend, block)
        assert asked == []
        await frontend.close()

    play(away, active_limit=32)


def test_a_resync_that_began_as_the_role_was_lost_begins_again_with_the_next_grant() -> None:
    """A run ends with the role it began with; another one takes the order up, though it has the same number."""

    async def lose(world: World) -> None:
        frontend = Frontend(world, NODES[0])
        await write(frontend, 0)
        await world.ctl("location.add", name="disk", node=NODES[2])
        await world.ctl("sync.start", name="disk")
        core, uuid = world.blockds[NODES[0]].core, image_of(world).uuid
        await until(lambda: uuid in core.mirror.cluster.jobs)
        coordinator = core.coordinators[uuid]
        coordinator.role.lose("for the test")
        await core._look_after(coordinator, True)
        await write(frontend, 1)
        await until(lambda: world.database.committed.jobs[uuid].state == "done")
        await frontend.close()

    play(lose)


@pytest.mark.expect_log("frontend is silent")
def test_a_role_whose_grant_was_never_answered_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """metad names a node that does not know it: nobody would copy for this image until somebody writes again (R11)."""
    real = Core.metad
    lost: list[Header] = []

    async def metad(self: Core, op: str, fields: Header) -> Any:
        reply = await real(self, op, fields)
        if op == "grant.commit" and self.node == NODES[0]:
            lost.append(fields)
            await asyncio.sleep(CONFIG.io_timeout)
            raise Timeout("no answer")
        return reply

    async def silence(world: World) -> None:
        frontend = Frontend(world, NODES[0])
        await write(frontend, 0)
        await frontend.close()
        await until(lambda: not image_of(world).writer)
        frontend = Frontend(world, NODES[0])
        monkeypatch.setattr(Core, "metad", metad)
        with pytest.raises(UkaiError):
            await write(frontend, 0)
        monkeypatch.setattr(Core, "metad", real)
        assert len(lost) == 1
        await world.ctl("location.add", name="disk", node=NODES[2])
        await world.ctl("sync.start", name="disk")
        await until(lambda: world.database.committed.jobs[image_of(world).uuid].state == "done")
        await frontend.close()

    play(silence)


def test_a_registration_of_a_process_that_has_ended_since_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """metad was frozen and reads the connection of the former process last: its report is no older copy."""
    sent: list[Header] = []
    real = World.ask_metad

    async def ask_metad(self: World, source: str, process: Any, fields: Header, timeout_s: float) -> Header:
        if fields["op"] == "register" and source == NODES[0]:
            sent.append(fields)
        return await real(self, source, process, fields, timeout_s)

    monkeypatch.setattr(World, "ask_metad", ask_metad)

    async def late(world: World) -> None:
        frontend = Frontend(world, NODES[0])
        await write(frontend, 0)
        for _ in range(2):
            world.kill_blockd(NODES[0])
            world.start_blockd(NODES[0])
            await until(lambda: world.registered(NODES[0]))
        await write(frontend, 1)
        former = [fields for fields in sent if fields["inc"] != sent[-1]["inc"]]
        with pytest.raises(StaleSession, match="it ended before"):
            await world.ask_metad(NODES[0], None, former[-1], 1.0)
        await write(frontend, 2)
        assert not any("older" in r.reason for where in image_of(world).locations.values() for _, _, r in where)
        await frontend.close()

    play(late)


@pytest.mark.expect_log("is another one here|has seen another change|is not the one that this node has seen")
@pytest.mark.parametrize("restarted", [False, True])
def test_a_metad_that_lacks_no_more_than_the_last_change_hears_what_each_node_holds(restarted: bool) -> None:
    """The number of the change that is lost is used again: the nodes must not go on, and must say what they have."""

    async def restored(world: World) -> None:
        frontend = Frontend(world, NODES[0])
        await write(frontend, 0)
        await frontend.close()
        await until(lambda: not image_of(world).writer)
        entries = world.database.entries
        await until(lambda: all(world.saved_seq(n) == entries[-1][0] for n in NODES))
        world.kill_metad()
        world.database = world.database.older(len(entries) - 1)
        world.jumps = True
        if restarted:
            for node in NODES:
                world.kill_blockd(node)
        world.start_metad()
        if restarted:
            for node in NODES:
                world.start_blockd(node)
        metad = world.metad
        assert metad is not None
        await until(lambda: set(metad.core.reports) == set(NODES))
        assert set(metad.core.behind) == set(NODES)

    play(restored)


@pytest.mark.expect_log("last copy")
def test_blocks_whose_last_copy_stays_are_not_said_to_be_out_of_sync(caplog: pytest.LogCaptureFixture) -> None:
    """metad answers with ranges of its own, as the generations of the blocks have it."""

    async def fail(world: World) -> None:
        fields = {"name": "long", "size": 4 * BLOCK_BYTES, "block_size": BLOCK_BYTES, "hypervisors": list(NODES)}
        await create(world, locations=[NODES[0]], **fields)
        frontend = Frontend(world, NODES[0], "long")
        for block in (0, 1):
            await write(frontend, block)
        world.disks[NODES[0]].fail["fdatasync"] = 1
        with pytest.raises(UkaiError):
            await frontend.request({"op": "f"}, None, True)
        await frontend.close()

    play(fail)
    lines = [r.message for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert lines
    assert all("last copy, blocks" in line for line in lines), lines
    assert all("out-of-sync" not in line for line in lines), lines

"""metad's sockets: real ones, with the nodes played by the test."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from tests.machine import PortRange
from tests.metad.desk import state
from ukai import messages
from ukai.config import Config
from ukai.errors import (
    Behind,
    Busy,
    DiskError,
    Exists,
    NotReady,
    RemoteProtocolError,
    UkaiError,
    Unreachable,
    UsageError,
    VersionError,
)
from ukai.messages import Header
from ukai.metad.ops import OPS
from ukai.metad.server import Server
from ukai.metalink import MetadLink
from ukai.telemetry import Telemetry
from ukai.wire import Frames, Requester

METAD, A, B = "127.0.0.1", "192.0.2.1", "192.0.2.2"


class Node:
    """A blockd that says what the test wants."""

    def __init__(self, context: zmq.Context[Any], config: Config, address: str) -> None:
        self.address, self.inc = address, f"{address}-1"
        self.answers: dict[str, Header] = {}
        self.calls: list[tuple[str, Header]] = []
        self.link = Requester(context, config.control_endpoint, prefix=[b""], on_request=self._asked)
        self._numbers = itertools.count(1)
        self._interval_s = config.beat_interval / 2
        self._beating: asyncio.Task[None] | None = None

    def _asked(self, header: Header, rest: Frames) -> None:
        self.calls.append((header["op"], header))
        answer = self.answers.get(header["op"], {})
        if answer != {"silent": True}:
            self.link.send({**answer, "re": header["id"]})

    async def ask(self, op: str, **fields: Any) -> Header:
        named = {"node": self.address, "inc": self.inc, "n": next(self._numbers)}
        reply, _ = await self.link.call(op, {**named, **fields}, 5.0)
        return reply

    async def register(self, **fields: Any) -> Header:
        report = {"store_id": f"s-{self.address}", "boot_id": "b", "serial": 0, "highest_seq": 0, "images": []}
        reply = await self.ask("register", **{**report, **fields})
        self._beating = asyncio.create_task(self._beat())
        return reply

    async def _beat(self) -> None:
        while True:
            await self.ask("beat")
            await asyncio.sleep(self._interval_s)

    def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
        self.link.close()


class Bench:
    """A running metad, and those who talk to it."""

    def __init__(self, config: Config, context: zmq.Context[Any], server: Server, telemetry: Telemetry) -> None:
        self.config, self.context, self.server, self.telemetry = config, context, server, telemetry
        self.ctl = Requester(context, config.control_endpoint, prefix=[b"corr", b""])
        self.links: list[Any] = [self.ctl]

    async def ask(self, op: str, **fields: Any) -> Header:
        reply, _ = await self.ctl.call(op, {"timeout": 5.0, **fields}, 5.0)
        return reply

    async def node(self, address: str) -> Node:
        node = Node(self.context, self.config, address)
        self.links.append(node)
        await node.register()
        return node

    def mirror(self, detail: bool = True) -> MetadLink:
        link = MetadLink(self.context, self.config, detail=detail)
        self.links.append(link)
        link.start()
        return link


def settings(root: Path, ports: PortRange, **more: Any) -> Config:
    base = ports.first
    return Config(
        metadata_root=str(root), control_port=base, publish_port=base + 1, metad_events_port=base + 2,
        proxy_port=base + 3, beat_interval=0.2, lease=1.0, metrics_interval=0.1, **more,
    )  # fmt: skip


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Bench]:
    context: zmq.Context[Any] = zmq.Context()
    telemetry = Telemetry(context, config.events_endpoint("metad", METAD), METAD, "metad", config.metrics_interval)
    server = Server(config, METAD, context, telemetry)
    try:
        telemetry.start()
        await server.start()
        bench = Bench(config, context, server, telemetry)
        try:
            yield bench
        finally:
            for link in bench.links:
                link.close()
            await server.stop()
    finally:
        telemetry.close()
        context.destroy(linger=0)


def on_bench(root: Path, scene: Callable[[Bench], Awaitable[None]], **more: Any) -> None:
    ports = PortRange([METAD], 6)

    async def play() -> None:
        async with running(settings(root, ports, **more)) as bench:
            await scene(bench)

    try:
        asyncio.run(play())
    finally:
        ports.close()


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.005)


def test_an_image_is_made_and_shown_and_mirrored(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        full, names = bench.mirror(), bench.mirror(detail=False)
        await asyncio.gather(full.ready.wait(), names.ready.wait())
        a, b = await bench.node(A), await bench.node(B)
        begun = asyncio.get_running_loop().time()
        reply = await bench.ask("image.create", name="disk", size=100 * 2**30, block_size=0, locations=[A, B])
        assert asyncio.get_running_loop().time() - begun < 1
        assert reply["image"]["blocks"] == 1600
        assert [c[0] for c in a.calls + b.calls] == ["prepare", "prepare"]
        uuid = reply["image"]["uuid"]
        granted = await a.ask("grant", image=uuid, opened_epoch=-1, purpose="io")
        await a.ask("grant.commit", image=uuid, epoch=granted["epoch"], fenced=[A, B])
        last = await a.ask("activate", image=uuid, epoch=1, ranges=[[0, 7]], since=full.mirror.seq)
        cluster = bench.server.core.cluster
        await until(lambda: full.mirror.seq == names.mirror.seq == cluster.seq, "mirrors follow")
        assert state(full.mirror.cluster) == state(cluster)
        assert names.mirror.cluster.names == {"disk": uuid}
        assert last["seq"] == cluster.seq
        late = bench.mirror()
        await late.ready.wait()
        assert state(late.mirror.cluster) == state(cluster)
        samples = {(n, tuple(labels.values())): v for n, labels, v in bench.telemetry.metrics.samples()}
        assert samples["ukai_metadata_seq", ()] == cluster.seq
        assert samples["ukai_replicas", ("disk", A, "in-sync")] == 1600
        assert samples["ukai_requests_total", ("activate", "disk")] == 1

    on_bench(tmp_path, scene)


def test_the_state_is_the_same_after_a_restart_and_nodes_find_back(tmp_path: Path) -> None:
    ports = PortRange([METAD], 6)

    async def scene() -> None:
        config = settings(tmp_path, ports)
        async with running(config) as bench:
            a = await bench.node(A)
            uuid = (await bench.ask("image.create", name="disk", size=8192, locations=[A]))["image"]["uuid"]
            await a.ask("grant", image=uuid, opened_epoch=-1, purpose="io")
            before = state(bench.server.core.cluster)
            inc = bench.server.core.inc
        async with running(config) as bench:
            after = state(bench.server.core.cluster)
            assert after["runs"] == [*before["runs"], [before["seq"] + 1, bench.server.core.inc]]
            assert after | {"runs": before["runs"], "seq": before["seq"]} == before
            assert bench.server.core.inc != inc
            node = Node(bench.context, config, A)
            bench.links.append(node)
            with pytest.raises(NotReady):
                await node.ask("beat")
            assert (await bench.ask("node.list"))["nodes"][0]["state"] == "unknown"
            await node.register(serial=1, highest_seq=before["seq"], cluster_id=before["cluster_id"])
            assert (await node.ask("beat"))["lost"] == []
            assert (await bench.ask("node.list"))["nodes"][0]["state"] == "up"

    try:
        asyncio.run(scene())
    finally:
        ports.close()


def test_catching_up_by_changes_or_by_a_snapshot(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        await bench.node(A)
        await bench.ask("image.create", name="disk", size=8192, locations=[A])
        seq = bench.server.core.cluster.seq
        assert (await bench.ask("catchup", since=seq))["changes"] == []
        reply = await bench.ask("catchup", since=seq - 2)
        assert [c[0] for c in reply["changes"]] == [seq - 1, seq]
        assert reply["cluster_id"] == bench.server.core.cluster.cluster_id
        for since in (-1, seq + 5):
            reply = await bench.ask("catchup", since=since)
            assert reply["snapshot"]["seq"] == seq
        reply = await bench.ask("snapshot", detail=False)
        assert "locations" not in reply["snapshot"]["images"][0]
        bench.server._history.reset(seq)
        assert "snapshot" in await bench.ask("catchup", since=seq - 1)

    on_bench(tmp_path, scene)


def test_a_node_that_does_not_answer_ends_in_time(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        a = await bench.node(A)
        a.answers["prepare"] = {"silent": True}
        begun = asyncio.get_running_loop().time()
        with pytest.raises(Unreachable, match=f"node {A} can't be reached"):
            await bench.ask("image.create", name="disk", size=8192, locations=[A], timeout=0.5)
        assert asyncio.get_running_loop().time() - begun < 0.5
        a.answers["prepare"] = {"err": "exists", "msg": "data are there"}
        with pytest.raises(Exists, match="data are there"):
            await bench.ask("image.create", name="disk", size=8192, locations=[A])
        a.close()
        await until(lambda: not bench.server.core.up(A), "the node is down")
        with pytest.raises(Unreachable):
            await bench.ask("image.create", name="disk", size=8192, locations=[A])

    on_bench(tmp_path, scene)


def test_the_role_is_taken_from_a_writer_over_its_connection(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        a, b = await bench.node(A), await bench.node(B)
        uuid = (await bench.ask("image.create", name="disk", size=8192, locations=[A, B]))["image"]["uuid"]
        granted = await a.ask("grant", image=uuid, opened_epoch=-1, purpose="io")
        await a.ask("grant.commit", image=uuid, epoch=granted["epoch"], fenced=[A, B])
        a.answers["release"] = {"handles": 1, "clean": True}
        granted = await b.ask("grant", image=uuid, opened_epoch=0, purpose="io")
        await b.ask("grant.commit", image=uuid, epoch=granted["epoch"], fenced=[A, B])
        assert a.calls[-1][0] == "release"
        assert (await a.ask("beat", roles={uuid: 1}))["lost"] == [uuid]
        a.answers["close"] = {"err": "busy", "msg": "open"}
        with pytest.raises(Busy):
            await bench.ask("image.offline", name="disk")

    on_bench(tmp_path, scene)


def test_hand_made_metadata_are_read_from_the_root(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        a = await bench.node(A)
        (tmp_path / "image01").write_text(
            '{"name": "image01", "size": 8192, "block_size": 4096, "hypervisors": ["192.0.2.1"],'
            ' "blocks": [{"192.0.2.1": {"sync_status": 0}}, {"192.0.2.1": {"sync_status": 0}}]}'
        )
        a.answers["prepare"] = {"present": [[0, 0]], "bad": []}
        reply = await bench.ask("image.add", name="image01")
        assert reply["image"]["locations"][A]["in_sync"] == 2
        assert a.calls[-1][0] == "adopted"
        with pytest.raises(UkaiError, match="put the output of create_metadata there"):
            await bench.ask("image.add", name="image02")
        with pytest.raises(UsageError):
            await bench.ask("image.add", name="../../etc/passwd")

    on_bench(tmp_path, scene)


def test_a_burst_shares_commits(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        a = await bench.node(A)
        await bench.node(B)
        uuid = (await bench.ask("image.create", name="disk", size=4096 * 2000, block_size=4096, locations=[A, B]))[
            "image"
        ]["uuid"]
        granted = await a.ask("grant", image=uuid, opened_epoch=-1, purpose="io")
        await a.ask("grant.commit", image=uuid, epoch=granted["epoch"], fenced=[A, B])
        commits = 0
        commit = bench.server._store.commit

        def counted(*args: Any) -> None:
            nonlocal commits
            commits += 1
            commit(*args)

        bench.server._store.commit = counted  # type: ignore[method-assign, assignment]
        await asyncio.gather(
            *(a.ask("mark", image=uuid, epoch=1, marks=[[B, i, i, f"reason {i}"]]) for i in range(1000))
        )
        assert commits < 200
        assert bench.server.core.cluster.images[uuid].locations[B].get(999).status == 2  # type: ignore[union-attr]

    on_bench(tmp_path, scene)


@pytest.mark.expect_log("disk is full|database or disk")
def test_a_full_disk_is_said_to_the_askers_and_passes(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        a = await bench.node(A)
        mirror = bench.mirror()
        await mirror.ready.wait()
        db = bench.server._store._open_db()
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
        made, refusal = 0, ""
        while not refusal:
            try:
                await bench.ask("image.create", name=f"disk{made}", size=8192, locations=[A])
                made += 1
            except NotReady as e:
                refusal = e.message
        assert "can't store changes" in refusal
        assert "disk is full" in refusal
        assert "\n" not in refusal
        assert len((await bench.ask("image.list"))["images"]) == made
        assert (await a.ask("beat"))["lost"] == []
        db.execute("PRAGMA max_page_count = 1000000")
        await bench.ask("image.create", name=f"disk{made}", size=8192, locations=[A])
        cluster = bench.server.core.cluster
        await until(lambda: mirror.mirror.seq == cluster.seq, "the mirror follows")
        assert state(mirror.mirror.cluster) == state(cluster)

    on_bench(tmp_path, scene)


@pytest.mark.expect_log("no such file|I/O error|can't be|cannot be")
def test_a_broken_disk_stops_answers_until_it_is_well(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        await bench.node(A)
        await bench.ask("image.create", name="disk", size=8192, locations=[A])
        store = bench.server._store
        commit, reopen = store.commit, store.reopen

        def broken(*args: Any) -> Any:
            raise DiskError("metadata.db can't be written: disk I/O error")

        store.commit = store.reopen = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(NotReady, match="I/O error"):
            await bench.ask("sync.start", name="disk")
        with pytest.raises(NotReady, match="I/O error"):
            await bench.ask("image.list")
        store.commit, store.reopen = commit, reopen  # type: ignore[method-assign]
        for _ in range(100):
            try:
                await bench.ask("sync.start", name="disk")
                break
            except NotReady:
                await asyncio.sleep(0.02)
        assert (await bench.ask("sync.status"))["jobs"][0]["state"] == "done"

    on_bench(tmp_path, scene)


def test_whatever_arrives_metad_lives_and_nothing_changes(tmp_path: Path) -> None:
    async def scene(bench: Bench) -> None:
        a = await bench.node(A)
        uuid = (await bench.ask("image.create", name="disk", size=8192, locations=[A]))["image"]["uuid"]
        await a.ask("beat")
        before = state(bench.server.core.cluster)
        counted = bench.telemetry.metrics.counters["ukai_protocol_errors_total"]
        chance = random.Random(7)
        raw = bench.context.socket(zmq.DEALER)
        raw.linger = 0
        raw.connect(bench.config.control_endpoint)
        good = messages.pack(
            {"op": "mark", "id": 1, "node": A, "inc": a.inc, "image": uuid, "epoch": 0, "n": 999, "marks": []}
        )
        values: list[Any] = [None, -1, 2**63, 1.5, "", "x" * 10, b"\xff", [], [[1]], {}, {"a": 1}, True, [[2, 1]]]
        fields = ("node", "inc", "image", "epoch", "ranges", "marks", "name", "size", "locations", "images", "roles")
        try:
            for _ in range(300):
                raw.send_multipart([b"", chance.randbytes(chance.randrange(60))])
                raw.send_multipart([b"", good[: chance.randrange(len(good))]])
                junk = {name: chance.choice(values) for name in chance.sample(fields, 4)}
                junk |= {"op": chance.choice([*OPS, "x", 7]), "id": chance.choice([1, None, "id"]), "v": 1}
                if junk["op"] not in ("register",):
                    raw.send_multipart([b"", msgpack.packb(junk | {"timeout": 0.2})])
            raw.send_multipart([b""])
            raw.send_multipart([b"no empty frame"])
            raw.send_multipart([b"", b"\xc1" * 100_000])
            raw.send_multipart([b"", msgpack.packb({"op": "ping", "id": 5, "v": 99})])
            with pytest.raises(RemoteProtocolError):
                await bench.ask("no.such.op")
            assert (await bench.ask("ping"))["seq"] == before["seq"]
        finally:
            raw.close(0)
        assert bench.telemetry.metrics.counters["ukai_protocol_errors_total"] > counted + 300
        assert state(bench.server.core.cluster) == before

    on_bench(tmp_path, scene)


def test_another_version_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="same release"):
        messages.unpack(msgpack.packb({"v": 2, "op": "ping", "id": 1}))

    async def scene(bench: Bench) -> None:
        raw = bench.context.socket(zmq.DEALER)
        raw.linger = 0
        raw.connect(bench.config.control_endpoint)
        try:
            raw.send_multipart([b"", msgpack.packb({"op": "ping", "id": 5, "v": 99})])
            assert await asyncio.to_thread(raw.poll, 5000), "another release gets no answer"
            reply = messages.unpack(raw.recv_multipart()[1])
            assert (reply["re"], reply["err"]) == (0, "version")
            assert "same release" in reply["msg"]
        finally:
            raw.close(0)

    on_bench(tmp_path, scene)


def environment(root: Path, ports: PortRange, **more: str) -> dict[str, str]:
    base = ports.first
    return {
        **os.environ,
        "UKAI_CONFIG": "/dev/null", "UKAI_METADATA_ROOT": str(root), "UKAI_CONTROL_PORT": str(base),
        "UKAI_PUBLISH_PORT": str(base + 1), "UKAI_METAD_EVENTS_PORT": str(base + 2), "UKAI_PROXY_PORT": str(base + 3),
        "UKAI_METAD_ADDRESS": METAD, "UKAI_NODE_ADDRESS": METAD, **more,
    }  # fmt: skip


PROGRAM = [sys.executable, "-m", "ukai.metad.main"]


def test_the_process_ends_well_on_sigterm_and_is_alone(tmp_path: Path) -> None:
    ports, others = PortRange([METAD], 6), PortRange([METAD], 6)
    env = environment(tmp_path, ports)
    process = subprocess.Popen(PROGRAM, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while "runs as process" not in (line := process.stderr.readline()):
            assert line, "it ended"
        second = subprocess.run(PROGRAM, env=environment(tmp_path, others), capture_output=True, text=True, timeout=20)
        assert second.returncode == 1
        assert "in use by another metad" in second.stderr
        assert "Traceback" not in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        ports.close()
        others.close()


def test_on_another_node_there_is_nothing_to_do(tmp_path: Path) -> None:
    ports = PortRange([METAD], 6)
    try:
        env = environment(tmp_path, ports, UKAI_NODE_ADDRESS="127.0.0.2")
        done = subprocess.run(PROGRAM, env=env, capture_output=True, text=True, timeout=20)
        assert done.returncode == 64
        assert len(done.stderr.splitlines()) == 1
        assert "metad runs on 127.0.0.1, not on this node 127.0.0.2" in done.stderr
    finally:
        ports.close()


def test_a_registration_names_the_maker_of_the_highest_change_that_the_node_has_seen(tmp_path: Path) -> None:
    """A process that has just begun has no copy of the metadata yet: what it stored is what counts (R12)."""

    async def scene(bench: Bench) -> None:
        link = MetadLink(bench.context, bench.config, detail=True)
        bench.links.append(link)  # it does not follow metad
        report = {"node": A, "inc": "a", "n": 1, "store_id": "s", "boot_id": "b", "serial": 0, "images": []}
        await (await bench.node(B)).ask("catchup")
        with pytest.raises(Behind, match="has seen another change 1 "):
            await link.call("register", {**report, "highest_seq": 1, "maker": "another metad"}, 5.0)
        assert bench.server.core.behind == {A: 1}

    on_bench(tmp_path, scene)

"""The decisions of metad on a desk: a clock that is set by hand, nodes that answer from a script, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from ukai.config import Config
from ukai.errors import NotFound
from ukai.messages import Header
from ukai.metad import adoption, ops
from ukai.metad.core import Core, Entry
from ukai.model import Cluster, Image

A, B, C, D = "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"
CONFIG = Config(metad_address=A, lease=0.4, beat_interval=0.1, replica_timeout=0.3, io_timeout=1.0)

Answer = Header | Exception | Callable[[Header], Awaitable[Header]]


class Desk:
    """``Ports`` and the nodes behind them; ``answers[node, op]`` is what a node says."""

    def __init__(self, config: Config = CONFIG) -> None:
        self.committed: list[Entry] = []
        self.calls: list[tuple[str, str, Header]] = []
        self.answers: dict[tuple[str, str], Answer] = {}
        self.files: dict[str, bytes] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.skew = 0.0
        self.jumps = False
        """The sequence may leave numbers out: older metadata is accepted."""
        self._numbers = iter(range(1, 10**6))
        self.core = Core(Cluster(cluster_id="c1"), self, config, A, "metad-1")
        self.core.begin_run()

    # --- Ports

    def now(self) -> float:
        try:
            return asyncio.get_running_loop().time() + self.skew
        except RuntimeError:
            return 1000.0 + self.skew

    def wall(self) -> float:
        return 1.7e9 + self.skew

    def new_uuid(self) -> str:
        return f"uuid-{next(self._numbers)}"

    def changed(self, entries: list[Entry]) -> None:
        for entry in entries:
            last = self.committed[-1][0] if self.committed else 0
            assert entry[0] == last + 1 or (self.jumps and entry[0] > last)
            self.committed.append(entry)

    async def durable(self) -> None:
        await asyncio.sleep(0)

    def drop_state(self) -> None:
        raise AssertionError("a change could not be applied")

    async def call(self, node: str, op: str, fields: Header, timeout_s: float) -> Header:
        self.calls.append((node, op, fields))
        answer = self.answers.get((node, op), {})
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, dict) else await answer(fields)

    async def read_hand_made(self, name: str) -> adoption.HandMade:
        if name not in self.files:
            raise NotFound(f"no file {name}")
        return adoption.read(self.files[name], name)

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work, name=name))

    def put_back(self, seq: int) -> None:
        """metad begins anew with its database as it was at a change."""
        self.committed = [entry for entry in self.committed if entry[0] <= seq]
        cluster = Cluster(cluster_id="c1")
        for _, _, _, change in self.committed:
            cluster.apply(change)
        self.core = Core(cluster, self, self.core.config, A, "metad-2")
        self.core.begin_run()
        self.jumps = True

    # --- verbs

    async def do(self, op: str, **fields: Any) -> Header:
        """One request, as the server runs it."""
        if "node" in fields:
            fields.setdefault("n", next(self._numbers))
        reply = ops.begin(self.core, op, fields)
        return reply if isinstance(reply, dict) else await reply

    async def register(self, node: str, inc: str = "", **fields: Any) -> Header:
        """By default what a node says that has lost nothing since ``holds`` looked."""
        known = self.core.cluster.nodes.get(node)
        report = {
            "node": node,
            "inc": inc or f"{node}-1",
            "store_id": f"store-{node}",
            "boot_id": "boot",
            "serial": known.serial if known is not None else 0,
            "highest_seq": self.core.cluster.seq,
            "cluster_id": "",
            "images": self.holds(node),
        }
        reply = await self.do("register", **{**report, **fields})
        await self.beat(node)
        return reply

    def holds(self, node: str) -> list[dict[str, Any]]:
        """What the node should have, as it would report it."""
        return [
            {
                "uuid": image.uuid,
                "name": image.name,
                "epoch": image.epoch,
                "gens": [[a, b, r.generation] for a, b, r in image.locations[node] if r.generation],
                "bad": [],
            }
            for image in self.core.cluster.images.values()
            if node in image.locations
        ]

    async def beat(self, node: str, inc: str = "", **fields: Any) -> Header:
        session = self.core.sessions[node]
        return await self.do(
            "beat", **{"node": node, "inc": inc or session.inc, "serial": session.serial, "heard": True, **fields}
        )

    async def coordinate(self, node: str, op: str, image: Image, **fields: Any) -> Header:
        """A request of the writer in its epoch."""
        image = self.core.image(image.uuid)
        return await self.do(
            op, node=node, inc=self.core.sessions[node].inc, image=image.uuid, epoch=image.epoch, **fields
        )

    async def image(
        self, *locations: str, blocks: int = 10, name: str = "disk", hypervisors: list[str] | None = None
    ) -> Image:
        for node in {*locations, *(hypervisors or ())}:
            if node not in self.core.sessions:
                await self.register(node)
        await self.do(
            "image.create", name=name, size=blocks * 4096, block_size=4096, locations=list(locations),
            hypervisors=hypervisors or list(locations),
        )  # fmt: skip
        return self.core.cluster.by_name(name)

    async def own(self, node: str, image: Image, fenced: list[str] | None = None, opened_epoch: int = -1) -> int:
        """Both phases of a grant; returns the epoch."""
        reply = await self.grant(node, image, opened_epoch)
        await self.do(
            "grant.commit", node=node, inc=self.core.sessions[node].inc, image=image.uuid, epoch=reply["epoch"],
            fenced=reply["holders"] if fenced is None else fenced,
        )  # fmt: skip
        epoch: int = reply["epoch"]
        return epoch

    async def grant(self, node: str, image: Image, opened_epoch: int = -1, purpose: str = "io") -> Header:
        return await self.do(
            "grant", node=node, inc=self.core.sessions[node].inc, image=image.uuid, opened_epoch=opened_epoch,
            purpose=purpose,
        )  # fmt: skip

    def statuses(self, image: Image, node: str) -> list[int]:
        image = self.core.image(image.uuid)
        return [r.status if (r := image.replica(node, b)) is not None else -1 for b in range(image.block_count)]

    def reasons(self, image: Image, node: str) -> set[str]:
        return {r.reason for _, _, r in self.core.image(image.uuid).locations[node]}

    def called(self, op: str) -> list[str]:
        return [node for node, name, _ in self.calls if name == op]


def state(cluster: Cluster) -> dict[str, Any]:
    """Everything, in an order that does not depend on the way that led there."""
    found = cluster.snapshot()
    for key, name in (("images", "uuid"), ("nodes", "address"), ("jobs", "uuid")):
        found[key].sort(key=lambda row: row[name])
    return found


def at_desk(test: Callable[[Desk], Awaitable[None]], config: Config = CONFIG) -> None:
    """Run a scene on a new desk; afterwards the history leads to the same state again."""

    async def scene() -> None:
        desk = Desk(config)
        await test(desk)
        for task in desk.tasks:
            await task
        again = Cluster(cluster_id="c1")
        for seq, _, _, change in desk.committed:
            again.seq = seq - 1
            again.apply(change)
        assert again.snapshot() == desk.core.cluster.snapshot()
        assert Cluster.from_snapshot(again.snapshot()).snapshot() == again.snapshot()

    asyncio.run(scene())
